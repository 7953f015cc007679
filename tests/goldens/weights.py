"""The weights of the golden models: every tensor is a pure function of (case name, tensor name), so none is committed.

Values come from `RandomState.random_sample`, whose stream numpy has frozen, and are rounded to numbers that bfloat16,
float16 and float32 all hold exactly: one golden serves every storage dtype.
"""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Weights = dict[str, npt.NDArray[np.float32]]
StorageDtype = Literal["bf16", "f16", "f32"]
TORCH_NAMES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


def round_to_bf16(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Rounds to the nearest bfloat16; below 2^-16, where float16 is too coarse to hold it, to zero."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return np.where(np.abs(rounded) < 2.0**-16, np.float32(0), rounded)


def random_tensor(case: str, name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> npt.NDArray[np.float32]:
    """Uniform values with this mean and standard deviation, the same on every platform and numpy version."""
    stream = np.random.RandomState(zlib.crc32(f"{case}/{name}".encode()))
    return round_to_bf16(mean + std * np.sqrt(12.0) * (stream.random_sample(shape) - 0.5))


def make_weights(config: Mapping[str, Any], case: str) -> Weights:
    """All tensors of a Llama-like model, by their Hugging Face names, weights as [out_features, in_features].

    `config` is a config.json of either dialect; `case` seeds the values. Scales are chosen so that attention scores and
    logits have a standard deviation of about 2 and every bias and norm weight changes the result visibly.
    """
    family = config["model_type"]
    d_model, d_ff, n_vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    h_q = config["num_attention_heads"]
    h_kv = config.get("num_key_value_heads") or h_q
    d_head = config.get("head_dim") or d_model // h_q
    tied = bool(config.get("tie_word_embeddings", False))
    attention_bias = bool(config.get("attention_bias", False))
    mlp_bias = bool(config.get("mlp_bias", False))

    weights: Weights = {}

    def norm(name: str, n: int) -> None:
        weights[f"{name}.weight"] = random_tensor(case, f"{name}.weight", (n,), std=0.25, mean=1.0)

    def linear(name: str, n_out: int, n_in: int, gain: float, bias: bool = False) -> None:
        weights[f"{name}.weight"] = random_tensor(case, f"{name}.weight", (n_out, n_in), std=gain / np.sqrt(n_in))
        if bias:
            weights[f"{name}.bias"] = random_tensor(case, f"{name}.bias", (n_out,), std=0.5)

    # A tied embedding is also the output matrix, so its scale is that of the logits.
    embed_std = 2.0 / np.sqrt(d_model) if tied else 1.0
    weights["model.embed_tokens.weight"] = random_tensor(case, "model.embed_tokens.weight", (n_vocab, d_model), embed_std)
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        norm(f"{block}.input_layernorm", d_model)
        linear(f"{block}.self_attn.q_proj", h_q * d_head, d_model, 1.4, bias=attention_bias or family == "qwen2")
        linear(f"{block}.self_attn.k_proj", h_kv * d_head, d_model, 1.4, bias=attention_bias or family == "qwen2")
        linear(f"{block}.self_attn.v_proj", h_kv * d_head, d_model, 1.4, bias=attention_bias or family == "qwen2")
        linear(f"{block}.self_attn.o_proj", d_model, h_q * d_head, 1.4, bias=attention_bias)
        if family == "qwen3":
            norm(f"{block}.self_attn.q_norm", d_head)
            norm(f"{block}.self_attn.k_norm", d_head)
        norm(f"{block}.post_attention_layernorm", d_model)
        linear(f"{block}.mlp.gate_proj", d_ff, d_model, 1.4, bias=mlp_bias)
        linear(f"{block}.mlp.up_proj", d_ff, d_model, 1.4, bias=mlp_bias)
        linear(f"{block}.mlp.down_proj", d_model, d_ff, 1.0, bias=mlp_bias)
    norm("model.norm", d_model)
    if not tied:
        linear("lm_head", n_vocab, d_model, 2.0)
    return weights


def storage_bytes(x: npt.NDArray[np.float32], dtype: StorageDtype) -> bytes:
    """Little-endian bytes of `x` in a storage dtype; exact for values that `make_weights` returns."""
    if dtype == "bf16":
        return (np.ascontiguousarray(x, "<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return np.ascontiguousarray(x, "<f2" if dtype == "f16" else "<f4").tobytes()


def write_safetensors(path: Path, weights: Mapping[str, npt.NDArray[np.float32]], dtype: StorageDtype) -> None:
    """Writes one .safetensors file: u64 header length, JSON header, tensors in the order given."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs: list[bytes] = []
    offset = 0
    for name, x in weights.items():
        blob = storage_bytes(x, dtype)
        header[name] = {"dtype": dtype.upper(), "shape": list(x.shape), "data_offsets": [offset, offset + len(blob)]}
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def write_hf_folder(
    case_dir: Path,
    out_dir: Path,
    dtype: StorageDtype = "bf16",
    *,
    shards: int = 1,
    config_name: str = "config.json",
) -> Path:
    """Writes a loadable Hugging Face folder (no tokenizer) of a golden case and returns its path.

    `shards` > 1 splits the tensors over that many files with a `model.safetensors.index.json`. `config_name` is
    "config.json" (transformers 4 dialect) or "config_v5.json" (transformers 5); the copy names the storage dtype.
    """
    config = json.loads((case_dir / config_name).read_text())
    config["dtype" if config_name == "config_v5.json" else "torch_dtype"] = TORCH_NAMES[dtype]
    weights = make_weights(config, case_dir.name)
    if out_dir.exists():
        shutil.rmtree(out_dir)
    out_dir.mkdir(parents=True)
    (out_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if shards == 1:
        write_safetensors(out_dir / "model.safetensors", weights, dtype)
        return out_dir
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(weights.items())[shard::shards])
        write_safetensors(out_dir / file, part, dtype)
        weight_map |= dict.fromkeys(part, file)
    total = sum(x.size for x in weights.values()) * (4 if dtype == "f32" else 2)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out_dir / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return out_dir
