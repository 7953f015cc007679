"""config.json of every family in both dialects, and each way in which one can be wrong or ask for something else."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from pyruntime.models import FAMILIES, read_config
from pyruntime.models.huggingface import tensor_name

from pyruntime.config import ModelConfig, RopeConfig, parse_json
from pyruntime.errors import ModelFileError, UnsupportedModelError

WHERE = "folder/config.json"

LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

LLAMA31: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": {**LLAMA3_SCALING, "rope_type": "llama3"}, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.42.3", "use_cache": True,
    "vocab_size": 128256,
}  # fmt: skip
SMOLLM2: dict[str, Any] = {
    "_name_or_path": "x", "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.0416,
    "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
    "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.42.3",
    "use_cache": True,
    "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}, "vocab_size": 49152,
}  # fmt: skip
MISTRAL: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.43.1",
    "use_cache": True, "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
ALL = {"llama3.1": LLAMA31, "smollm2": SMOLLM2, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3}


def transformers5(old: dict[str, Any]) -> dict[str, Any]:
    """The same config as transformers 5 writes it."""
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    new["rope_parameters"] = {
        "rope_type": "default",
        **(old.get("rope_scaling") or {}),
        "rope_theta": old["rope_theta"],
    }
    new |= {"dtype": old["torch_dtype"], "transformers_version": "5.0.0", "chunk_size_feed_forward": 0,
            "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1},
            "problem_type": None, "output_attentions": False, "output_hidden_states": False, "return_dict": True,
            "is_encoder_decoder": False}  # fmt: skip
    if old["model_type"].startswith("qwen"):
        new |= {"layer_types": ["full_attention"] * old["num_hidden_layers"], "sliding_window": None}
    return new


def read(base: dict[str, Any], **changes: Any) -> ModelConfig:
    return read_config(parse_json(json.dumps({**base, **changes}).encode(), WHERE), WHERE)


def without(base: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {k: v for k, v in base.items() if k not in keys}


def test_llama31() -> None:
    assert read(LLAMA31) == ModelConfig(
        family="llama", architecture="LlamaForCausalLM", n_layer=32, h_q=32, h_kv=8, d_head=128,
        d_model=4096, d_ff=14336, n_vocab=128256, max_position=131072, norm_eps=1e-05, tied_embeddings=False,
        qkv_bias=False, o_bias=False, mlp_bias=False, qk_norm=False, sliding_window=0, window_first_layer=0,
        dtype="bf16", rope=RopeConfig("llama3", 500000.0, 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0),
    )  # fmt: skip


def test_the_other_families() -> None:
    smol, mistral, qwen2, qwen3 = read(SMOLLM2), read(MISTRAL), read(QWEN2), read(QWEN3)
    assert (smol.d_head, smol.tied_embeddings, smol.rope) == (64, True, RopeConfig("default", 100000.0))
    assert (mistral.sliding_window, mistral.window_first_layer, mistral.qkv_bias) == (4096, 0, False)
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.sliding_window, qwen2.d_head) == (True, False, 0, 64)
    assert (qwen3.qk_norm, qwen3.d_head, qwen3.qkv_bias) == (True, 128, False)
    assert read(QWEN3, attention_bias=True).o_bias
    biased = read(LLAMA31, attention_bias=True, mlp_bias=True)
    assert biased.qkv_bias and biased.o_bias and biased.mlp_bias
    assert read(MISTRAL, sliding_window=None).sliding_window == 0
    assert read(without(LLAMA31, "num_key_value_heads")).h_kv == 32
    assert read(MISTRAL, num_key_value_heads=None).h_kv == 32


@pytest.mark.parametrize("name", ALL)
def test_both_dialects_say_the_same(name: str) -> None:
    assert read(transformers5(ALL[name])) == read(ALL[name])


@pytest.mark.parametrize("name", ALL)
def test_model_type_stands_in_for_missing_architectures(name: str) -> None:
    assert read(ALL[name], architectures=None) == read(ALL[name])


def rope(**scaling: Any) -> RopeConfig:
    old = read(QWEN2, rope_scaling=scaling).rope
    new = read(without(QWEN2, "rope_theta"), rope_parameters={"rope_theta": 1000000.0, **scaling}).rope
    assert old == new
    return old


def test_rope_kinds() -> None:
    assert rope(rope_type="linear", factor=2) == RopeConfig("linear", 1e6, 2.0)
    assert rope(type="linear", factor=2) == RopeConfig("linear", 1e6, 2.0)
    assert rope(type="dynamic", factor=4.0) == RopeConfig("dynamic", 1e6, 4.0, 32768)
    assert rope(rope_type="default") == RopeConfig("default", 1e6)
    assert rope(rope_type="llama3", **LLAMA3_SCALING) == RopeConfig("llama3", 1e6, 8.0, 8192, 1.0, 4.0)
    yarn = rope(rope_type="yarn", type="yarn", factor=4.0, original_max_position_embeddings=32768)
    assert yarn == RopeConfig("yarn", 1e6, 4.0, 32768, attention_factor=0.1 * math.log(4.0) + 1.0)


def test_yarn_attention_factor_is_resolved_as_transformers_does() -> None:
    assert rope(type="yarn", factor=4.0, attention_factor=0.75).attention_factor == 0.75
    one_sided = rope(type="yarn", factor=40.0, mscale=1.0)
    assert one_sided.attention_factor == 0.1 * math.log(40.0) + 1.0
    both = rope(type="yarn", factor=40.0, mscale=0.707, mscale_all_dim=1.0)
    assert both.attention_factor == pytest.approx((0.0707 * math.log(40) + 1) / (0.1 * math.log(40) + 1))
    assert rope(type="yarn", factor=1.0).attention_factor == 1.0
    free = rope(type="yarn", factor=2.0, beta_fast=16, beta_slow=None, truncate=False)
    assert (free.beta_fast, free.beta_slow, free.truncate, free.original_max_position) == (16.0, 1.0, False, 32768)


def test_context_length() -> None:
    assert read(LLAMA31).context_length == 131072
    assert read(QWEN2, rope_scaling={"type": "dynamic", "factor": 2.0}).context_length == 65536
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert read(QWEN2, rope_scaling=yarn).context_length == 131072
    assert read(QWEN2, rope_scaling=yarn, max_position_embeddings=131072).context_length == 131072


def test_windows_of_qwen() -> None:
    window = read(QWEN2, use_sliding_window=True, sliding_window=4096)
    assert (window.sliding_window, window.window_first_layer) == (4096, 21)
    types = ["full_attention"] * 10 + ["sliding_attention"] * 14
    window = read(QWEN2, use_sliding_window=True, sliding_window=4096, layer_types=types)
    assert (window.sliding_window, window.window_first_layer) == (4096, 10)
    none = read(QWEN2, use_sliding_window=True, sliding_window=4096, max_window_layers=24)
    assert (none.sliding_window, none.window_first_layer) == (0, 0)
    with pytest.raises(UnsupportedModelError, match="layer_types"):
        read(QWEN2, use_sliding_window=True, layer_types=types[::-1])
    with pytest.raises(ModelFileError, match=r"layer_types.*no sliding window"):
        read(QWEN2, layer_types=types)
    with pytest.raises(ModelFileError, match=r"layer_types.*24 names"):
        read(QWEN2, layer_types=types[1:])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"), ("pretraining_tp", 2), ("rope_interleaved", True), ("quantization_config", {"bits": 4}),
        ("num_experts", 8), ("logit_scaling", 16.0), ("attention_multiplier", 0.5), ("sliding_window", 4096),
        ("partial_rotary_factor", 0.5), ("never_seen_before", None), ("never_seen_before", 1), ("layer_types", ["x"]),
        ("torch_dtype", "float64"), ("auto_map", {"AutoModelForCausalLM": "modeling_x.X"}), ("use_mrope", True),
        ("head_dim", 512), ("head_dim", 63), ("head_dim", 4), ("is_encoder_decoder", True), ("model_type", "mistral"),
        ("pretraining_tp", True), ("dual_chunk_attention_config", {}),
    ],
)  # fmt: skip
def test_what_is_not_implemented_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        read(LLAMA31, **{key: value})
    assert str(caught.value).startswith(WHERE)
    assert (key if key != "head_dim" else "head dimension") in str(caught.value).replace("the dtype", "torch_dtype")


@pytest.mark.parametrize("kind", ["longrope", "su", "mrope", "ntk", "", "Linear"])
def test_unknown_rope_types_are_refused_by_name(kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"rope type is '{kind}'"):
        read(LLAMA31, rope_scaling={"rope_type": kind, "factor": 2.0})


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "linear"}, "'factor' is missing"),
        ({"rope_type": "linear", "factor": 0.5}, "'factor' is 0.5"),
        ({"rope_type": "linear", "factor": "2"}, "'factor' is '2'"),
        ({"rope_type": "linear", "type": "dynamic", "factor": 2}, "'type' is 'dynamic' but 'rope_type' is 'linear'"),
        ({"rope_type": "linear", "factor": 2, "new": 1}, "the key 'new'"),
        ({"rope_type": "linear", "factor": 2, "partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5"),
        ({"rope_type": "default", "factor": 2}, "the key 'factor'"),
        ({"full_attention": {"rope_type": "default"}}, "the key 'full_attention'"),
        ({"rope_type": "llama3", "factor": 8.0}, "'low_freq_factor' is missing"),
        ({**LLAMA3_SCALING, "rope_type": "llama3", "high_freq_factor": 1.0}, "high_freq_factor is 1.0"),
        ({"rope_type": "yarn", "factor": 4, "beta_fast": 1, "beta_slow": 2}, "beta_fast is 1.0"),
        ({"rope_type": "yarn", "factor": 4, "attention_factor": -1.0}, "'attention_factor' is -1.0"),
        ({"rope_type": ["yarn"]}, "'rope_type' is ['yarn']"),
        ([], "'rope_scaling' is []"),
        ("linear", "'rope_scaling' is 'linear'"),
    ],
)
def test_bad_rope_scaling(scaling: Any, message: str) -> None:
    with pytest.raises((ModelFileError, UnsupportedModelError)) as caught:
        read(LLAMA31, rope_scaling=scaling)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 0), ("num_hidden_layers", 1025), ("num_hidden_layers", True), ("num_hidden_layers", 32.0),
        ("num_hidden_layers", "32"), ("num_hidden_layers", 10**400), ("num_hidden_layers", None),
        ("num_attention_heads", -1), ("num_key_value_heads", 5), ("num_key_value_heads", 0), ("hidden_size", 0),
        ("hidden_size", 1 << 40), ("vocab_size", (1 << 24) + 1), ("intermediate_size", [1]), ("rms_norm_eps", 0),
        ("rms_norm_eps", "1e-5"), ("rope_theta", 0), ("rope_theta", -1e4), ("tie_word_embeddings", 1),
        ("max_position_embeddings", 1 << 31), ("attention_bias", "yes"), ("architectures", ["A", "B"]),
        ("architectures", "LlamaForCausalLM"), ("torch_dtype", 16), ("dtype", "float16"),
        ("rope_parameters", {"rope_type": "default"}),
    ],
)  # fmt: skip
def test_numbers_out_of_range_and_wrong_types(key: str, value: Any) -> None:
    with pytest.raises(ModelFileError) as caught:
        read(LLAMA31, **{key: value})
    assert str(caught.value).startswith(WHERE)
    assert key in str(caught.value) or key == "num_key_value_heads"
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("base", [LLAMA31, MISTRAL, QWEN2, QWEN3])
def test_missing_keys_are_named(base: dict[str, Any]) -> None:
    required = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
    required += ["max_position_embeddings"] + ["num_key_value_heads"] * (base is not LLAMA31)
    required += ["head_dim"] * (base is QWEN3) + ["sliding_window"] * (base is MISTRAL)
    for key in required:
        with pytest.raises(ModelFileError, match=f"the key '{key}' is missing"):
            read(without(base, key))


def test_unknown_architectures_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'MambaForCausalLM'.*LlamaForCausalLM"):
        read(LLAMA31, architectures=["MambaForCausalLM"])
    with pytest.raises(UnsupportedModelError, match="'gpt2'"):
        read(without(LLAMA31, "architectures"), model_type="gpt2")
    with pytest.raises(UnsupportedModelError, match="None"):
        read({})


def test_missing_head_dim_must_divide() -> None:
    with pytest.raises(ModelFileError, match="hidden_size 4097"):
        read(LLAMA31, hidden_size=4097)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": 1, "a": 2}', "'a' occurs twice"), (b'{"a": NaN}', "NaN"), (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "too large"), (b"[]", "expected a JSON object"), (b"", "not valid JSON"),
        (b"\xff{}", "UTF-8"),
        (b'{"a":' * 100_000, "nested too deeply"), (b'{"a": %s}' % (b"9" * 5000), "not valid JSON"),
    ],
)  # fmt: skip
def test_json_is_read_strictly(text: bytes, message: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        parse_json(text, WHERE)
    assert str(caught.value).startswith(WHERE)
    assert message in str(caught.value)


def test_tensor_shapes_and_names() -> None:
    config = replace(read(QWEN3), n_layer=2, qkv_bias=True, tied_embeddings=False)
    shapes = {tensor_name(name): shape for name, shape in config.tensor_shapes().items()}
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (151936, 1024)
    assert shapes["model.layers.1.self_attn.q_proj.weight"] == (2048, 1024)
    assert shapes["model.layers.1.self_attn.k_proj.bias"] == (1024,)
    assert shapes["model.layers.0.self_attn.o_proj.weight"] == (1024, 2048)
    assert shapes["model.layers.0.self_attn.q_norm.weight"] == (128,)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (1024, 3072)
    assert shapes["model.layers.0.post_attention_layernorm.weight"] == shapes["model.norm.weight"] == (1024,)
    assert len(shapes) == 3 + 2 * (7 + 2 + 2 + 3)


def test_families_have_distinct_names() -> None:
    for attribute in ("name", "architecture", "model_type"):
        assert len({getattr(family, attribute) for family in FAMILIES}) == len(FAMILIES)
