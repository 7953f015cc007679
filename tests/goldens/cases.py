"""The golden models: one small config.json per family, head shape and rope kind, in the dialect of transformers 4.

Sizes are small but awkward on purpose: d_ff and n_vocab that are no multiple of a vector, windows and prompts that are
no multiple of the 64-token page, scaling lengths that the prompt exceeds. Keys that real hub configs carry and that
must not change the result (`pretraining_tp`, `use_cache`, `rope_interleaved`, ...) are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """One golden: the config.json and the number of tokens of its prompt."""

    config: dict[str, Any]
    n_tok: int = 160


def llama(**keys: Any) -> dict[str, Any]:
    """A Llama config.json: h_q 4, h_kv 2, d_head 64."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 256,
        "initializer_range": 0.02,
        "intermediate_size": 136,
        "max_position_embeddings": 512,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0",
        "use_cache": True,
        "vocab_size": 96,
        **keys,
    }


def narrow_llama(rope: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """The model of the rope cases: d_head 64 stated, d_model 96, a prompt longer than the original length."""
    return llama(**{"hidden_size": 96, "head_dim": 64, "num_key_value_heads": 1, "rope_scaling": rope, **keys})


def mistral(**keys: Any) -> dict[str, Any]:
    """A Mistral config.json."""
    config = llama(architectures=["MistralForCausalLM"], model_type="mistral", head_dim=64, hidden_size=96, rope_theta=1000000.0)
    for key in ("attention_bias", "mlp_bias", "pretraining_tp", "rope_scaling"):
        del config[key]
    return config | keys


def qwen(generation: int, **keys: Any) -> dict[str, Any]:
    """A Qwen 2 or 3 config.json. The window keys are present and switched off, as in every published Qwen."""
    config = llama(
        architectures=[f"Qwen{generation}ForCausalLM"],
        model_type=f"qwen{generation}",
        max_window_layers=1,
        rms_norm_eps=1e-06,
        rope_theta=1000000.0,
        sliding_window=24,
        use_sliding_window=False,
    )
    for key in ("mlp_bias", "pretraining_tp", "rope_scaling"):
        del config[key]
    if generation == 2:
        del config["attention_bias"]
    else:
        config |= {"head_dim": 128, "hidden_size": 96}
    return config | keys


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


CASES: dict[str, Case] = {
    # Llama 2: multi-head attention; the oldest files say neither num_key_value_heads nor rope_theta.
    "llama2": Case(
        without(
            llama(hidden_size=128, num_attention_heads=2, intermediate_size=172, torch_dtype="float16"),
            *("num_key_value_heads", "rope_theta", "attention_bias", "mlp_bias", "attention_dropout"),
        )
    ),
    "llama3": Case(llama(rope_theta=500000.0, eos_token_id=[2, 3])),
    "llama3_1": Case(
        llama(
            rope_theta=500000.0,
            rope_scaling={
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_type": "llama3",
            },
        )
    ),
    "llama3_2_tied": Case(
        llama(
            head_dim=64,
            hidden_size=192,
            num_attention_heads=6,
            rope_theta=500000.0,
            rope_scaling={
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 48,
                "rope_type": "llama3",
            },
            tie_word_embeddings=True,
        )
    ),
    "smollm2": Case(
        llama(
            hidden_size=576,
            num_attention_heads=9,
            num_key_value_heads=3,
            intermediate_size=104,
            rope_theta=100000.0,
            tie_word_embeddings=True,
            vocab_size=97,
            is_llama_config=True,
            rope_interleaved=False,
        )
    ),
    "tinyllama": Case(llama(num_attention_heads=4, num_key_value_heads=1, intermediate_size=88, torch_dtype="float32")),
    "llama_four_layers": Case(llama(hidden_size=64, head_dim=64, num_hidden_layers=4, intermediate_size=72)),
    "llama_bias": Case(llama(attention_bias=True, mlp_bias=True, hidden_size=96, head_dim=64)),
    # One kv head for six query heads, and an epsilon large enough to be seen.
    "llama_mqa": Case(llama(hidden_size=96, head_dim=64, num_attention_heads=6, num_key_value_heads=1, rms_norm_eps=0.02)),
    "llama_head80": Case(llama(hidden_size=160, num_attention_heads=2, num_key_value_heads=1, intermediate_size=104)),
    "llama_head96": Case(llama(hidden_size=96, head_dim=96, num_attention_heads=3, num_key_value_heads=3)),
    "llama_head128": Case(llama(hidden_size=256, num_attention_heads=2, num_key_value_heads=1)),
    "llama_head256": Case(llama(hidden_size=128, head_dim=256, num_attention_heads=2, num_key_value_heads=1)),
    "mistral": Case(mistral(sliding_window=None)),
    "mistral_window": Case(mistral(sliding_window=48)),
    "mistral_window_pages": Case(mistral(sliding_window=100, head_dim=128, num_key_value_heads=1), n_tok=200),
    "qwen2": Case(qwen(2)),
    "qwen2_5_tied": Case(qwen(2, hidden_size=448, num_attention_heads=7, num_key_value_heads=1, tie_word_embeddings=True, vocab_size=99)),
    "qwen2_window": Case(qwen(2, use_sliding_window=True, sliding_window=40, num_hidden_layers=3)),
    # As the Qwen 2.5 model cards say to do it: max_position_embeddings stays the original length.
    "qwen2_yarn": Case(
        qwen(
            2,
            max_position_embeddings=64,
            rope_scaling={"factor": 4.0, "original_max_position_embeddings": 64, "type": "yarn"},
        )
    ),
    "qwen3": Case(qwen(3)),
    "qwen3_tied_bias": Case(qwen(3, attention_bias=True, tie_word_embeddings=True, head_dim=64, intermediate_size=100, vocab_size=101)),
    "qwen3_window": Case(qwen(3, use_sliding_window=True, sliding_window=65, max_window_layers=0)),
    "rope_linear": Case(narrow_llama({"rope_type": "linear", "factor": 4.0})),
    "rope_linear_type": Case(narrow_llama({"type": "linear", "factor": 2.5}, head_dim=80)),
    # Dynamic: the base grows only when the sequence is longer than max_position_embeddings.
    "rope_dynamic": Case(narrow_llama({"rope_type": "dynamic", "factor": 4.0}, max_position_embeddings=64)),
    "rope_dynamic_short": Case(narrow_llama({"type": "dynamic", "factor": 4.0}, max_position_embeddings=256), n_tok=100),
    "rope_llama3_head128": Case(
        narrow_llama(
            {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 2.0,
                "high_freq_factor": 8.0,
                "original_max_position_embeddings": 100,
            },
            head_dim=128,
        )
    ),
    "rope_yarn": Case(
        narrow_llama({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, max_position_embeddings=256)
    ),
    # No original length: transformers takes max_position_embeddings.
    "rope_yarn_no_original": Case(narrow_llama({"type": "yarn", "factor": 2.0}, max_position_embeddings=128), n_tok=200),
    "rope_yarn_attention_factor": Case(
        narrow_llama(
            {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 64,
                "attention_factor": 1.5,
                "beta_fast": 8.0,
                "beta_slow": 2.0,
                "truncate": False,
            }
        )
    ),
    "rope_yarn_mscale": Case(
        narrow_llama(
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "mscale": 2.0,
                "mscale_all_dim": 0.5,
            },
            head_dim=96,
            max_position_embeddings=256,
        )
    ),
}
