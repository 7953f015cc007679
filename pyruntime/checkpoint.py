"""open_checkpoint: a Hugging Face folder or a GGUF file as a config, tensors by canonical name, and tokenizer data."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from .config import KeyReader, ModelConfig, open_size, read_json, show
from .errors import InvalidArgumentError, ModelFileError, ModelNotFoundError, UnsupportedModelError
from .safetensors import INDEX_NAME, LOADABLE, SINGLE_NAME, FileTensor, read_folder, read_header

if TYPE_CHECKING:
    from .gguf import ArrayTensor, GgufFile, GgufTokenizerMetadata

MAX_CONFIG: Final = 1 << 20
MAX_TOKENIZER: Final = 256 << 20
_SHARD: Final = re.compile(r".*-\d{5}-of-\d{5}\.safetensors")
# Rotation tables that old checkpoints carry; they follow from the config.
_ROTARY_BUFFER: Final = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """The tokenizer's files of a Hugging Face folder, None where missing. Their sizes are within MAX_TOKENIZER."""

    tokenizer: Path | None
    tokenizer_config: Path | None
    chat_template: Path | None


@dataclass(slots=True)
class Checkpoint:
    """A model on disk, with everything but the tensors' bytes read and checked.

    path: the folder or the .gguf file.
    tensors: canonical name -> where it is; exactly the names and shapes of config.tensor_shapes(). Both kinds have
        `shape` and `read(row_begin, row_end) -> float32`; a FileTensor can also be read as it lies in the file.
    generation_config: the known keys of generation_config.json, typed and in range: do_sample, temperature, top_p,
        top_k, min_p, repetition_penalty, max_new_tokens, ... For GGUF from `general.sampling.*`.
    bos_id, eos_ids, pad_id: from generation_config.json, else config.json; for GGUF from its tokenizer.
    tokenizer_files: for safetensors.  gguf_tokenizer: for gguf, None if the file has none.
    """

    path: Path
    kind: Literal["safetensors", "gguf"]
    config: ModelConfig
    tensors: dict[str, FileTensor | ArrayTensor]
    generation_config: dict[str, Any]
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None
    tokenizer_files: TokenizerFiles = field(default_factory=lambda: TokenizerFiles(None, None, None))
    gguf_tokenizer: GgufTokenizerMetadata | None = None

    def close(self) -> None:
        """Forgets the tensors and the tokenizer's metadata. No file is held open, so this frees memory only."""
        self.tensors = {}
        self.gguf_tokenizer = None

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a Hugging Face folder, a .safetensors file in one, or a .gguf file, and checks all but the tensors' bytes.

    ModelNotFoundError: nothing is there. ModelFileError: a file is damaged, incomplete or untrue; the message starts
    with its path. UnsupportedModelError: the model computes something that is not implemented, which the message names.
    """
    if not isinstance(path, (str, os.PathLike)) or "\0" in os.fsdecode(path) or not os.fsdecode(path):
        raise InvalidArgumentError(f"path is {show(path)}, expected the path of a folder or file.")
    where = Path(os.fsdecode(path))
    try:
        is_folder, exists = where.is_dir(), where.exists()
    except OSError as error:
        raise ModelFileError(f"{where}: cannot be read ({error.strerror}).") from error
    if not exists:
        raise ModelNotFoundError(f"{where}: there is no such file or folder.")
    if is_folder:
        return _open_folder(where)
    if where.suffix == ".gguf":
        return _open_gguf(where)
    if where.suffix == ".safetensors":
        single = None if where.name == SINGLE_NAME or _SHARD.fullmatch(where.name) else where
        return _open_folder(where.parent, single)
    raise ModelFileError(f"{where}: expected a folder, a .safetensors file or a .gguf file.")


def _open_folder(folder: Path, single: Path | None = None) -> Checkpoint:
    """single: a weights file to take in place of the folder's own."""
    from .models import read_config
    from .models.huggingface import tensor_name

    config_path = folder / "config.json"
    if not config_path.exists():
        return _open_without_config(folder)
    values = read_json(config_path, MAX_CONFIG)
    config = read_config(values, str(config_path))
    if single is None:
        _require_weights(folder)
    found = read_header(single) if single is not None else read_folder(folder)
    tensors = bind_tensors(config, tensor_name, found, single or folder)
    for name, tensor in tensors.items():
        if tensor.dtype not in LOADABLE:
            raise UnsupportedModelError(
                f"{tensor.path}: tensor {show(tensor.name)} has dtype {tensor.dtype}; supported are F32, F16 and BF16."
            )
        if name == "embed.weight" and values.get("dtype") is None and values.get("torch_dtype") is None:
            config = replace(config, dtype=LOADABLE[tensor.dtype])
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path, MAX_CONFIG) if generation_path.exists() else {}
    ids = {key: _token_ids(values, key, config.n_vocab, config_path) for key in _TOKEN_KEYS}
    for key in _TOKEN_KEYS:
        if generation.get(key) is not None:
            ids[key] = _token_ids(generation, key, config.n_vocab, generation_path)
    return Checkpoint(
        path=folder,
        kind="safetensors",
        config=config,
        tensors={**tensors},
        generation_config=read_generation_config(generation, str(generation_path)),
        bos_id=next(iter(ids["bos_token_id"]), None),
        eos_ids=ids["eos_token_id"],
        pad_id=next(iter(ids["pad_token_id"]), None),
        tokenizer_files=_find_tokenizer(folder),
    )


def _open_without_config(folder: Path) -> Checkpoint:
    """A folder without config.json may still hold one GGUF file; anything else is explained."""
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise ModelFileError(f"{folder}: cannot be read ({error.strerror}).") from error
    ggufs = [name for name in names if name.endswith(".gguf")]
    if len(ggufs) == 1:
        return _open_gguf(folder / ggufs[0])
    if ggufs:
        some = ", ".join(ggufs[:4]) + (", ..." if len(ggufs) > 4 else "")
        raise ModelFileError(f"{folder}: holds {len(ggufs)} GGUF files ({some}); name one of them.")
    if not names:
        raise ModelFileError(f"{folder}: the folder is empty, expected config.json and {SINGLE_NAME}.")
    raise ModelFileError(f"{folder}: config.json is missing, expected a Hugging Face model folder or a .gguf file.")


def _require_weights(folder: Path) -> None:
    if (folder / SINGLE_NAME).exists() or (folder / INDEX_NAME).exists():
        return
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        if (folder / name).exists():
            raise ModelFileError(f"{folder}: has only {name}, a pickle that can run any code; convert the weights to {SINGLE_NAME}.")
    raise ModelFileError(f"{folder}: has no weights, expected {SINGLE_NAME} or {INDEX_NAME}.")


def bind_tensors(config: ModelConfig, tensor_name: Callable[[str], str], found: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Canonical name -> tensor of the file. A missing, extra or mis-shaped tensor is a ModelFileError with both shapes.

    tensor_name: canonical name -> the file's.  found: tensors of the file, with `shape` and `path`.
    Ignored, if there: rotation tables, and the output matrix of a model whose config says that it is the embedding.
    """
    bound: dict[str, Any] = {}
    expected = {tensor_name(name): (name, shape) for name, shape in config.tensor_shapes().items()}
    for file_name, (name, shape) in expected.items():
        if file_name not in found:
            raise ModelFileError(f"{path}: tensor {file_name!r} of shape {list(shape)} is missing.")
        if found[file_name].shape != shape:
            raise ModelFileError(
                f"{found[file_name].path}: tensor {file_name!r} has shape {show(list(found[file_name].shape))}, "
                f"expected {list(shape)} from the config."
            )
        bound[name] = found[file_name]
    for file_name, tensor in found.items():
        unused = _ROTARY_BUFFER.fullmatch(file_name) or (config.tied_embeddings and file_name == "lm_head.weight")
        if file_name not in expected and not unused:
            raise ModelFileError(
                f"{tensor.path}: tensor {show(file_name)} of shape {show(list(tensor.shape))} is not part of a "
                f"{config.architecture} with this config."
            )
    return bound


def _open_gguf(path: Path) -> Checkpoint:
    from .gguf import ArrayTensor, file_tensor, read_gguf, read_tokenizer_metadata
    from .models.gguf import ROPE_FREQS, interleaved_heads, read_config, tensor_name

    file = read_gguf(path)
    family, config = read_config(file)
    found = {name: tensor for name, tensor in file.tensors.items() if name != ROPE_FREQS}
    tensors: dict[str, FileTensor | ArrayTensor] = {}
    for name, tensor in bind_tensors(config, tensor_name, found, path).items():
        heads = interleaved_heads(name, family, config)
        tensors[name] = (None if heads else file_tensor(tensor)) or ArrayTensor(tensor, heads)
    tokenizer = read_tokenizer_metadata(file, config.n_vocab)
    eos = () if tokenizer is None else (tokenizer.eos_id, tokenizer.eot_id)
    return Checkpoint(
        path=path,
        kind="gguf",
        config=config,
        tensors=tensors,
        generation_config=_gguf_sampling(file),
        bos_id=tokenizer.bos_id if tokenizer else None,
        eos_ids=tuple(dict.fromkeys(i for i in eos if i is not None)),
        pad_id=tokenizer.pad_id if tokenizer else None,
        gguf_tokenizer=tokenizer,
    )


_TOKEN_KEYS: Final = ("bos_token_id", "eos_token_id", "pad_token_id")

# Sampling defaults: key -> (lowest, highest). Integers where both bounds are.
_GENERATION: Final[dict[str, tuple[float, float]]] = {
    "temperature": (0.0, 100.0),
    "top_p": (1e-6, 1.0),
    "top_k": (0, 1 << 31),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-3, 100.0),
    "presence_penalty": (-100.0, 100.0),
    "frequency_penalty": (-100.0, 100.0),
    "max_new_tokens": (0, 1 << 31),
    "max_length": (0, 1 << 62),
}


def read_generation_config(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keys that sampling understands, typed and in range; others only steer other ways of decoding."""
    keys = KeyReader(values, where)
    out: dict[str, Any] = {}
    for key, (low, high) in _GENERATION.items():
        if keys.has(key):
            whole = isinstance(low, int) and isinstance(high, int)
            out[key] = keys.integer(key, int(low), int(high)) if whole else keys.number(key, low, high)
    if keys.has("do_sample"):
        out["do_sample"] = keys.boolean("do_sample")
    return out


def _token_ids(values: Mapping[str, Any], key: str, n_vocab: int, path: Path) -> tuple[int, ...]:
    """A token id or a list of them. Padding is never computed, so one outside the vocabulary, -1 say, is none."""
    value = values.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if key == "pad_token_id" and all(type(i) is int for i in ids):
        ids = [i for i in ids if 0 <= i < n_vocab]
    if len(ids) > 1024 or not all(type(i) is int and 0 <= i < n_vocab for i in ids):
        raise ModelFileError(f"{path}: {key!r} is {show(value)}, expected a token id from 0 to {n_vocab - 1} or a list of them.")
    return tuple(ids)


def _gguf_sampling(file: GgufFile) -> dict[str, Any]:
    """`general.sampling.*` under the names of generation_config.json."""
    names = {"temp": "temperature", "penalty_repeat": "repetition_penalty"}
    names |= {name: name for name in ("top_k", "top_p", "min_p")}
    prefix = "general.sampling."
    values = {names[k.removeprefix(prefix)]: v for k, v in file.metadata.items() if k.removeprefix(prefix) in names}
    return read_generation_config(values, f"{file.path}: {prefix}*")


def _find_tokenizer(folder: Path) -> TokenizerFiles:
    def find(*names: str) -> Path | None:
        for name in names:
            if (folder / name).exists():
                size = open_size(folder / name)
                if size > MAX_TOKENIZER:
                    raise ModelFileError(f"{folder / name}: has {size:,} bytes, expected at most {MAX_TOKENIZER:,}.")
                return folder / name
        return None

    return TokenizerFiles(
        tokenizer=find("tokenizer.json"),
        tokenizer_config=find("tokenizer_config.json"),
        chat_template=find("chat_template.jinja", "chat_template.json"),
    )
