"""Where each tensor of a safetensors checkpoint lies, with every statement of the file checked before it is used.

Only headers are read here. The format: 8 bytes of little-endian header length, a JSON header, then the tensors' bytes.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .config import WeightType, open_size, parse_json, read_json, show
from .errors import ModelFileError, UnsupportedModelError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MAX_HEADER: Final = 100_000_000
MAX_INDEX: Final = 64 << 20
INDEX_NAME: Final = "model.safetensors.index.json"
SINGLE_NAME: Final = "model.safetensors"

# Bits per element of every dtype that the format defines.
DTYPE_BITS: Final = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
}  # fmt: skip
# What can be loaded, and what this package calls it.
LOADABLE: Final[dict[str, WeightType]] = {"F32": "f32", "F16": "f16", "BF16": "bf16"}

_SHARD_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,240}\.safetensors", re.ASCII)


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor that lies in a file as it is: row-major, little-endian, `nbytes` bytes from byte `offset` of `path`.

    name: its name in the file.  dtype: in safetensors' words, "F32", "F16", "BF16", ...
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int

    def read(self, row_begin: int = 0, row_end: int | None = None) -> npt.NDArray[np.float32]:
        """Rows [row_begin, row_end) of the first dimension as float32 [row_end - row_begin, ...]."""
        import numpy as np

        row_end = self.shape[0] if row_end is None else row_end
        row_bytes = self.nbytes // max(self.shape[0], 1)
        raw = read_range(self.path, self.offset + row_begin * row_bytes, (row_end - row_begin) * row_bytes)
        shape = (row_end - row_begin, *self.shape[1:])
        if self.dtype == "BF16":
            return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
        if self.dtype not in LOADABLE:
            raise UnsupportedModelError(f"{self.path}: tensor {show(self.name)} has dtype {self.dtype}; supported are F32, F16 and BF16.")
        return np.frombuffer(raw, np.float16 if self.dtype == "F16" else np.float32).astype(np.float32).reshape(shape)


def read_range(path: Path, offset: int, nbytes: int) -> bytes:
    """Exactly `nbytes` bytes from `offset`; a file that has become shorter since it was checked is a ModelFileError."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            raw = file.read(nbytes)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror}).") from error
    if len(raw) != nbytes:
        raise ModelFileError(f"{path}: ends {nbytes - len(raw)} bytes before byte {offset + nbytes}; was it changed?")
    return raw


def read_header(path: str | os.PathLike[str]) -> dict[str, FileTensor]:
    """The tensors of one safetensors file by name, in the order of their offsets.

    Checked: header length, JSON, duplicate keys, dtypes, shapes, byte lengths, and that the tensors lie one after the
    other from the end of the header to the end of the file. What is wrong is a ModelFileError, the path first.
    """
    path = Path(path)
    size = open_size(path)
    if size < 8:
        raise ModelFileError(f"{path}: has {size} bytes, too few for a safetensors file.")
    length = int.from_bytes(read_range(path, 0, 8), "little")
    if length > min(MAX_HEADER, size - 8):
        raise ModelFileError(
            f"{path}: states a header of {length:,} bytes, expected at most {min(MAX_HEADER, size - 8):,} in a file of {size:,} bytes."
        )
    raw = read_range(path, 8, length)
    if not raw.startswith(b"{"):
        raise ModelFileError(f"{path}: the header starts with {show(raw[:8])}, expected '{{'.")
    header = parse_json(raw, f"{path}: header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelFileError(f"{path}: '__metadata__' is {show(metadata)}, expected an object of strings.")
    data = 8 + length
    tensors = [_read_entry(path, name, entry, data) for name, entry in header.items()]
    tensors.sort(key=lambda t: (t.offset, t.nbytes))
    end = data
    for t in tensors:
        if t.offset != end:
            what = "leaves a hole after" if t.offset > end else "overlaps"
            raise ModelFileError(
                f"{path}: tensor {show(t.name)} starts at byte {t.offset - data} of the data, which {what} the tensor "
                f"that ends at byte {end - data}."
            )
        end += t.nbytes
    if end != size:
        raise ModelFileError(f"{path}: the tensors end at byte {end:,} of the file, but the file has {size:,} bytes.")
    return {t.name: t for t in tensors}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _read_entry(path: Path, name: str, entry: Any, data: int) -> FileTensor:
    """One entry of the header. data: where in the file the tensors' bytes start."""
    where = f"{path}: tensor {show(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ModelFileError(f"{where}: the header says {show(entry)}, expected dtype, shape and data_offsets.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ModelFileError(f"{where}: the dtype is {show(dtype)}, which safetensors does not define.")
    if not isinstance(shape, list) or len(shape) > 32 or not all(map(_is_count, shape)):
        raise ModelFileError(f"{where}: the shape is {show(shape)}, expected a list of at most 32 counts.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)) or offsets[0] > offsets[1]:
        raise ModelFileError(f"{where}: data_offsets is {show(offsets)}, expected [begin, end].")
    nbytes = offsets[1] - offsets[0]
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != nbytes * 8:
        raise ModelFileError(
            f"{where}: data_offsets {offsets} hold {nbytes} bytes, but {dtype} of shape {show(shape)} needs {show(bits // 8)}."
        )
    return FileTensor(name, dtype, tuple(shape), path, data + offsets[0], nbytes)


def read_folder(folder: Path) -> dict[str, FileTensor]:
    """The tensors of a Hugging Face folder: its model.safetensors, or all shards that its index names."""
    if (folder / SINGLE_NAME).exists():
        return read_header(folder / SINGLE_NAME)
    return read_index(folder / INDEX_NAME)


def read_index(path: Path) -> dict[str, FileTensor]:
    """The tensors of all shards of a model.safetensors.index.json, whose shards are plain file names beside it."""
    weight_map = read_json(path, MAX_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(f"{path}: 'weight_map' is {show(weight_map)}, expected an object of tensor names.")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise ModelFileError(
                f"{path}: tensor {show(name)} is said to be in {show(shard)}, expected the plain name of a .safetensors file."
            )
    tensors: dict[str, FileTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if not (path.parent / shard).exists():
            raise ModelFileError(f"{path}: the shard {shard} is missing from {path.parent}; download the model again.")
        for name, tensor in read_header(path.parent / shard).items():
            if name in tensors:
                both = f"{tensors[name].path.name} and {shard}"
                raise ModelFileError(f"{path}: tensor {show(name)} is in two shards, {both}.")
            tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].path.name != shard:
            found = f"it is in {tensors[name].path.name}" if name in tensors else "no shard has it"
            raise ModelFileError(f"{path}: tensor {show(name)} is said to be in {shard}, but {found}.")
    return tensors
