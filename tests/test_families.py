"""Every golden model through the whole loader and the C++ forward pass, against the logits that transformers computed."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from goldens.cases import CASES
from goldens.weights import make_weights, round_to_bf16, write_hf_folder
from reference import forward
from tiny import GOLDENS, all_logits, golden_weights

from pyruntime.session import Entry, Session

DIALECTS = ["config.json", "config_v5.json"]
FEW = ["llama3", "llama_bias", "llama_head80", "mistral_window", "qwen2", "qwen3", "smollm2"]
ISAS = ["baseline", "avx2", "avx512", "avx512bf16", "amx"]  # upper bounds: a machine runs the best it has below them


def golden(case: str) -> tuple[np.ndarray, np.ndarray]:
    """(input_ids [n_tok], logits [n_tok, n_vocab]) as transformers computed them."""
    stored = np.load(GOLDENS / case / "logits.npz")
    return stored["input_ids"], stored["logits"]


def run_case(folder: Path, case: str, *, dtype: str = "auto", **options: Any) -> np.ndarray:
    # Dynamic rope takes its base from the context, which for transformers is the length of the prompt.
    options = {"max_context": CASES[case].n_tok, "threads": 2, **options}
    return all_logits(Session(golden_weights(folder, dtype), **options), golden(case)[0])


def round_to_f16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16)


ROUNDING: dict[str, dict[str, Any]] = {"bf16": {"store": round_to_bf16}, "f16": {"store": round_to_f16}, "f32": {"dtype": np.float32}}


@lru_cache(maxsize=64)
def plain_error(case: str, dtype: str) -> np.ndarray:
    """|error| of a plain numpy runtime that rounds to `dtype`: the yardstick for ours."""
    config = json.loads((GOLDENS / case / "config.json").read_text())
    ids, logits = golden(case)
    return np.abs(forward(config, make_weights(config, case), ids, **ROUNDING[dtype]) - logits)


@pytest.mark.parametrize("config_name", DIALECTS)
@pytest.mark.parametrize("case", CASES)
def test_f32_equals_transformers(case: str, config_name: str, tmp_path: Path) -> None:
    """Weights, activations and KV in float32, as in the golden: only the order of additions differs. Plain numpy in float32 is off by
    1e-5 to 6e-5, of which the 17 bits that the golden keeps are a half. Ours was found to be off by 0.8 to 1.2 times as much, on any
    instruction set; 3 times leaves room for another BLAS under numpy. (The mistakes that test_reference.py lists begin at 0.25.)"""
    folder = write_hf_folder(GOLDENS / case, tmp_path / case, "f32", config_name=config_name)
    error = np.abs(run_case(folder, case) - golden(case)[1])
    assert error.max() <= min(1e-3, 3 * plain_error(case, "f32").max())


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("case", FEW)
def test_half_precision_is_as_good_as_its_rounding(case: str, dtype: Any, tmp_path: Path) -> None:
    """The golden weights are exact in bf16 and f16, so the error is that of rounding what enters a matrix product and the KV cache. The
    yardstick is a plain numpy runtime that rounds exactly there. Both errors are sums of very many independent roundings: their means
    must agree closely, the largest of ten thousand values may vary more. An instruction set that keeps more in f32 is better than that."""
    folder = write_hf_folder(GOLDENS / case, tmp_path / case, dtype)
    plain = plain_error(case, dtype)
    error = np.abs(run_case(folder, case) - golden(case)[1])
    assert error.mean() <= 1.3 * plain.mean()
    assert error.max() <= 2.0 * plain.max()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_every_instruction_set(isa: str, dtype: Any, tmp_path: Path) -> None:
    folder = write_hf_folder(GOLDENS / "qwen3", tmp_path / "qwen3", dtype)
    error = np.abs(run_case(folder, "qwen3", cpu_isa=isa) - golden("qwen3")[1])
    assert error.max() <= (3.0 if dtype == "f32" else 2.0) * plain_error("qwen3", dtype).max()


@pytest.mark.parametrize("case", ["llama3", "qwen3_tied_bias"])
def test_the_storage_type_is_a_choice(case: str, tmp_path: Path) -> None:
    """Files in any dtype, kept in f32, are one model: the golden weights are exact in all three."""
    folders = {dtype: write_hf_folder(GOLDENS / case, tmp_path / dtype, dtype) for dtype in ("f32", "bf16", "f16")}
    expected = run_case(folders["f32"], case)
    for folder in folders.values():
        assert np.array_equal(run_case(folder, case, dtype="f32"), expected)


@pytest.mark.parametrize("config_name", DIALECTS)
def test_sharded_folder(config_name: str, tmp_path: Path) -> None:
    case = "qwen2_5_tied"
    whole = write_hf_folder(GOLDENS / case, tmp_path / "whole", "bf16", config_name=config_name)
    shards = write_hf_folder(GOLDENS / case, tmp_path / "shards", "bf16", shards=3, config_name=config_name)
    assert len(list(shards.glob("*.safetensors"))) == 3
    assert np.array_equal(run_case(shards, case), run_case(whole, case))


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("case", CASES)
def test_chunked_equals_whole(case: str, dtype: Any, tmp_path: Path) -> None:
    """Chunks of 7 tokens, and tokens one by one, give the very bits of one whole prompt."""
    folder = write_hf_folder(GOLDENS / case, tmp_path / case, dtype)
    whole = run_case(folder, case)
    assert np.array_equal(run_case(folder, case, max_batch_tokens=7), whole)
    session = Session(golden_weights(folder), max_context=CASES[case].n_tok, threads=2)
    seq = session.create_sequence()
    for i, token in enumerate(golden(case)[0]):
        row = session.step([Entry(seq, [token])], logits="last").logits
        assert row is not None and np.array_equal(row[0], whole[i]), f"token {i}"
