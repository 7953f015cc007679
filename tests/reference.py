"""The Llama-family forward pass in plain numpy: the oracle of the op tests, checked against the goldens.

Weights carry their Hugging Face names and are [out_features, in_features]; `config` is a config.json of either dialect.
Computes in float64 unless told otherwise. Shapes: n_tok, h_q, h_kv, d_head, d_model, d_ff, n_vocab (docs/shapes.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """[..., d] -> [..., d]."""
    normed: Array = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    return normed * weight


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """[n_tok, n_in] -> [n_tok, n_out]."""
    return x @ weight.T if bias is None else x @ weight.T + bias


def silu_mul(gate: Array, up: Array) -> Array:
    return gate / (1.0 + np.exp(-gate)) * up


def softmax(x: Array) -> Array:
    """Over the last axis; an entry of -inf gets weight 0."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    weights: Array = e / e.sum(axis=-1, keepdims=True)
    return weights


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rope dict of either dialect, with its type, theta and original length filled in."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return rope


def head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope_frequencies(config: Mapping[str, Any], max_context: int) -> tuple[Array, float]:
    """Radians per position of every rotated pair, [d_head / 2], and the factor on cos and sin.

    `max_context` is the length that fixes the base of dynamic rope: the sequence for transformers, the session's
    context for a runtime that keeps its KV cache.
    """
    rope = rope_parameters(config)
    d_head = head_dim(config)
    kind, theta, factor = rope["rope_type"], rope["rope_theta"], rope.get("factor", 1.0)
    original = rope["original_max_position_embeddings"]
    pair = np.arange(d_head // 2)
    freq = theta ** (-2.0 * pair / d_head)

    if kind == "default":
        return freq, 1.0
    if kind == "linear":
        return freq / factor, 1.0
    if kind == "dynamic":
        # NTK: a larger base, so that the slowest pair is stretched by `growth` and the fastest keeps its frequency.
        trained = config["max_position_embeddings"]
        growth = factor * max(max_context, trained) / trained - (factor - 1.0)
        return (theta * growth ** (d_head / (d_head - 2))) ** (-2.0 * pair / d_head), 1.0
    if kind == "llama3":
        # Keep the pairs that turn often within the original length, slow down those that do not, blend in between.
        turns = original * freq / (2.0 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return keep * freq + (1.0 - keep) * freq / factor, 1.0
    if kind == "yarn":
        # As llama3, but the blend is a ramp over the pair index between two numbers of turns.
        def pair_that_turns(times: float) -> float:
            return d_head * math.log(original / (times * 2.0 * math.pi)) / (2.0 * math.log(theta))

        first = pair_that_turns(rope.get("beta_fast") or 32.0)
        last = pair_that_turns(rope.get("beta_slow") or 1.0)
        if rope.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, d_head - 1)
        slow = np.clip((pair - first) / max(last - first, 0.001), 0.0, 1.0)
        return slow * freq / factor + (1.0 - slow) * freq, yarn_attention_factor(rope)
    raise ValueError(f"no reference for rope type {kind!r}")


def yarn_attention_factor(rope: Mapping[str, Any]) -> float:
    """What yarn multiplies cos and sin by: stated, or from the two mscales, or 0.1 ln(factor) + 1."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1.0 else 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"])
    return mscale(1.0)


def apply_rope(x: Array, positions: Array, freq: Array, attention_factor: float = 1.0) -> Array:
    """Rotates pair (i, i + d_head/2) of [n_tok, heads, d_head] by positions * freq: the "rotate half" convention."""
    angle = positions[:, None, None] * freq
    cos, sin = np.cos(angle) * attention_factor, np.sin(angle) * attention_factor
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attention(q: Array, k: Array, v: Array, *, n_past: int = 0, window: int = 0) -> Array:
    """Causal attention: q [n_tok, h_q, d_head], k and v [n_past + n_tok, h_kv, d_head] -> [n_tok, h_q, d_head].

    Query row i stands at position n_past + i and sees keys (position - window, position]; window 0 sees all of them.
    """
    n_tok, h_q, d_head = q.shape
    group = h_q // k.shape[1]
    position = n_past + np.arange(n_tok)[:, None]
    key = np.arange(k.shape[0])[None, :]
    hidden = key > position
    if window:
        hidden |= key <= position - window
    out = np.empty_like(q)
    for head in range(h_q):
        scores = q[:, head] @ k[:, head // group].T / math.sqrt(d_head)
        out[:, head] = softmax(np.where(hidden, -np.inf, scores)) @ v[:, head // group]
    return out


def layer_window(config: Mapping[str, Any], layer: int) -> int:
    """How many keys a query of this layer sees, itself included; 0 means all."""
    if config["model_type"].startswith("qwen"):
        slides = config.get("use_sliding_window", False) and layer >= config["max_window_layers"]
    else:
        slides = config["model_type"] == "mistral"
    return int(config.get("sliding_window") or 0) if slides else 0


def forward(
    config: Mapping[str, Any],
    weights: Mapping[str, Array],
    ids: Array,
    *,
    max_context: int | None = None,
    dtype: npt.DTypeLike = np.float64,
    store: Callable[[Array], Array] = lambda x: x,
) -> Array:
    """Logits [n_tok, n_vocab] of every position of one sequence.

    `max_context` (default n_tok): see rope_frequencies. `store` rounds what a runtime keeps in its activation dtype:
    the inputs of every matrix product, keys and values. With goldens.weights.round_to_bf16 this is a plain bf16
    runtime, whose error is the yardstick for ours.
    """
    n_tok = len(ids)
    h_q = config["num_attention_heads"]
    h_kv = config.get("num_key_value_heads") or h_q
    d_head = head_dim(config)
    eps = config["rms_norm_eps"]
    positions = np.arange(n_tok)
    freq, attention_factor = rope_frequencies(config, max_context or n_tok)

    def w(name: str) -> Array:
        return weights[f"{name}.weight"].astype(dtype)

    def project(x: Array, name: str) -> Array:
        bias = weights.get(f"{name}.bias")
        return linear(store(x).astype(dtype), w(name), None if bias is None else bias.astype(dtype))

    x = w("model.embed_tokens")[ids]
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        h = rms_norm(x, w(f"{block}.input_layernorm"), eps)
        q = project(h, f"{block}.self_attn.q_proj").reshape(n_tok, h_q, d_head)
        k = project(h, f"{block}.self_attn.k_proj").reshape(n_tok, h_kv, d_head)
        v = project(h, f"{block}.self_attn.v_proj").reshape(n_tok, h_kv, d_head)
        if f"{block}.self_attn.q_norm.weight" in weights:
            q = rms_norm(q, w(f"{block}.self_attn.q_norm"), eps)
            k = rms_norm(k, w(f"{block}.self_attn.k_norm"), eps)
        q = apply_rope(q, positions, freq, attention_factor)
        k = apply_rope(k, positions, freq, attention_factor)
        q, k, v = (store(y).astype(dtype) for y in (q, k, v))
        a = attention(q, k, v, window=layer_window(config, layer))
        x = x + project(a.reshape(n_tok, h_q * d_head), f"{block}.self_attn.o_proj")
        h = rms_norm(x, w(f"{block}.post_attention_layernorm"), eps)
        gate, up = project(h, f"{block}.mlp.gate_proj"), project(h, f"{block}.mlp.up_proj")
        x = x + project(silu_mul(gate, up), f"{block}.mlp.down_proj")
    x = rms_norm(x, w("model.norm"), eps)
    return linear(store(x).astype(dtype), w("model.embed_tokens" if config.get("tie_word_embeddings") else "lm_head"))
