"""MistralForCausalLM: Mistral 7B and its relatives. Llama without biases; 0.1 slides a window in every layer.

GGUF files of Mistral say "llama" and are read as that.
"""

from __future__ import annotations

from pyruntime.config import MAX_POSITION, Family, KeyReader, ModelConfig

from .huggingface import read_decoder


def read_config(keys: KeyReader) -> ModelConfig:
    """A `sliding_window` of null is none; a missing one is refused, because transformers would take 4096."""
    if "sliding_window" in keys.values:
        window = keys.integer("sliding_window", 1, MAX_POSITION, default=0)
    else:
        window = keys.integer("sliding_window", 1, MAX_POSITION)
    return read_decoder(keys, "mistral", "MistralForCausalLM", window=(window, 0))


FAMILY = Family("mistral", "MistralForCausalLM", "mistral", read_config)
