"""weights.safetensors_file: what it writes others read, and no lie in a header is believed."""
import json
import os
import struct

import pytest
import torch

from smit.weights import safetensors_file

TENSORS = {
    "scalar": torch.tensor(2.5),
    "matrix": torch.arange(6, dtype=torch.float32).view(2, 3),
    "turned": torch.arange(6, dtype=torch.float32).view(2, 3).T,
    "half": torch.tensor([1.5, -2], dtype=torch.bfloat16),
    "index": torch.tensor([2 ** 40, -1]),
    "flags": torch.tensor([True, False, True]),
    "nothing": torch.empty(0, 3),
}


def same(a, b):
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def file_of(path, header, body=b""):
    """A file with this header (a dict, or bytes) and body."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def entry(begin, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_tensors_and_metadata_come_back_as_they_were(tmp_path):
    path = tmp_path / "all.safetensors"
    path.write_bytes(safetensors_file.encode(TENSORS, {"format": "pt", "grüße": "✓"}))
    tensors, metadata = safetensors_file.read(path)
    assert same(tensors, TENSORS) and metadata == {"format": "pt", "grüße": "✓"}
    tensors["matrix"].add_(1)  # its own memory, and writable


def test_the_formats_own_package_reads_and_writes_the_same(tmp_path):
    package = pytest.importorskip("safetensors.torch")
    given = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    path = tmp_path / "ours.safetensors"
    path.write_bytes(safetensors_file.encode(given, {"format": "pt"}))
    assert same(package.load_file(path), given)

    package.save_file(given, tmp_path / "package.safetensors", {"format": "pt"})
    tensors, metadata = safetensors_file.read(tmp_path / "package.safetensors")
    assert same(tensors, given) and metadata == {"format": "pt"}


def test_the_layout_is_the_formats_by_hand(tmp_path):
    data = safetensors_file.encode(
        {"b": torch.tensor([1, 2], dtype=torch.uint8), "a": torch.tensor([1.])}, {})
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + length])
    assert length % 8 == 0 and header["a"] == entry(0, 4) and header["b"] == entry(4, 6, (2,), "U8")
    assert data[8 + length:] == struct.pack("<f", 1.) + b"\x01\x02"


@pytest.mark.parametrize("header, body, why", [
    ({"a": entry(0, 8)}, bytes(8), "needs 4 bytes and claims 8"),
    ({"a": entry(0, 4)}, bytes(3), "claim 4 bytes where 3 follow"),
    ({"a": entry(0, 4)}, bytes(5), "claim 4 bytes where 5 follow"),
    ({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6), "'b' overlaps"),
    ({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4), "'b' overlaps"),
    ({"a": entry(0, 4), "b": entry(6, 10)}, bytes(10), "bytes 4 to 6 belong to no tensor"),
    ({"a": entry(4, 0)}, bytes(4), "claims -4"),
    ({"a": entry(-4, 0)}, bytes(4), "no list of whole numbers"),
    ({"a": entry(0, 4, (True,))}, bytes(4), "no list of whole numbers"),
    ({"a": entry(0, 2 ** 47, (2 ** 45,))}, bytes(4), "claim 140737488355328 bytes where 4 follow"),
    ({"a": {**entry(0, 4), "data_offsets": [0]}}, bytes(4), "not two"),
    ({"a": {**entry(0, 4), "code": "x"}}, bytes(4), "dtype, shape and data_offsets alone"),
    ({"a" * 513: entry(0, 4)}, bytes(4), "a name of 513 letters, where 512 are the most"),
    ({"a": entry(0, 4, dtype="F128")}, bytes(4), "F128"),
    ({"a": entry(0, 4, dtype=[])}, bytes(4), "does not know"),
    ({"a": entry(0, 4)}, struct.pack("<f", float("nan")), "'a' holds NaN"),
    ({"a": entry(0, 4)}, struct.pack("<f", float("-inf")), "'a' holds NaN or infinity"),
    ({"__metadata__": {"a": 1}}, b"", "not text for text"),
    (b'{"a": 1, "a": 2}', b"", "names something twice"),
    (b"[1]", b"", "no JSON object"),
    (b"{", b"", "no JSON"),
    (b"\xff\xfe", b"", "not UTF-8"),
    (b"[" * 100_000, b"", "refused"),
])
def test_a_lying_header_is_refused_in_one_line(header, body, why, tmp_path):
    with pytest.raises(ValueError, match=why) as refusal:
        safetensors_file.read(file_of(tmp_path / "odd.safetensors", header, body))
    assert "odd.safetensors" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "data", [b"", b"1234567", struct.pack("<Q", 2 ** 63), struct.pack("<Q", 9) + b"{}"])
def test_a_cut_file_is_refused_before_memory_is_taken(data, tmp_path):
    (tmp_path / "cut").write_bytes(data)
    with pytest.raises(ValueError, match="header"):
        safetensors_file.read(tmp_path / "cut")


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), os.mkfifo])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(make, tmp_path):
    make(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="x.safetensors.*no regular file"):
        safetensors_file.read(tmp_path / "x.safetensors")


def test_a_dtype_that_the_format_lacks_is_named():
    with pytest.raises(ValueError, match="phase is torch.complex64"):
        safetensors_file.encode({"phase": torch.ones(2, dtype=torch.complex64)}, {})
