"""GGUF files: a bounded reader of the header, tensors that dequantise row by row, and the raw tokenizer metadata.

The header is read here, not by the `gguf` package's GGUFReader: that one believes every count in the file, and takes
5.2 s where this takes 0.2 s (a vocabulary of 49,152, because it keeps several numpy views per string). The package
supplies the numbers of the tensor types and the dequantisation.
"""

from __future__ import annotations

import array
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .config import MAX_VOCAB, KeyReader, open_size, show
from .errors import ModelFileError, UnsupportedModelError
from .safetensors import FileTensor, read_range

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MAX_HEADER: Final = 256 << 20  # Llama 3's header, with 128,256 tokens and 280,147 merges, has 7.8 MB
MAX_ITEMS: Final = 1 << 24  # metadata keys, tensors, or elements of one array
MAX_DIMS: Final = 4
LOADABLE: Final = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")

# Value type number -> struct format; 7 is bool, 8 string, 9 array.
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor as it lies in a GGUF file.

    type_name: ggml's name of the type, one of LOADABLE.  shape: row-major, so the file's dimensions reversed.
    offset: from the beginning of the file.  row_bytes: bytes of a row, or of one element of a vector.
    """

    name: str
    type_name: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    row_bytes: int

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return self.row_bytes * _rows(self.shape)


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The checked header of a GGUF file. Arrays in `metadata` are lists of str or `array.array`s."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


@dataclass(frozen=True, slots=True)
class GgufTokenizerMetadata:
    """`tokenizer.*` of a GGUF file, types and lengths checked but not interpreted. Ids are below n_vocab or None."""

    tokens: list[str]
    merges: list[str]
    token_types: list[int]
    scores: list[float] | None
    model: str
    pre: str | None
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    pad_id: int | None
    eot_id: int | None
    add_bos: bool | None
    add_eos: bool | None
    chat_template: str | None
    n_vocab: int
    add_space_prefix: bool | None = None


class ArrayTensor:
    """A tensor that must be computed from its file: dequantised, and its rows put in order if they are interleaved.

    name: its name in the file.  shape: row-major.
    n_head: 0, or the number of heads whose rows the file holds interleaved for rope (Llama's Q and K).
    """

    def __init__(self, source: GgufTensor, n_head: int = 0) -> None:
        self.name = source.name
        self.shape = source.shape
        self.type_name = source.type_name
        self._source = source
        self._head_rows = source.shape[0] // n_head if n_head else 0

    def read(self, row_begin: int = 0, row_end: int | None = None) -> npt.NDArray[np.float32]:
        """Rows [row_begin, row_end) as a new float32 array [row_end - row_begin, ...]; memory is a few times that."""
        row_end = self.shape[0] if row_end is None else row_end
        if not 0 <= row_begin <= row_end <= self.shape[0]:
            raise IndexError(f"{self.name}: rows {row_begin} to {row_end} of {self.shape[0]}")
        if not self._head_rows:
            return self._dequantise(row_begin, row_end)
        d = self._head_rows
        first, last = row_begin // d * d, -(-row_end // d) * d
        rows = self._dequantise(first, last)
        pairs = rows.reshape((last - first) // d, d // 2, 2, *self.shape[1:])
        halves: npt.NDArray[np.float32] = pairs.swapaxes(1, 2).reshape(rows.shape)
        return halves[row_begin - first : row_end - first]

    def _dequantise(self, row_begin: int, row_end: int) -> npt.NDArray[np.float32]:
        import numpy as np
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        source, n_row = self._source, row_end - row_begin
        raw = read_range(source.path, source.offset + row_begin * source.row_bytes, n_row * source.row_bytes)
        shape = (n_row, *self.shape[1:])
        if n_row == 0:
            return np.zeros(shape, np.float32)
        blocks = np.frombuffer(raw, np.uint8).reshape(n_row, source.row_bytes)
        with np.errstate(all="ignore"):
            out = dequantize(blocks, GGMLQuantizationType[source.type_name])
        if not out.flags.writeable:  # F32 comes back as a view of `raw`
            out = out.copy()
        rows: npt.NDArray[np.float32] = out.reshape(shape)
        return rows


def file_tensor(source: GgufTensor) -> FileTensor | None:
    """The tensor as a FileTensor where the file holds it unquantised, else None."""
    if source.type_name not in ("F32", "F16", "BF16"):
        return None
    return FileTensor(source.name, source.type_name, source.shape, source.path, source.offset, source.nbytes)


def _rows(shape: tuple[int, ...]) -> int:
    rows = 1
    for n in shape[:-1] if len(shape) > 1 else shape:
        rows *= n
    return rows


class _Cursor:
    """Reads the header front to back; whatever reaches past the end of the file is a ModelFileError."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.at = 0
        self.end = min(len(data), MAX_HEADER)

    def take(self, nbytes: int, what: str) -> int:
        """Steps over `nbytes` bytes and returns where they begin."""
        begin = self.at
        if nbytes > self.end - begin:
            limit = "the end of the file" if self.end < MAX_HEADER else f"{MAX_HEADER:,} bytes of header"
            raise ModelFileError(f"{self.path}: {what} at byte {begin} needs {nbytes:,} bytes and reaches past {limit}.")
        self.at = begin + nbytes
        return begin

    def scalar(self, fmt: str, what: str) -> Any:
        return struct.unpack_from("<" + fmt, self.data, self.take(struct.calcsize(fmt), what))[0]

    def count(self, what: str) -> int:
        value: int = self.scalar("Q", what)
        if value > MAX_ITEMS:
            raise ModelFileError(f"{self.path}: {what} is {value:,}, expected at most {MAX_ITEMS:,}.")
        return value

    def string(self, what: str) -> str:
        length: int = self.scalar("Q", what)
        begin = self.take(length, what)
        try:
            return self.data[begin : begin + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelFileError(f"{self.path}: {what} at byte {begin} is not UTF-8.") from error

    def value(self, key: str) -> Any:
        """One metadata value: bool, int, float, str, list of str, or array.array."""
        what = f"the value of {show(key)}"
        kind = self.scalar("I", what)
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            value = self.scalar(self._format(kind, what), what)
            return bool(value) if kind == _BOOL else shortest(value) if kind == 6 else value
        kind = self.scalar("I", what)
        n = self.count(f"the length of {show(key)}")
        if kind == _STRING:
            return [self.string(what) for _ in range(n)]
        fmt = self._format(kind, what)
        nbytes = n * struct.calcsize(fmt)
        begin = self.take(nbytes, what)
        return array.array(fmt, self.data[begin : begin + nbytes])

    def _format(self, kind: int, what: str) -> str:
        if kind not in _SCALARS:
            raise ModelFileError(f"{self.path}: {what} has type {kind}, which GGUF does not define or nests arrays.")
        return _SCALARS[kind]


def shortest(value: float) -> float:
    """The shortest decimal that a float32 stands for: 1e-05 for 9.999999747378752e-06, as config.json would say."""
    short = float(f"{value:.7g}")
    return short if struct.pack("<f", short) == struct.pack("<f", value) else value


def read_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Reads and checks the header of a GGUF file, versions 2 and 3, little-endian, not split.

    Every count and length is checked against the file's size, tensors must be inside the file, aligned, and must not
    overlap; what is wrong is a ModelFileError that starts with the path. Types that cannot be dequantised are
    UnsupportedModelErrors.
    """
    path = Path(path)
    size = open_size(path)
    if size < 24:
        raise ModelFileError(f"{path}: has {size} bytes, too few for a GGUF file.")
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read_header(_Cursor(path, data))
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror}).") from error


def _read_header(cursor: _Cursor) -> GgufFile:
    path = cursor.path
    magic = cursor.data[cursor.take(4, "the magic") : 4]
    if magic != b"GGUF":
        raise ModelFileError(f"{path}: starts with {show(magic)}, expected b'GGUF'.")
    version = cursor.scalar("I", "the version")
    if version not in (2, 3):
        big = " (it may be big-endian)" if version & 0xFFFF == 0 else ""
        raise UnsupportedModelError(f"{path}: has GGUF version {version}{big}; supported are 2 and 3.")
    n_tensor, n_key = cursor.count("the number of tensors"), cursor.count("the number of metadata keys")
    metadata: dict[str, Any] = {}
    for _ in range(n_key):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise ModelFileError(f"{path}: the metadata key {show(key)} occurs twice.")
        metadata[key] = cursor.value(key)
    if metadata.get("split.count", 1) not in (0, 1):
        raise UnsupportedModelError(
            f"{path}: is one of {show(metadata['split.count'])} parts; join them first with llama-gguf-split --merge."
        )
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment not in [1 << i for i in range(17)]:
        raise ModelFileError(f"{path}: 'general.alignment' is {show(alignment)}, expected a power of two to 65536.")
    entries = [_read_tensor(cursor) for _ in range(n_tensor)]
    data_begin = -(-cursor.at // alignment) * alignment
    return GgufFile(path, metadata, _place(path, entries, data_begin, alignment, len(cursor.data)))


def _read_tensor(cursor: _Cursor) -> GgufTensor:
    """One tensor entry, its offset still relative to the data."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    name = cursor.string("a tensor name")
    where = f"{cursor.path}: tensor {show(name)}"
    n_dim = cursor.scalar("I", "a number of dimensions")
    if not 1 <= n_dim <= MAX_DIMS:
        raise ModelFileError(f"{where}: has {n_dim} dimensions, expected 1 to {MAX_DIMS}.")
    dims = [cursor.scalar("Q", "a dimension") for _ in range(n_dim)]
    number = cursor.scalar("I", "a tensor type")
    offset = cursor.scalar("Q", "a tensor offset")
    if not all(0 < n < 1 << 40 for n in dims):
        raise ModelFileError(f"{where}: has the dimensions {dims}, expected numbers from 1 to 2^40.")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise UnsupportedModelError(f"{where}: has type number {number}; supported are {', '.join(LOADABLE)}.") from None
    if kind.name not in LOADABLE:
        raise UnsupportedModelError(f"{where}: has type {kind.name}; supported are {', '.join(LOADABLE)}.")
    block, block_bytes = GGML_QUANT_SIZES[kind]
    row = dims[0] if n_dim > 1 else 1
    if row % block:
        raise ModelFileError(f"{where}: has rows of {row} elements, expected a multiple of {kind.name}'s {block}.")
    return GgufTensor(name, kind.name, tuple(reversed(dims)), cursor.path, offset, row // block * block_bytes)


def _place(path: Path, entries: list[GgufTensor], data: int, alignment: int, size: int) -> dict[str, GgufTensor]:
    """Tensors by name with absolute offsets, all inside the file, none over another."""
    tensors: dict[str, GgufTensor] = {}
    end = 0
    for t in sorted(entries, key=lambda t: t.offset):
        where = f"{path}: tensor {show(t.name)}"
        if t.name in tensors:
            raise ModelFileError(f"{where}: occurs twice.")
        if t.offset % alignment or t.offset < end:
            raise ModelFileError(f"{where}: starts at byte {t.offset} of the data, expected a multiple of {alignment} from {end} on.")
        end = t.offset + t.nbytes
        if data + end > size:
            raise ModelFileError(
                f"{where}: {t.type_name} of shape {list(t.shape)} ends at byte {data + end:,}, but the file has {size:,} bytes."
            )
        tensors[t.name] = GgufTensor(t.name, t.type_name, t.shape, path, data + t.offset, t.row_bytes)
    return tensors


def read_tokenizer_metadata(file: GgufFile, n_vocab: int) -> GgufTokenizerMetadata | None:
    """The tokenizer of a GGUF file whose embedding has `n_vocab` rows; None if the file has no tokenizer."""
    keys = KeyReader(file.metadata, str(file.path))
    if not keys.has("tokenizer.ggml.model") and not keys.has("tokenizer.ggml.tokens"):
        return None
    tokens = _array(file, "tokenizer.ggml.tokens", str)
    types = _array(file, "tokenizer.ggml.token_type", int)
    scores = _array(file, "tokenizer.ggml.scores", float)
    if len(tokens) != n_vocab:
        raise ModelFileError(f"{file.path}: has {len(tokens)} tokens, expected {n_vocab}, the rows of the embedding.")
    for name, values in (("token_type", types), ("scores", scores)):
        if values and len(values) != n_vocab:
            raise ModelFileError(f"{file.path}: 'tokenizer.ggml.{name}' has {len(values)} values, expected {n_vocab}.")

    def token_id(name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        # -1, as some writers store it, is no token.
        if keys.get(key) in (None, -1, 0xFFFFFFFF):
            return None
        return keys.integer(key, 0, min(n_vocab, MAX_VOCAB) - 1)

    def flag(name: str) -> bool | None:
        key = f"tokenizer.ggml.{name}"
        return keys.boolean(key) if keys.has(key) else None

    def text(key: str) -> str | None:
        return keys.string(key) if keys.has(key) else None

    return GgufTokenizerMetadata(
        tokens=tokens,
        merges=_array(file, "tokenizer.ggml.merges", str),
        token_types=types,
        scores=scores or None,
        model=keys.string("tokenizer.ggml.model"),
        pre=text("tokenizer.ggml.pre"),
        bos_id=token_id("bos"),
        eos_id=token_id("eos"),
        unk_id=token_id("unknown"),
        pad_id=token_id("padding"),
        eot_id=token_id("eot"),
        add_bos=flag("add_bos_token"),
        add_eos=flag("add_eos_token"),
        chat_template=text("tokenizer.chat_template"),
        n_vocab=n_vocab,
        add_space_prefix=flag("add_space_prefix"),
    )


def _array(file: GgufFile, key: str, item: type) -> list[Any]:
    """An array of the metadata as a list, empty if missing."""
    value = file.metadata.get(key, [])
    if not isinstance(value, (list, array.array)) or not all(isinstance(v, item) for v in value[:1]):
        raise ModelFileError(f"{file.path}: {key!r} is {show(value)}, expected an array of {item.__name__}.")
    return list(value)
