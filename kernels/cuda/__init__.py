"""Triton kernels for CUDA devices; they run in Triton's interpreter as well."""
