"""What a model is: ModelConfig and RopeConfig, and the strict JSON and key readers that every model file goes through.

Nothing here needs numpy. The dialects that fill a ModelConfig are in pyruntime.models (Hugging Face, GGUF).
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

from .errors import ModelFileError, UnsupportedModelError

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]
WeightType = Literal["bf16", "f16", "f32"]

# Bounds of every number that a model file may state, the same as in core/model/config.cc. They are far above any
# published model; their work is to keep products of two of them inside 64 bits and to stop a lying file before anything is allocated.
MAX_LAYERS: Final = 1024
MAX_HEADS: Final = 1024
MAX_D_MODEL: Final = 1 << 17
MAX_D_FF: Final = 1 << 20
MAX_VOCAB: Final = 1 << 24
MAX_POSITION: Final = 1 << 24
D_HEAD_RANGE: Final = (8, 256)


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding of a model, in the Hugging Face "rotate half" convention over the whole head.

    kind: how the frequencies `theta ** (-2 i / d_head)` are changed for long contexts.
    factor: stretch of the context, >= 1 (every kind but "default").
    original_max_position: context that the unscaled frequencies were trained for (dynamic, llama3, yarn; else 0).
    low_freq_factor, high_freq_factor: llama3's band limits.  beta_fast, beta_slow, truncate: yarn's ramp.
    attention_factor: multiplies cos and sin. 0 means the kind's own default, which is 1 for every kind but yarn;
    the readers always resolve yarn's to a number.
    """

    kind: RopeKind
    theta: float
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything the forward pass must know about a decoder of the Llama family.

    family: name of the file in models/ that read it; architecture: the name in the model's own files.
    max_position: positions that the file states (`context_length` adds what rope scaling allows).
    sliding_window: a query sees itself and the sliding_window - 1 tokens before it; 0 means no window.
    window_first_layer: layers with this index and above slide, those below see everything.
    dtype: the type that the weights are kept in unless the user asks for another.
    """

    family: str
    architecture: str
    n_layer: int
    h_q: int
    h_kv: int
    d_head: int
    d_model: int
    d_ff: int
    n_vocab: int
    max_position: int
    norm_eps: float
    tied_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int
    window_first_layer: int
    dtype: WeightType
    rope: RopeConfig

    @property
    def context_length(self) -> int:
        """Longest context that the model is made for, in tokens: max_position, stretched by dynamic or yarn scaling.

        linear and llama3 configs already state the stretched length as their max_position.
        """
        if self.rope.kind == "dynamic":
            return min(int(self.max_position * self.rope.factor), MAX_POSITION)
        if self.rope.kind == "yarn":
            return min(max(self.max_position, int(self.rope.original_max_position * self.rope.factor)), MAX_POSITION)
        return self.max_position

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of every tensor of the model. Weights are [out_features, in_features]."""
        q, kv = self.h_q * self.d_head, self.h_kv * self.d_head
        shapes: dict[str, tuple[int, ...]] = {"embed.weight": (self.n_vocab, self.d_model)}
        linear = {
            "q": (q, self.d_model, self.qkv_bias),
            "k": (kv, self.d_model, self.qkv_bias),
            "v": (kv, self.d_model, self.qkv_bias),
            "o": (self.d_model, q, self.o_bias),
            "gate": (self.d_ff, self.d_model, self.mlp_bias),
            "up": (self.d_ff, self.d_model, self.mlp_bias),
            "down": (self.d_model, self.d_ff, self.mlp_bias),
        }
        for i in range(self.n_layer):
            shapes[f"layers.{i}.attn_norm.weight"] = (self.d_model,)
            for name, (n_out, n_in, bias) in linear.items():
                shapes[f"layers.{i}.{name}.weight"] = (n_out, n_in)
                if bias:
                    shapes[f"layers.{i}.{name}.bias"] = (n_out,)
            if self.qk_norm:
                shapes[f"layers.{i}.q_norm.weight"] = (self.d_head,)
                shapes[f"layers.{i}.k_norm.weight"] = (self.d_head,)
            shapes[f"layers.{i}.ffn_norm.weight"] = (self.d_model,)
        shapes["norm.weight"] = (self.d_model,)
        if not self.tied_embeddings:
            shapes["lm_head.weight"] = (self.n_vocab, self.d_model)
        return shapes


@dataclass(frozen=True, slots=True)
class Family:
    """One file of models/: how a model family names itself and how its Hugging Face config is read.

    architecture, model_type: config.json's `architectures[0]` and `model_type`.
    gguf_architecture: `general.architecture` in GGUF files, or None where GGUF uses another family's.
    gguf_permuted: whether GGUF stores Q and K rows interleaved, to be put back into halves.
    """

    name: str
    architecture: str
    model_type: str
    read_config: Callable[[KeyReader], ModelConfig]
    gguf_architecture: str | None = None
    gguf_permuted: bool = False
    qk_norm: bool = False


def check_config(config: ModelConfig, where: str) -> ModelConfig:
    """Checks what ties two numbers of a config together and returns it. `where` starts the message of an error."""
    if config.h_q % config.h_kv:
        raise ModelFileError(f"{where}: {config.h_q} attention heads are not a multiple of {config.h_kv} key-value heads.")
    low, high = D_HEAD_RANGE
    if config.d_head % 2 or not low <= config.d_head <= high:
        raise UnsupportedModelError(f"{where}: the head dimension is {config.d_head}; supported are even ones from {low} to {high}.")
    rope = config.rope
    if rope.kind == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        raise ModelFileError(
            f"{where}: high_freq_factor is {rope.high_freq_factor}, expected more than low_freq_factor, {rope.low_freq_factor}."
        )
    if rope.kind == "yarn" and rope.beta_fast < rope.beta_slow:
        raise ModelFileError(f"{where}: beta_fast is {rope.beta_fast}, expected at least beta_slow, {rope.beta_slow}.")
    return config


def show(value: object) -> str:
    """repr of a value from a file, cut to a length that fits an error message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def open_size(path: Path) -> int:
    """Size in bytes of a regular file (symlinks followed). Anything else, a pipe say, is a ModelFileError."""
    try:
        info = os.stat(path)
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    if not stat.S_ISREG(info.st_mode):
        raise ModelFileError(f"{path}: is not a regular file.")
    return info.st_size


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """Reads a JSON object from a file of at most `limit` bytes, strictly (see parse_json)."""
    size = open_size(path)
    if size > limit:
        raise ModelFileError(f"{path}: has {size:,} bytes, expected at most {limit:,}.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror}).") from error
    return parse_json(data, str(path))


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """Parses a JSON object; duplicate keys, NaN, infinities, bad UTF-8 and bottomless nesting are ModelFileErrors."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(items)
        if len(out) != len(items):
            seen: set[str] = set()
            twice = next(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ModelFileError(f"{where}: the key {show(twice)} occurs twice in one object.")
        return out

    def constant(text: str) -> NoReturn:
        raise ModelFileError(f"{where}: holds the number {text}, which JSON does not allow.")

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ModelFileError(f"{where}: the number {show(text)} is too large.")
        return value

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant, parse_float=finite)
    except RecursionError:
        raise ModelFileError(f"{where}: the JSON is nested too deeply.") from None
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{where}: is not UTF-8 (byte {error.start}).") from error
    except ValueError as error:  # JSONDecodeError, or an integer with thousands of digits
        raise ModelFileError(f"{where}: is not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{where}: expected a JSON object, found {show(value)}.")
    return value


class KeyReader:
    """Strict reader of one object of a model file: a key that nobody asked for is refused by name at `finish`.

    Every method marks its key as understood. A missing or null key gives the default as it is; without a default it
    is an error.
    Numbers out of range and wrong types are ModelFileErrors, values that change the computation in a way that is not
    implemented are UnsupportedModelErrors.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where
        self._understood: set[str] = set()

    def get(self, key: str) -> Any:
        """The raw value, None if missing."""
        self._understood.add(key)
        return self.values.get(key)

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.values.get(key) is not None

    def understands(self, key: str) -> bool:
        """Whether the key has been read already."""
        return key in self._understood

    def _missing(self, key: str) -> NoReturn:
        raise ModelFileError(f"{self.where}: the key {key!r} is missing.")

    def _wrong(self, key: str, value: object, expected: str) -> NoReturn:
        raise ModelFileError(f"{self.where}: {key!r} is {show(value)}, expected {expected}.")

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value: object = self.get(key)
        if value is None:
            return self._missing(key) if default is None else default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self._wrong(key, value, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        value = self.get(key)
        if value is None:
            return self._missing(key) if default is None else default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            self._wrong(key, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def boolean(self, key: str, default: bool | None = None) -> bool:
        value = self.get(key)
        if value is None:
            return self._missing(key) if default is None else default
        if not isinstance(value, bool):
            self._wrong(key, value, "true or false")
        return value

    def string(self, key: str, default: str | None = None) -> str:
        value = self.get(key)
        if value is None:
            return self._missing(key) if default is None else default
        if not isinstance(value, str):
            self._wrong(key, value, "a string")
        return value

    def neutral(self, key: str, *allowed: Any) -> None:
        """A key that is implemented for some values only: missing, null or one of `allowed`."""
        value = self.get(key)
        # 1 and 1.0 say the same thing in JSON, true and 1 do not.
        if value is None or any(isinstance(value, bool) == isinstance(a, bool) and value == a for a in allowed):
            return
        only = ", ".join(show(a) for a in allowed) or "null"
        raise UnsupportedModelError(f"{self.where}: {key!r} is {show(value)}; only {only} is supported.")

    def harmless(self, keys: Iterable[str]) -> None:
        """Keys that cannot change what the model computes."""
        self._understood.update(keys)

    def finish(self) -> None:
        """Refuses the first key that was not understood. Keys that start with "_" are private notes of the writer."""
        for key in self.values:
            if key not in self._understood and not key.startswith("_"):
                raise UnsupportedModelError(
                    f"{self.where}: the key {show(key)} (value {show(self.values[key])}) is not understood "
                    "and may change what the model computes."
                )
