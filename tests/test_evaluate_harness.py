"""pyruntime as a model of lm-evaluation-harness, where that is installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny import log_softmax, write_tiny_model

from pyruntime import Model
from pyruntime.errors import InvalidArgumentError

pytest.importorskip("lm_eval")
from pyruntime.evaluate.harness import Harness

CONTEXT = (
    "The quick brown fox jumps over the lazy dog, again and again." + " The quick brown fox jumps over the lazy dog, again and again." * 6
)


def requests(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=a) for a in arguments]


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    folder: Path = write_tiny_model(tmp_path_factory.mktemp("harness") / "tiny")
    with Model(folder, device="cpu") as model:
        yield Harness(model)


def test_scores_are_those_of_the_logits(harness: Harness) -> None:
    model = harness.model
    ids = model.tokenize(CONTEXT + " and so on")
    rows = log_softmax(model.logits(ids))[-11:-1]
    expected = rows[np.arange(10), ids[-10:]].sum()
    best = model.detokenize(model.generate(CONTEXT, max_tokens=3, temperature=0, ignore_eos=True).token_ids)
    pairs = [(CONTEXT, " and so on"), (CONTEXT, best), ("", " and so on")]
    (value, greedy), (_, best_greedy), (alone, _) = harness.loglikelihood(requests(*pairs), disable_tqdm=True)
    assert value == pytest.approx(expected, abs=1e-3) and not greedy and best_greedy
    (rolling,) = harness.loglikelihood_rolling(requests((" and so on",)), disable_tqdm=True)
    assert rolling == pytest.approx(alone, abs=1e-3)
    (long,) = harness.loglikelihood_rolling(requests((CONTEXT * 2,)), disable_tqdm=True)
    assert long < rolling, "two windows"


def test_the_policy_is_used(harness: Harness) -> None:
    pair = requests((CONTEXT, " and so on"))
    model = harness.model
    [(dense, _)] = harness.loglikelihood(pair, disable_tqdm=True)
    try:
        model.set_attention("tactic:segment=256,window=16,min_context=300,p=1")
        [(whole, _)] = harness.loglikelihood(pair, disable_tqdm=True)
        model.set_attention("tactic:segment=256,window=16,min_context=300,p=0.1")
        [(few, _)] = harness.loglikelihood(pair, disable_tqdm=True)
        assert model.stats()["sparsity"]["read"] < 1
    finally:
        model.set_attention("full")
    assert whole == pytest.approx(dense, abs=0.05) and abs(few - dense) > abs(whole - dense)


def test_generation(harness: Harness) -> None:
    model = harness.model
    expected = model.generate(CONTEXT, max_tokens=8, temperature=0).text
    greedy = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False, "temperature": 0.7}
    stopped = {"until": expected[3], "max_gen_toks": 8}
    assert harness.generate_until(requests((CONTEXT, greedy), (CONTEXT, stopped)), disable_tqdm=True) == [expected, expected[:3]]
    (text,) = harness.generate_until(requests((CONTEXT * 9, greedy)), disable_tqdm=True)
    assert text, "a prompt that is too long loses its begin"


def test_chat_and_errors(harness: Harness) -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert harness.apply_chat_template(messages) == harness.model.chat_prompt(messages)
    with pytest.raises(InvalidArgumentError, match="max_context is 512"):
        harness.loglikelihood(requests((CONTEXT, "a" * 600)), disable_tqdm=True)
