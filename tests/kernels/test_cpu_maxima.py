"""Each row's largest value and its place, against numpy's argmax."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from manylora.kernels.cpu import available

if not available():
    pytest.skip("no AVX2 and FMA here", allow_module_level=True)

from manylora.kernels.cpu.maxima import first_maxima


def values(kind: str, rows: int, width: int) -> np.ndarray:
    rng = np.random.default_rng([rows, width])
    found = rng.standard_normal((rows, width)).astype(np.float32)
    if kind == "ties":
        found = found.round()
    elif kind == "NaN of both signs":
        found[rng.random(found.shape) < 2 / width] = np.nan
        found[rng.random(found.shape) < 2 / width] = -np.nan
    elif kind == "infinities":
        found[rng.random(found.shape) < 0.5] = -np.inf
        found[rng.random(found.shape) < 1 / width] = np.inf
    elif kind == "banned":
        found[:] = -np.inf
    elif kind == "zeros of both signs":
        found = np.where(rng.random(found.shape) < 0.5, np.float32(0), np.float32(-0.0))
    return found


@pytest.mark.parametrize("kind", ["normal", "ties", "NaN of both signs", "infinities", "banned", "zeros of both signs"])
@pytest.mark.parametrize("width", [1, 7, 511, 512, 513, 1024, 1500, 5000])
def test_as_numpy_has_it(kind: str, width: int) -> None:
    for rows in (1, 3, 32):
        wide = values(kind, rows, width + 5)
        x = wide[:, :width]  # rows that do not lie one behind the other
        found = first_maxima(torch.from_numpy(wide)[:, :width])
        expected = x.argmax(axis=1)
        assert found.places.tolist() == expected.tolist()
        assert found.highest.tobytes() == x[np.arange(rows), expected].tobytes()


@pytest.mark.parametrize("place", [0, 15, 16, 255, 511, 512, 1023, 1024, 1199])
def test_a_value_in_any_place_is_found(place: int) -> None:
    x = torch.zeros(1, 1200)
    x[0, place] = 1
    assert first_maxima(x).places.tolist() == [place]
    x[0, place] = torch.nan
    assert first_maxima(x).places.tolist() == [place]
