import manylora.kernels  # noqa: F401 - before torch is imported anywhere: see its text
