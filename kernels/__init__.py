"""Kernels, and the operations the decoder is made of.

Importing this sets how OpenMP threads wait, unless the user has: a short spin, then sleep. It must come before torch
loads its OpenMP library, so every package of manylora imports this one first. On two cores with another busy process
libgomp's own default (spin for about a millisecond) was seen to make a step 25 to 50 times slower, because the spinning
thread keeps the one it waits for off the processor; sleeping at once made a step twice as slow on an idle machine.
"""

from __future__ import annotations

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
