"""Our reader of safetensors against the library's: it takes what that takes, to the same values, and never more."""

from __future__ import annotations

import json
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from manylora.adapters.safetensors_file import TORCH_DTYPES, SafetensorsCorrupt, read_header

DTYPES = sorted(TORCH_DTYPES.values(), key=str)


def pack(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@settings(deadline=None, max_examples=50)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=5).filter(lambda s: s != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        max_size=5,
    )
)
def test_reads_what_the_library_writes(tensors: dict[str, tuple[torch.dtype, list[int]]]) -> None:
    values = {name: torch.randn(shape).to(dtype) for name, (dtype, shape) in tensors.items()}
    buffer = bytearray(safetensors.torch.save(values, metadata={"format": "pt"}))
    ours = {entry.name: entry.read(buffer) for entry in read_header(buffer)}
    assert set(ours) == set(values)
    for name, value in values.items():
        assert ours[name].dtype == value.dtype
        assert torch.equal(ours[name], value)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=4))
def test_whatever_the_library_refuses_we_refuse(position: int, noise: bytes) -> None:
    whole = safetensors.torch.save({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.float16)})
    position %= len(whole)
    buffer = whole[:position] + noise + whole[position + len(noise) :]
    try:
        safetensors.torch.load(buffer)
    except SafetensorError:
        with pytest.raises(SafetensorsCorrupt):
            read_header(buffer)


F32 = {"dtype": "F32", "shape": [1]}


@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        (b"", "0 bytes, fewer than the 8"),
        (struct.pack("<Q", 1 << 60), "its header should have"),
        (pack(b"{"), "its header cannot be read"),
        (pack(b"[" * 100_000), "its header cannot be read"),
        (pack([1]), "is not an object"),
        (pack({"a": 3}), "tensor a has a malformed header entry"),
        (pack({"a": {**F32, "data_offsets": [0, 4], "dtype": "F3"}}, b"0000"), "malformed"),
        (pack({"a": {**F32, "data_offsets": [0, True]}}, b"0"), "bytes are not a F32 of shape"),
        (pack({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"0000"), "malformed"),
        (pack({"a": {**F32, "data_offsets": [0, 8]}}, b"00000000"), "8 bytes are not a F32 of shape"),
        (pack({"a": {**F32, "data_offsets": [4, 8]}}, b"00000000"), "tensor a begins at byte"),
        (pack({"a": {**F32, "data_offsets": [0, 4]}}, b"00000"), "and the file has"),
        (
            pack({"a": {**F32, "data_offsets": [0, 4]}, "b": {**F32, "data_offsets": [0, 4]}}, b"0000"),
            "tensor b begins at byte",
        ),
        (
            pack(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],'
                 b'"data_offsets":[0,4]}}', b"0000"),
            "'a' occurs twice",
        ),
    ],
)  # fmt: skip
def test_corrupt(buffer: bytes, message: str) -> None:
    with pytest.raises(SafetensorsCorrupt, match=message):
        read_header(buffer)


def test_unaligned_tensors_are_read() -> None:
    value = torch.tensor([1.5, -2.0])
    header = {
        "b": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "a": {**F32, "shape": [2], "data_offsets": [1, 9]},
    }
    buffer = bytearray(pack(header, b"\x07" + value.numpy().tobytes()))
    assert torch.equal(read_header(buffer)[1].read(buffer), value)
