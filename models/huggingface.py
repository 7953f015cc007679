"""What the families share of Hugging Face's config.json and tensor names, in the dialects of transformers 4 and 5."""

from __future__ import annotations

import math
from typing import Final

from pyruntime.config import (
    MAX_D_FF,
    MAX_D_MODEL,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_POSITION,
    MAX_VOCAB,
    KeyReader,
    ModelConfig,
    RopeConfig,
    WeightType,
    check_config,
    show,
)
from pyruntime.errors import ModelFileError, UnsupportedModelError

DTYPES: Final[dict[str, WeightType]] = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
# Written by transformers' PretrainedConfig (4.x and 5.x), by training and conversion tools, or only used in training.
HARMLESS: Final = {
    "architectures", "model_type", "transformers_version", "name_or_path", "return_dict", "output_hidden_states",
    "output_attentions", "torchscript", "use_bfloat16", "tf_legacy_loss", "chunk_size_feed_forward", "is_decoder",
    "use_cache", "initializer_range", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
    "task_specific_params", "tokenizer_class", "prefix", "bos_token_id", "eos_token_id", "pad_token_id",
    "unk_token_id", "sep_token_id", "decoder_start_token_id", "tie_last_hidden_states", "attn_implementation",
    "experts_implementation", "attention_dropout", "hidden_dropout", "residual_dropout", "resid_pdrop",
    "embd_pdrop", "attn_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout",
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "epsilon_cutoff", "eta_cutoff",
    "encoder_repetition_penalty", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind", "gradient_checkpointing",
    "use_flash_attn", "use_flash_attention", "use_flash_attention_2", "is_llama_config", "unsloth_fixed",
    "unsloth_version", "transformers.js_config", "onnx_export",
}  # fmt: skip

# Known keys that would change the computation: only these values leave it as it is. A family that implements one of
# them reads it before read_decoder.
NEUTRAL: Final[dict[str, tuple[object, ...]]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "layer_types": (),
    "pretraining_tp": (1,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "cross_attention_hidden_size": (),
    "pruned_heads": ({},),
    "quantization_config": (),
    "compression_config": (),
    "auto_map": (),
    "per_layer_config": (),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "logit_scaling": (1.0,),
    "logit_scale": (1.0,),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
}


def read_decoder(
    keys: KeyReader,
    family: str,
    architecture: str,
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    window: tuple[int, int] = (0, 0),
) -> ModelConfig:
    """Reads the keys that every family shares and finishes the reader, so what a family adds must be read before.

    window: (sliding_window, window_first_layer). Missing head_dim is hidden_size / heads; a null number of key-value
    heads is the number of heads.
    """
    h_q = keys.integer("num_attention_heads", 1, MAX_HEADS)
    if "num_key_value_heads" not in keys.values and family != "llama":
        raise ModelFileError(f"{keys.where}: the key 'num_key_value_heads' is missing.")
    d_model = keys.integer("hidden_size", 1, MAX_D_MODEL)
    if not keys.has("head_dim") and d_model % h_q:
        raise ModelFileError(f"{keys.where}: hidden_size {d_model} is not a multiple of {h_q} heads and 'head_dim' is missing.")
    max_position = keys.integer("max_position_embeddings", 1, MAX_POSITION)
    rope = read_rope(keys, max_position)
    for key, allowed in NEUTRAL.items():
        if not keys.understands(key):
            keys.neutral(key, *allowed)
    config = ModelConfig(
        family=family,
        architecture=architecture,
        n_layer=keys.integer("num_hidden_layers", 1, MAX_LAYERS),
        h_q=h_q,
        h_kv=keys.integer("num_key_value_heads", 1, MAX_HEADS, default=h_q),
        d_head=keys.integer("head_dim", 1, MAX_D_MODEL, default=d_model // h_q),
        d_model=d_model,
        d_ff=keys.integer("intermediate_size", 1, MAX_D_FF),
        n_vocab=keys.integer("vocab_size", 1, MAX_VOCAB),
        max_position=max_position,
        norm_eps=keys.number("rms_norm_eps", 1e-12, 1.0, default=1e-6),
        tied_embeddings=keys.boolean("tie_word_embeddings", default=False),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        sliding_window=window[0],
        window_first_layer=window[1],
        dtype=read_dtype(keys),
        rope=rope,
    )
    keys.harmless(HARMLESS)
    keys.finish()
    return check_config(config, keys.where)


def read_dtype(keys: KeyReader) -> WeightType:
    """`dtype` (transformers 5) or `torch_dtype` (4.x); float32 where neither is given."""
    new, old = keys.string("dtype", ""), keys.string("torch_dtype", "")
    if new and old and new != old:
        raise ModelFileError(f"{keys.where}: 'dtype' is {show(new)} but 'torch_dtype' is {show(old)}.")
    text = new or old or "float32"
    if text not in DTYPES:
        raise UnsupportedModelError(f"{keys.where}: the dtype is {show(text)}; supported are {', '.join(DTYPES)}.")
    return DTYPES[text]


def read_rope(keys: KeyReader, max_position: int) -> RopeConfig:
    """Reads `rope_parameters` (transformers 5), or `rope_theta` with `rope_scaling` (4.x).

    The formulas and defaults are those of transformers' modeling_rope_utils.
    """
    name = "rope_parameters" if keys.has("rope_parameters") else "rope_scaling"
    if keys.has("rope_parameters") and keys.has("rope_scaling"):
        raise ModelFileError(f"{keys.where}: has both 'rope_parameters' and 'rope_scaling', expected one of them.")
    keys.get("rope_parameters")
    values = keys.get(name)
    if values is not None and not isinstance(values, dict):
        raise ModelFileError(f"{keys.where}: {name!r} is {show(values)}, expected an object or null.")
    theta = keys.number("rope_theta", 2.0, 1e15, default=10000.0)
    keys.neutral("partial_rotary_factor", 1.0)
    outer_original = keys.integer("original_max_position_embeddings", 1, MAX_POSITION, default=0)
    scaling = KeyReader(values or {}, f"{keys.where}: {name}")
    kind = scaling.string("rope_type", scaling.string("type", "default"))
    if scaling.string("type", kind) != kind:
        raise ModelFileError(f"{scaling.where}: 'type' is {show(scaling.get('type'))} but 'rope_type' is {show(kind)}.")
    theta = scaling.number("rope_theta", 2.0, 1e15, default=theta)
    scaling.neutral("partial_rotary_factor", 1.0)
    original = scaling.integer("original_max_position_embeddings", 1, MAX_POSITION, default=max_position)
    rope = read_rope_kind(scaling, kind, theta, outer_original or original, max_position)
    scaling.harmless(["finetuned"])
    scaling.finish()
    return rope


def read_rope_kind(keys: KeyReader, kind: str, theta: float, original: int, max_position: int) -> RopeConfig:
    """The keys of one kind of scaling. original: positions that the unscaled frequencies were trained for."""
    if kind == "default":
        return RopeConfig("default", theta)
    if kind == "linear":
        return RopeConfig("linear", theta, keys.number("factor", 1.0, 1e6))
    if kind == "dynamic":
        # transformers compares with max_position_embeddings and ignores an original_max_position_embeddings here.
        return RopeConfig("dynamic", theta, keys.number("factor", 1.0, 1e6), max_position)
    if kind == "llama3":
        return RopeConfig(
            "llama3",
            theta,
            keys.number("factor", 1.0, 1e6),
            original,
            low_freq_factor=keys.number("low_freq_factor", 1e-3, 1e6),
            high_freq_factor=keys.number("high_freq_factor", 1e-3, 1e6),
        )
    if kind == "yarn":
        factor = keys.number("factor", 1.0, 1e6, default=max(max_position / original, 1.0))
        mscale = keys.number("mscale", 0.0, 1e3, default=0.0)
        mscale_all_dim = keys.number("mscale_all_dim", 0.0, 1e3, default=0.0)
        inferred = yarn_mscale(factor, 1.0)
        if mscale and mscale_all_dim:
            inferred = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
        return RopeConfig(
            "yarn",
            theta,
            factor,
            original,
            beta_fast=keys.number("beta_fast", 0.0, 1e6, default=0.0) or 32.0,
            beta_slow=keys.number("beta_slow", 0.0, 1e6, default=0.0) or 1.0,
            attention_factor=keys.number("attention_factor", 1e-3, 1e3, default=inferred),
            truncate=keys.boolean("truncate", True),
        )
    raise UnsupportedModelError(f"{keys.where}: the rope type is {show(kind)}; supported are default, linear, dynamic, llama3 and yarn.")


def yarn_mscale(factor: float, mscale: float) -> float:
    """The factor on cos and sin that yarn derives from its stretch."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def read_window(keys: KeyReader) -> tuple[int, int]:
    """Qwen's window keys -> (sliding_window, window_first_layer).

    Layers from `max_window_layers` on slide where `use_sliding_window` is true. transformers 5 also writes
    `layer_types`, which goes first and must have the same form: full attention, then sliding.
    """
    n_layer = keys.integer("num_hidden_layers", 1, MAX_LAYERS)
    used = keys.boolean("use_sliding_window", False)
    window = keys.integer("sliding_window", 1, MAX_POSITION, default=0)
    window = window if used else 0
    first = min(keys.integer("max_window_layers", 0, MAX_POSITION, default=28), n_layer)
    first = first if window else n_layer
    types = keys.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != n_layer:
            raise ModelFileError(f"{keys.where}: 'layer_types' is {show(types)}, expected a list of {n_layer} names.")
        first = types.index("sliding_attention") if "sliding_attention" in types else n_layer
        if types != ["full_attention"] * first + ["sliding_attention"] * (n_layer - first):
            raise UnsupportedModelError(
                f"{keys.where}: 'layer_types' is {show(types)}; supported is 'full_attention' in the first layers and "
                "'sliding_attention' in all layers after them."
            )
        if first < n_layer and not window:
            raise ModelFileError(f"{keys.where}: 'layer_types' has sliding layers but no sliding window is in use.")
    return (window, first) if window and first < n_layer else (0, 0)


_LAYER_NAMES: Final = {
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def tensor_name(canonical: str) -> str:
    """Canonical tensor name -> name in a Hugging Face checkpoint of any family here."""
    if canonical == "embed.weight":
        return "model.embed_tokens.weight"
    if canonical == "norm.weight":
        return "model.norm.weight"
    if not canonical.startswith("layers."):
        return canonical
    _, layer, name, what = canonical.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[name]}.{what}"
