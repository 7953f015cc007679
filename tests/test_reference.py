"""The numpy reference against the logits that transformers computed, and whether a golden would notice a mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from goldens.cases import CASES
from goldens.weights import StorageDtype, make_weights, round_to_bf16, storage_bytes
from reference import forward

GOLDENS = Path(__file__).resolve().parent / "goldens"

Config = dict[str, Any]


def load(case: str, config_name: str = "config.json") -> tuple[Config, np.ndarray, np.ndarray]:
    golden = np.load(GOLDENS / case / "logits.npz")
    return json.loads((GOLDENS / case / config_name).read_text()), golden["input_ids"], golden["logits"]


# transformers computes in float32, the reference in float64, the files keep 17 bits of logits up to 9: 6e-5 measured.
TOLERANCE = 2e-4


@pytest.mark.parametrize("config_name", ["config.json", "config_v5.json"])
@pytest.mark.parametrize("case", CASES)
def test_reference_reproduces_transformers(case: str, config_name: str) -> None:
    config, ids, golden = load(case, config_name)
    logits = forward(config, make_weights(config, case), ids)
    assert logits.shape == golden.shape == (CASES[case].n_tok, config["vocab_size"])
    assert np.abs(logits - golden).max() < TOLERANCE


def test_every_case_is_committed() -> None:
    assert {path.parent.name for path in GOLDENS.glob("*/config.json")} == set(CASES)
    for case, spec in CASES.items():
        assert json.loads((GOLDENS / case / "config.json").read_text()) == spec.config


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_weights_are_the_same_in_every_storage_dtype(dtype: StorageDtype) -> None:
    for name, x in make_weights(CASES["llama_bias"].config, "llama_bias").items():
        raw = storage_bytes(x, dtype)
        if dtype == "bf16":
            stored = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            stored = np.frombuffer(raw, "<f2" if dtype == "f16" else "<f4").astype(np.float32)
        assert np.array_equal(stored, x.ravel()), name


def rope(**keys: Any) -> Callable[[Config], Config]:
    return lambda c: c | {"rope_scaling": (c.get("rope_scaling") or {}) | keys}


def top(**keys: Any) -> Callable[[Config], Config]:
    return lambda c: c | keys


MISTAKES: list[tuple[str, str, Callable[[Config], Config]]] = [
    *[(case, "rope scaling ignored", top(rope_scaling=None)) for case, s in CASES.items() if s.config.get("rope_scaling")],
    ("llama3", "default rope_theta", top(rope_theta=10000.0)),
    ("llama_mqa", "default epsilon", top(rms_norm_eps=1e-5)),
    ("mistral_window", "window ignored", top(sliding_window=None)),
    ("mistral_window", "window one too long", top(sliding_window=49)),
    ("mistral_window_pages", "window one too short", top(sliding_window=99)),
    ("qwen2", "window taken though switched off", top(use_sliding_window=True)),
    ("qwen2_window", "window in every layer", top(max_window_layers=0)),
    ("qwen3_window", "window ignored", top(use_sliding_window=False)),
    ("rope_llama3_head128", "frequency factors ignored", rope(low_freq_factor=1.0, high_freq_factor=4.0)),
    ("rope_yarn", "attention factor ignored", rope(attention_factor=1.0)),
    ("rope_yarn_attention_factor", "attention factor ignored", rope(attention_factor=None)),
    ("rope_yarn_attention_factor", "betas ignored", rope(beta_fast=32.0, beta_slow=1.0)),
    ("rope_yarn_attention_factor", "truncate ignored", rope(truncate=True)),
    ("rope_yarn_mscale", "mscale ignored", rope(mscale=None)),
    ("rope_yarn_no_original", "wrong original length", rope(original_max_position_embeddings=256)),
]
UNSEEN = {"rope_dynamic_short"}  # the prompt is shorter than the trained length, so dynamic scaling must do nothing


@pytest.mark.parametrize(("case", "mistake", "change"), MISTAKES, ids=[f"{c}-{m.replace(' ', '-')}" for c, m, _ in MISTAKES])
def test_golden_notices(case: str, mistake: str, change: Callable[[Config], Config]) -> None:
    """A runtime that makes this mistake is off by far more than any rounding of bf16 activations."""
    config, ids, golden = load(case)
    wrong = forward(change(config), make_weights(config, case), ids)
    error = np.abs(wrong - golden).max()
    assert error < TOLERANCE if case in UNSEEN else error > 0.25


@pytest.mark.parametrize(("case", "ending"), [("llama_bias", ".bias"), ("qwen2", ".bias"), ("qwen3", "_norm.weight")])
def test_golden_notices_a_missing_tensor(case: str, ending: str) -> None:
    """Every bias and every query or key norm, left out alone, is visible."""
    config, ids, golden = load(case)
    weights = make_weights(config, case)
    names = [name for name in weights if name.endswith(ending) and ("_proj" in name or ".self_attn." in name)]
    assert len(names) == config["num_hidden_layers"] * {"llama_bias": 7, "qwen2": 3, "qwen3": 2}[case]
    for name in names:
        neutral = np.zeros_like(weights[name]) if ending == ".bias" else np.ones_like(weights[name])
        error = np.abs(forward(config, weights | {name: neutral}, ids) - golden).max()
        assert error > 0.25, name


@pytest.mark.parametrize("case", ["llama3", "qwen3", "smollm2"])
def test_bf16_activations_stay_close(case: str) -> None:
    """What a bf16 runtime may claim is the error of this plain one: well below that of any mistake above."""
    config, ids, golden = load(case)
    weights = make_weights(config, case)
    error = np.abs(forward(config, weights, ids, store=round_to_bf16) - golden)
    assert 1e-3 < error.max() < 0.25
    assert error.mean() < 0.02
