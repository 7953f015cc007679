"""Qwen3ForCausalLM: the dense Qwen3 models. Llama with an RMS norm over each head of q and k before the rotation."""

from __future__ import annotations

from pyruntime.config import Family, KeyReader, ModelConfig
from pyruntime.errors import ModelFileError

from .huggingface import read_decoder, read_window


def read_config(keys: KeyReader) -> ModelConfig:
    """`attention_bias` puts a bias on q, k, v and o. `head_dim` is required: it is not hidden_size / heads here."""
    if not keys.has("head_dim"):
        raise ModelFileError(f"{keys.where}: the key 'head_dim' is missing.")
    bias = keys.boolean("attention_bias", False)
    return read_decoder(keys, "qwen3", "Qwen3ForCausalLM", qkv_bias=bias, o_bias=bias, qk_norm=True, window=read_window(keys))


FAMILY = Family("qwen3", "Qwen3ForCausalLM", "qwen3", read_config, gguf_architecture="qwen3", qk_norm=True)
