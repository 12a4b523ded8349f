"""For tests of bit-equality in Triton's interpreter.

Its products are numpy's, which sum in an order that depends on where in the tile a row is. Matrix units do not do
that. So that such a test sees the order in which *our* kernels sum, the product of tiles is replaced by a plain chain
over k.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture
def ordered_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: nothing."""
    if not torch.cuda.is_available():
        from triton.runtime import interpreter

        def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
            total = d.data.copy()
            for k in range(a.data.shape[1]):
                total += np.multiply(a.data[:, k : k + 1], b.data[k : k + 1], dtype=total.dtype)
            return interpreter.TensorHandle(total, d.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
