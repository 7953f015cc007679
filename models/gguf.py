"""What the families share of GGUF: metadata to ModelConfig, and ggml's tensor names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

from pyruntime.config import (
    MAX_D_FF,
    MAX_D_MODEL,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_POSITION,
    MAX_VOCAB,
    Family,
    KeyReader,
    ModelConfig,
    RopeConfig,
    WeightType,
    check_config,
    show,
)
from pyruntime.errors import ModelFileError, UnsupportedModelError
from pyruntime.gguf import ArrayTensor, GgufFile

from . import find_gguf_family
from .huggingface import yarn_mscale

ROPE_FREQS: Final = "rope_freqs.weight"

# Keys below "{architecture}." that do not change the computation of these families. The vocabulary's size is the
# number of rows of the embedding.
HARMLESS: Final = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "embedding_length_out")

# Keys that would change the computation: only these values leave it as it is.
NEUTRAL: Final[dict[str, tuple[object, ...]]] = {
    "use_parallel_residual": (False,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.max_alibi_bias": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "logit_scale": (1.0, 0.0),
    "residual_scale": (1.0, 0.0),
    "embedding_scale": (1.0, 0.0),
    "rope.scale_linear": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}


def read_config(file: GgufFile) -> tuple[Family, ModelConfig]:
    """The family and config of a GGUF file. Keys of its architecture that are not understood are refused by name."""
    where = str(file.path)
    general = KeyReader(file.metadata, where)
    kind = general.string("general.type", "model")
    if kind != "model":
        raise UnsupportedModelError(f"{where}: 'general.type' is {show(kind)}, expected a model.")
    architecture = general.string("general.architecture")
    family = find_gguf_family(architecture, where)
    prefix = architecture + "."
    values = {k.removeprefix(prefix): v for k, v in file.metadata.items() if k.startswith(prefix)}
    keys = KeyReader(values, f"{where}: {architecture}")

    d_model = keys.integer("embedding_length", 1, MAX_D_MODEL)
    h_q = keys.integer("attention.head_count", 1, MAX_HEADS)
    if not keys.has("attention.key_length") and d_model % h_q:
        raise ModelFileError(f"{where}: embedding_length {d_model} is not a multiple of {h_q} heads and no key_length is given.")
    d_head = keys.integer("attention.key_length", 1, MAX_D_MODEL, default=d_model // h_q)
    keys.neutral("attention.value_length", d_head)
    keys.neutral("rope.dimension_count", d_head)
    scale = keys.number("attention.scale", 0.0, 1e6, default=0.0)
    if scale and not math.isclose(scale, d_head**-0.5, rel_tol=1e-5):
        raise UnsupportedModelError(f"{where}: 'attention.scale' is {scale:g}, expected 1 / sqrt({d_head}).")
    max_position = keys.integer("context_length", 1, MAX_POSITION)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelFileError(f"{where}: the tensor 'token_embd.weight' is missing.")
    if embedding.shape[0] > MAX_VOCAB:
        raise ModelFileError(f"{where}: the embedding has {embedding.shape[0]:,} rows, expected at most {MAX_VOCAB:,}.")
    for key, allowed in NEUTRAL.items():
        keys.neutral(key, *allowed)
    window = keys.integer("attention.sliding_window", 0, MAX_POSITION, default=0)
    if window and family.name != "llama":
        raise UnsupportedModelError(f"{where}: 'attention.sliding_window' is {window}; supported for llama only.")
    config = ModelConfig(
        family=family.name,
        architecture=architecture,
        n_layer=keys.integer("block_count", 1, MAX_LAYERS),
        h_q=h_q,
        h_kv=keys.integer("attention.head_count_kv", 1, MAX_HEADS, default=h_q),
        d_head=d_head,
        d_model=d_model,
        d_ff=keys.integer("feed_forward_length", 1, MAX_D_FF),
        n_vocab=embedding.shape[0],
        max_position=max_position,
        norm_eps=keys.number("attention.layer_norm_rms_epsilon", 1e-12, 1.0),
        tied_embeddings="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        o_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        qk_norm=family.qk_norm,
        sliding_window=window,
        window_first_layer=0,
        dtype=_dtype(file),
        rope=_rope(keys, file, d_head, max_position),
    )
    keys.harmless(HARMLESS)
    keys.finish()
    return family, check_config(config, where)


def _dtype(file: GgufFile) -> WeightType:
    """The type of the matrices; bfloat16 where they are quantised."""
    types = {t.type_name for t in file.tensors.values() if len(t.shape) > 1}
    if types <= {"F32"}:
        return "f32"
    return "f16" if types <= {"F32", "F16"} else "bf16"


def _rope(keys: KeyReader, file: GgufFile, d_head: int, max_position: int) -> RopeConfig:
    """`rope.*`, and Llama 3's factors where the file has them as a tensor."""
    theta = keys.number("rope.freq_base", 2.0, 1e15, default=10000.0)
    factor = keys.number("rope.scaling.factor", 0.0, 1e6, default=0.0)
    # A factor without a type means linear to llama.cpp.
    kind = keys.string("rope.scaling.type", "none" if factor in (0.0, 1.0) else "linear")
    original = keys.integer("rope.scaling.original_context_length", 1, MAX_POSITION, default=max_position)
    attention = keys.number("rope.scaling.attn_factor", 1e-3, 1e3, default=1.0)
    attention *= keys.number("rope.scaling.yarn_attn_factor", 1e-3, 1e3, default=1.0)
    beta_fast = keys.number("rope.scaling.yarn_beta_fast", 1e-3, 1e6, default=32.0)
    beta_slow = keys.number("rope.scaling.yarn_beta_slow", 1e-3, 1e6, default=1.0)
    if attention != 1.0 and kind != "yarn":
        raise UnsupportedModelError(f"{keys.where}: an attention factor of {attention:g} is supported for yarn only.")
    if kind in ("linear", "yarn") and factor < 1.0:
        raise ModelFileError(f"{keys.where}: 'rope.scaling.factor' is {factor:g}, expected at least 1 for {kind}.")
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedModelError(f"{keys.where}: the rope scaling is {show(kind)}, expected none, linear or yarn.")
    if ROPE_FREQS in file.tensors:
        if kind != "none":
            raise UnsupportedModelError(f"{file.path}: has {ROPE_FREQS!r} and {kind} scaling, expected one of them.")
        return _llama3_rope(file, theta, d_head)
    if kind == "linear":
        return RopeConfig("linear", theta, factor)
    if kind == "yarn":
        return RopeConfig(
            "yarn",
            theta,
            factor,
            original,
            beta_fast=beta_fast,
            beta_slow=beta_slow,
            attention_factor=attention * yarn_mscale(factor, 1.0),
        )
    return RopeConfig("default", theta)


def _llama3_rope(file: GgufFile, theta: float, d_head: int) -> RopeConfig:
    """The config whose frequency divisors `rope_freqs.weight` holds: Llama 3's formula with (factor, 1, 4, 8192)."""
    tensor = file.tensors[ROPE_FREQS]
    if tensor.shape != (d_head // 2,):
        raise ModelFileError(f"{file.path}: tensor {ROPE_FREQS!r} has shape {list(tensor.shape)}, expected {[d_head // 2]}.")
    held: list[float] = ArrayTensor(tensor).read().tolist()
    if all(value == 1.0 for value in held):
        return RopeConfig("default", theta)
    for factor in (8.0, 32.0):
        rope = RopeConfig("llama3", theta, factor, 8192)
        if all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(held, llama3_divisors(rope, d_head), strict=True)):
            return rope
    raise UnsupportedModelError(
        f"{file.path}: the frequency factors in {ROPE_FREQS!r} are not those of Llama 3 (factor 8 or 32, 1, 4, 8192)."
    )


def llama3_divisors(rope: RopeConfig, d_head: int) -> Sequence[float]:
    """What Llama 3's scaling divides each of the d_head / 2 frequencies by."""
    out = []
    for i in range(d_head // 2):
        turns = rope.original_max_position * rope.theta ** (-2 * i / d_head) / (2 * math.pi)
        smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        smooth = min(max(smooth, 0.0), 1.0)
        out.append(1.0 / ((1.0 - smooth) / rope.factor + smooth))
    return out


_LAYER_NAMES: Final = {
    "attn_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "ffn_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
_OUTER_NAMES: Final = {
    "embed.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def tensor_name(canonical: str) -> str:
    """Canonical tensor name -> name in a GGUF file."""
    if canonical in _OUTER_NAMES:
        return _OUTER_NAMES[canonical]
    _, layer, name, what = canonical.split(".")
    return f"blk.{layer}.{_LAYER_NAMES[name]}.{what}"


def interleaved_heads(canonical: str, family: Family, config: ModelConfig) -> int:
    """Heads whose rows the file holds interleaved in this tensor, 0 for none."""
    if not family.gguf_permuted or not canonical.startswith("layers."):
        return 0
    name: Any = canonical.split(".")[2]
    return {"q": config.h_q, "k": config.h_kv}.get(name, 0)
