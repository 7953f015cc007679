"""pyruntime eval on a text, on a tiny model: the numbers hang together, and dense compared with itself is nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import write_tiny_model

from pyruntime import Model
from pyruntime.attention import parse_list
from pyruntime.cli import main
from pyruntime.errors import ContextLengthError, InvalidArgumentError
from pyruntime.evaluate import evaluate, render
from pyruntime.evaluate.agreement import agree, edit_distance
from pyruntime.evaluate.budget import at_density
from pyruntime.evaluate.metrics import confidence, divergence, log_softmax
from pyruntime.evaluate.progress import Bar

TEXT = "The quick brown fox jumps over the lazy dog, again and again. " * 10
SPARSE = "tactic:segment=256,window=16,min_context=300"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("evaluate") / "tiny")


def test_report(folder: Path) -> None:
    with Model(folder, device="cpu") as model:
        ids = model.tokenize(TEXT)
        policies = parse_list(f"full,{SPARSE},p=1,{SPARSE},p=0.5")
        report = evaluate(model, ids, policies, n_prompt=450, n_decode=12, true_mass=True)
        assert str(model.attention) == "full" and model.stats()["n_sequence"] == 0
        plain = evaluate(model, ids, policies, n_prompt=450, n_decode=12)
    full, whole, half = report["policies"]
    assert full["kl"] == 0 and full["top1"] == 1 and full["density"] == 1
    assert whole["kl"] < 1e-3 and whole["read"] == 1
    assert 0 < half["density"] < whole["density"] and half["read"] < 1 and half["kl"] >= -1e-6
    assert len(half["density_by_layer"]) == 2 and half["index_bytes"] > 0
    assert 0.5 <= half["true_mass"] <= 1 and 0 <= half["true_mass_p10"] <= half["true_mass"] and 0.5 < half["reached"] <= 1
    assert half["density"] == pytest.approx(sum(map(sum, half["density_by_layer_and_head"])) / 4)
    assert np.mean(half["kl_by_position"]) == pytest.approx(half["kl"], rel=0.5) and len(report["dense_nll_by_position"]) == 8
    text = render(report)
    assert text.count("\n| ") == 4 and f"{SPARSE},p=0.5: density by layer" in text
    assert "true_mass" not in plain["policies"][2], "measured, but nobody asked"
    for name in ("kl", "density", "nll_change", "mass"):
        assert plain["policies"][2][name] == half[name], "measuring has changed the result"


def test_every_policy_at_one_density(folder: Path) -> None:
    """Within what a search in a few steps can do; a tiny model's heads differ little."""
    names = "tactic:segment=256,tactic_recycled:segment=256,recycled,quest,token_select,streaming,oracle,oracle:budget=1"
    with Model(folder, device="cpu") as model:
        ids = model.tokenize(TEXT)
        policies = [p.with_options(min_context=200) for p in parse_list(names)]
        policies = [p.with_options(dense_layers=0) if p.policy == "quest" else p for p in policies]
        report = evaluate(model, ids, policies, n_prompt=480, n_decode=24, true_mass=True, densities=[0.1, 0.3], timed=False)
    rows = report["policies"]
    assert [r["wanted_density"] for r in rows] == [0.1] * 8 + [0.3] * 8
    for row in rows:
        name = row["attention"].partition(":")[0]
        if name == "streaming":
            assert row["density"] == 0 and row["read"] == pytest.approx((16 + 128 + row["wanted_density"] * 492) / 492, rel=0.05)
        elif "budget" in row["attention"]:
            assert row["density"] == pytest.approx(row["wanted_density"], rel=0.1 if name != "quest" else 0.3)
    recycled = rows[2]
    assert "stride=50" in recycled["attention"] and "full_steps" in recycled and recycled["full_steps"] == 0
    limited = at_density(parse_list("tactic:budget=0.5")[0], 0.1, n_context=100, n_decode=10, measure=lambda p: float(p.options["p"]) / 5)
    assert float(limited.options["budget"]) == 0.5 and float(limited.options["p"]) == pytest.approx(0.5, abs=0.05)  # a limit is no target
    with pytest.raises(InvalidArgumentError, match=r"density is 1\.5"):
        at_density(policies[0], 1.5, n_context=100, n_decode=10, measure=lambda p: 0.0)


def test_bad_lengths(folder: Path) -> None:
    with Model(folder, device="cpu") as model:
        ids = model.tokenize(TEXT)
        with pytest.raises(InvalidArgumentError, match="the text has"):
            evaluate(model, ids[:100], parse_list("tactic"), n_prompt=90, n_decode=10)
        with pytest.raises(InvalidArgumentError, match="n_prompt is 0"):
            evaluate(model, ids, parse_list("tactic"), n_prompt=0, n_decode=10)
        with pytest.raises(ContextLengthError, match="max_context 512"):
            evaluate(model, ids, parse_list("tactic"), n_prompt=510, n_decode=10)
        with pytest.raises(ContextLengthError, match="max_context 512"):
            agree(model, ids[:500], parse_list("tactic"), n_generate=20)


def command(folder: Path, tmp_path: Path, *more: str) -> list[str]:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return ["eval", str(folder), "--device", "cpu", "--file", str(file), "-q", "--prompt-tokens", "400", "--decode-tokens", "3", *more]


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert main(command(folder, tmp_path, "--attention", f"{SPARSE},p=0.7", "--json", "--out", str(out))) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["policies"][0]["attention"] == f"{SPARSE},p=0.7" and "true_mass" in report["policies"][0]
    assert json.loads(out.read_text()) == report
    assert main(command(folder, tmp_path, "--attention", SPARSE, "--no-true-mass")) == 0
    assert "| KL |" in capsys.readouterr().out
    assert main(command(folder, tmp_path, "--attention", "tactic:p=2")) == 2
    assert "option p is '2'" in capsys.readouterr().err


def test_plot(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)
        assert main(command(folder, tmp_path, "--plot", str(tmp_path / "plot.png"))) == 2
        assert "pip install 'pyruntime[plot]'" in capsys.readouterr().err
    pytest.importorskip("matplotlib")
    assert main(command(folder, tmp_path, "--attention", SPARSE, "--plot", str(tmp_path / "plot.png"))) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert main(command(folder, tmp_path, "--attention", SPARSE, "--generate", "4", "--plot", str(tmp_path / "answers.png"))) == 0
    assert (tmp_path / "answers.png").read_bytes().startswith(b"\x89PNG")
    assert main(command(folder, tmp_path, "--attention", SPARSE, "--plot", str(tmp_path / "plot.nothing"))) == 2
    assert "plot.nothing: cannot be written" in capsys.readouterr().err


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


def test_agreement(folder: Path) -> None:
    with Model(folder, device="cpu") as model:
        prompt = model.tokenize(TEXT)[:400]
        model.eos_ids = ()
        seen: list[tuple[int, int]] = []
        report = agree(model, prompt, parse_list(f"{SPARSE},p=1,{SPARSE},p=0.2"), n_generate=20, progress=lambda *at: seen.append(at))
        assert seen[-1] == (100, 100) and model.stats()["n_sequence"] == 0
        dense, whole, few = report["answers"]
        expected = model.generate(prompt, max_tokens=20, temperature=0, ignore_eos=True)
        assert dense["text"] == model.detokenize(expected.token_ids) and dense["tokens"] == 20 and dense["same"] == 20
        assert whole["text"] == dense["text"] and whole["edits"] == 0 and whole["kl"] < 1e-3
        assert few["density"] < whole["density"] and few["kl"] > whole["kl"] and 0 <= few["same"] <= 20


def test_ask(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(folder, tmp_path, "--attention", SPARSE, "--generate", "5", "--ask", "What is quick?")) == 0
    out = capsys.readouterr().out
    assert "-- full" in out and f"-- {SPARSE}" in out and "| same tokens |" in out


def test_edit_distance() -> None:
    assert edit_distance([1, 2, 3], [1, 2, 3]) == 0
    assert edit_distance([1, 3], [1, 2, 3]) == 1 and edit_distance([4, 1, 3], [1, 2, 3]) == 2
    assert edit_distance([], [1, 2]) == 2 and edit_distance([1, 2], []) == 2
    assert edit_distance(list(b"kitten"), list(b"sitting")) == 3


def test_metrics() -> None:
    logits = np.random.default_rng(1).normal(size=(3, 50)).astype(np.float32)
    dense, other = log_softmax(logits), log_softmax(logits + np.float32(0.5) * (logits > 1))
    np.testing.assert_allclose(np.exp(dense.astype(np.float64)).sum(-1), 1, rtol=1e-6)
    assert (divergence(dense, dense) == 0).all() and (divergence(dense, other) > 0).all()


def test_confidence() -> None:
    assert confidence([[1.0, 1.0], [1.0]]) == (1.0, 1.0)
    low, high = confidence([[float(i % 2)] for i in range(100)])
    assert 0.38 < low < 0.43 and 0.57 < high < 0.62, "of 100 throws of a coin: 0.5 +- 0.1"
    together = confidence([[float(i % 2)] * 10 for i in range(10)])
    assert together[0] < low and together[1] > high, "10 contexts of 10 equal answers tell less than 100 questions"
    assert confidence([[float(i % 2)] for i in range(100)]) == (low, high)


def test_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Bar("things")(1, 2)
    assert capsys.readouterr().err == "", "stderr is no terminal here"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    Bar("things", quiet=True)(1, 2)
    assert capsys.readouterr().err == ""
    bar = Bar("things")
    bar(1, 2)  # too early to be drawn
    bar(2, 2)
    assert capsys.readouterr().err == f"\r[{'#' * 24}] 2/2 things\x1b[K\n"
