"""Qwen2ForCausalLM: Qwen2 and Qwen2.5, and the DeepSeek-R1 distillations of them. Llama with a bias on q, k and v."""

from __future__ import annotations

from pyruntime.config import Family, KeyReader, ModelConfig

from .huggingface import read_decoder, read_window


def read_config(keys: KeyReader) -> ModelConfig:
    """The bias is always there; windows follow `read_window`."""
    return read_decoder(keys, "qwen2", "Qwen2ForCausalLM", qkv_bias=True, window=read_window(keys))


FAMILY = Family("qwen2", "Qwen2ForCausalLM", "qwen2", read_config, gguf_architecture="qwen2")
