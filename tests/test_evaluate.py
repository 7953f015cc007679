"""pyruntime eval on a tiny model: the numbers hang together, and dense compared with itself is nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import write_tiny_model

from pyruntime import Model
from pyruntime.attention import parse_list
from pyruntime.cli import main
from pyruntime.errors import ContextLengthError, InvalidArgumentError
from pyruntime.evaluate import evaluate, render

TEXT = "The quick brown fox jumps over the lazy dog, again and again. " * 10
SPARSE = "tactic:segment=256,window=16,min_context=300"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("evaluate") / "tiny")


def test_report(folder: Path) -> None:
    with Model(folder, device="cpu") as model:
        ids = model.tokenize(TEXT)
        policies = parse_list(f"full,{SPARSE},p=1,{SPARSE},p=0.5,measure=1")
        report = evaluate(model, ids, policies, n_prompt=450, n_decode=12)
        assert str(model.attention) == "full" and model.stats()["n_sequence"] == 0
    full, whole, half = report["policies"]
    assert full["kl"] == 0 and full["top1"] == 1 and full["density"] == 1
    assert whole["kl"] < 1e-3 and whole["read"] == 1
    assert 0 < half["density"] < whole["density"] and half["read"] < 1 and half["kl"] >= -1e-6
    assert len(half["density_by_layer"]) == 2 and half["index_bytes"] > 0
    assert 0.5 <= half["true_mass"] <= 1 and 0 <= half["true_mass_p10"] <= half["true_mass"] and 0.5 < half["reached"] <= 1
    assert half["density"] == pytest.approx(sum(map(sum, half["density_by_layer_and_head"])) / 4)
    text = render(report)
    assert text.count("\n| ") == 4 and f"{SPARSE},p=0.5,measure=1: density by layer" in text


def test_bad_lengths(folder: Path) -> None:
    with Model(folder, device="cpu") as model:
        ids = model.tokenize(TEXT)
        with pytest.raises(InvalidArgumentError, match="the text has"):
            evaluate(model, ids[:100], parse_list("tactic"), n_prompt=90, n_decode=10)
        with pytest.raises(InvalidArgumentError, match="n_prompt is 0"):
            evaluate(model, ids, parse_list("tactic"), n_prompt=0, n_decode=10)
        with pytest.raises(ContextLengthError, match="max_context 512"):
            evaluate(model, ids, parse_list("tactic"), n_prompt=510, n_decode=10)


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    common = ["eval", str(folder), "--device", "cpu", "--file", str(file), "-q", "--prompt-tokens", "400", "--decode-tokens", "3"]
    assert main([*common, "--attention", f"{SPARSE},p=0.7", "--true-mass", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["policies"][0]["attention"] == f"{SPARSE},p=0.7,measure=1" and "true_mass" in report["policies"][0]
    assert main([*common, "--attention", SPARSE]) == 0
    assert "| KL |" in capsys.readouterr().out
    assert main([*common, "--attention", "tactic:p=2"]) == 2
    assert "option p is '2'" in capsys.readouterr().err


def test_generation_with_tactic(folder: Path) -> None:
    with Model(folder, device="cpu", attention=f"{SPARSE},p=1") as model:
        prompt = model.tokenize(TEXT)[:400]
        sparse = model.generate(prompt, max_tokens=20, temperature=0, ignore_eos=True).token_ids
        stats = model.stats()
        assert stats["attention"] == f"{SPARSE},p=1" and stats["sparsity"]["read"] == 1 and stats["n_clustered_token"] > 0
        model.set_attention("full")
        assert model.generate(prompt, max_tokens=20, temperature=0, ignore_eos=True).token_ids == sparse
        with pytest.raises(InvalidArgumentError, match="unknown"):
            model.set_attention("magic")
        assert str(model.attention) == "full"
