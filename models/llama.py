"""LlamaForCausalLM: Llama 2, 3, 3.1, 3.2, TinyLlama, SmolLM2, Yi, and the many models that share the class."""

from __future__ import annotations

from pyruntime.config import Family, KeyReader, ModelConfig

from .huggingface import read_decoder


def read_config(keys: KeyReader) -> ModelConfig:
    """`attention_bias` puts a bias on q, k, v and o, `mlp_bias` on gate, up and down. There are no windows."""
    bias = keys.boolean("attention_bias", False)
    return read_decoder(keys, "llama", "LlamaForCausalLM", qkv_bias=bias, o_bias=bias, mlp_bias=keys.boolean("mlp_bias", False))


FAMILY = Family("llama", "LlamaForCausalLM", "llama", read_config, gguf_architecture="llama", gguf_permuted=True)
