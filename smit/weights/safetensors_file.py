"""Read and write safetensors files, which hold tensors and text and no code [ours].

The format has three parts: eight bytes with the header's length, little-endian; the header, JSON,
padded with spaces to a multiple of eight; the tensors' bytes, one after the other. The header maps
each name to its dtype, its shape, and where its bytes begin and end, counted after the header.
"__metadata__" maps text to text. Needs torch and the standard library alone.

No file is trusted: sizes are compared before memory is taken, and every byte must belong to
exactly one tensor. Compared with the format's own package in tests/test_safetensors_file.py.
"""
import json
import math
import os
import struct

import torch

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_HEADER = 2 ** 25  # bytes; ten thousand tensors need one million [ours]
MAX_NAME = 512        # letters of a tensor's name [ours]


def encode(tensors, metadata):
    """Return the bytes of a safetensors file.

    tensors: {name: tensor}; metadata: {text: text}. Wide types come first, so that each tensor
    starts at a multiple of its own width. ValueError names a tensor of a dtype not known here.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in CODES:
            raise ValueError(f"{name} is {tensor.dtype}, which this writer does not know; "
                             "convert it first")
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))

    header, pieces, position = {"__metadata__": metadata}, [], 0
    for name in names:
        tensor = tensors[name].detach().cpu().contiguous()
        piece = tensor.flatten().view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + len(piece)],
        }
        pieces.append(piece)
        position += len(piece)

    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([struct.pack("<Q", len(text)), text, *pieces])


def read(path):
    """Return the tensors, {name: tensor} on CPU, and the metadata, {text: text}.

    ValueError names the file and its fault: a header that is cut or no JSON, bytes that belong to
    no tensor or to two, a shape that does not fit its bytes, values that are not finite, or no
    regular file.
    """
    try:
        if not os.path.isfile(path):                         # a pipe would be waited for
            raise ValueError("there is no regular file of this name")
        with open(path, "rb") as file:
            header, start = read_header(file)
            metadata = header.pop("__metadata__", {})
            check_metadata(metadata)
            check_ranges(header, os.fstat(file.fileno()).st_size - start)
            tensors = {}
            for name, entry in header.items():
                tensors[name] = read_tensor(file, start, name, entry)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} is refused as safetensors: {reason}; use another file or make it "
                         "anew") from None
    return tensors, metadata


def read_header(file):
    """Return the header as a dict, and the position of the first byte after it."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    if len(prefix) < 8:
        raise ValueError(f"it has {size} bytes, too few for a header")
    (length,) = struct.unpack("<Q", prefix)
    if length > min(size - 8, MAX_HEADER):
        raise ValueError(f"its header claims {length} bytes of a file of {size}")
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=without_duplicates)
    except UnicodeDecodeError:
        raise ValueError("its header is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"its header is no JSON ({error.msg} at {error.pos})") from None
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header, 8 + length


def without_duplicates(pairs):
    """Make a dict of a JSON object; ValueError for a name that comes twice.

    Two readers could take it differently.
    """
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("its header names something twice")
    return result


def check_metadata(metadata):
    """Raise ValueError unless the metadata maps text to text."""
    texts = metadata.values() if isinstance(metadata, dict) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("its metadata is not text for text")


def check_ranges(header, available):
    """Raise ValueError unless tensors fill the bytes after the header: no gap, no byte twice."""
    for name, entry in header.items():
        check_entry(name, entry)
    position = 0
    for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
        begin, end = header[name]["data_offsets"]
        if begin < position:
            raise ValueError(f"{name!r} overlaps the tensor before it, at byte {begin}")
        if begin > position:
            raise ValueError(f"bytes {position} to {begin} belong to no tensor")
        position = end
    if position != available:
        raise ValueError(f"its tensors claim {position} bytes where {available} follow the header")


def check_entry(name, entry):
    """Raise ValueError unless the dtype is known and the shape fills the bytes it claims."""
    check_name(name)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} is not described by dtype, shape and data_offsets alone")
    if entry["dtype"] not in list(DTYPES):
        raise ValueError(f"{name!r} is of dtype {entry['dtype']!r}, which this reader does not "
                         "know")
    for field in ("shape", "data_offsets"):
        numbers = entry[field] if isinstance(entry[field], list) else [None]
        if not all(type(number) is int and 0 <= number < 2 ** 48 for number in numbers):
            raise ValueError(f"the {field} of {name!r} are no list of whole numbers from 0 on")
    if len(entry["data_offsets"]) != 2:
        raise ValueError(f"the data_offsets of {name!r} are not two")
    begin, end = entry["data_offsets"]
    needed = math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
    if end - begin != needed:
        raise ValueError(f"{name!r} of shape {entry['shape']} needs {needed} bytes and claims "
                         f"{end - begin}")


def check_name(name):
    """Raise ValueError for a name so long that looking for its parts would take long."""
    if len(name) > MAX_NAME:
        raise ValueError(f"{name[:40]!r}... is a name of {len(name):,} letters, where {MAX_NAME} "
                         "are the most")


def read_tensor(file, start, name, entry):
    """Read a tensor whose entry was checked; ValueError if not finite, or if the file ends."""
    begin, end = entry["data_offsets"]
    file.seek(start + begin)
    buffer = bytearray(file.read(end - begin))
    if len(buffer) < end - begin:
        raise ValueError(f"it ends within {name!r}")
    dtype = DTYPES[entry["dtype"]]
    tensor = torch.frombuffer(buffer, dtype=dtype) if buffer else torch.empty(0, dtype=dtype)
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise ValueError(f"{name!r} holds NaN or infinity")
    return tensor.reshape(entry["shape"])
