"""Questions about long contexts: what they are made of, and how they are asked and counted."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from tiny import write_tiny_model

from pyruntime import Model
from pyruntime.attention import parse_list
from pyruntime.cli import main
from pyruntime.errors import InvalidArgumentError
from pyruntime.evaluate.report import render_retrieval
from pyruntime.evaluate.retrieval import Plan, retrieve, summarise
from pyruntime.evaluate.tasks import DISTRACTORS, HOPS, TASKS, VALUES, Context, Haystack, make_context

SENTENCES = "".join(f" Here is sentence number {i}, and it ends now." for i in range(40))
SPARSE = "tactic:segment=256,window=16,min_context=64"


def encode(text: str) -> list[int]:
    return list(text.encode())


def make(task: str, length: int = 4000, n_question: int = 3, seed: str = "0") -> tuple[Context, str]:
    context = make_context(task, Haystack(SENTENCES, encode), length=length, n_question=n_question, seed=seed, begin=[1])
    assert context.tokens[0] == 1
    for q in context.questions:
        assert len(context.tokens) + len(q.prompt) + len(q.answer) <= length
        assert bytes(q.prompt + q.answer).decode() == q.text
    return context, bytes(context.tokens[1:]).decode()


def answers(context: Context) -> list[str]:
    return [bytes(q.answer).decode() for q in context.questions]


@pytest.mark.parametrize("task", TASKS)
def test_the_seed_decides(task: str) -> None:
    assert make(task) == make(task)
    assert make(task)[1] != make(task, seed="1")[1]
    context, text = make(task, length=3000)
    assert len(text) > 2500, "the context is not filled"
    assert len(context.questions) == (1 if task == "words" else 3)


@pytest.mark.parametrize("task", ["needle", "multikey"])
def test_needles(task: str) -> None:
    context, text = make(task)
    found = dict(re.findall(r" The special magic number for (\w+ \w+) is (\d{7})\.", text))
    assert len(found) == (3 if task == "needle" else 3 + DISTRACTORS)
    for q, answer in zip(context.questions, answers(context), strict=True):
        name = re.fullmatch(r" What is the special magic number for (.*)\? The special magic number for \1 is (\d+)", q.text)
        assert name and found[name[1]] == answer == name[2]
    assert text.count("Here is sentence") > 20, "no haystack"


def test_several_values() -> None:
    context, text = make("multivalue", n_question=2)
    for q, answer in zip(context.questions, answers(context), strict=True):
        name = q.text.split(" for ")[1].split("?")[0]
        values = re.findall(rf"number for {name} is (\d{{7}})\.", text)
        assert len(values) == VALUES and answer == ", ".join(values), "in the order of the text"


def test_pairs() -> None:
    context, text = make("kv")
    pairs = re.findall(r' "([0-9a-f]{8})": "([0-9a-f]{8})",', text)
    assert "".join(f' "{k}": "{v}",' for k, v in pairs) == text, "something else in it"
    for q, answer in zip(context.questions, answers(context), strict=True):
        assert q.text == f' The value of key "{next(k for k, v in pairs if v == answer)}" is "{answer}'


def test_chains() -> None:
    context, text = make("chain", n_question=HOPS + 2)
    links = dict(re.findall(r" VAR ([A-Z]{4}) = (?:VAR )?([A-Z]{4}|\d{5})", text))
    assert len(links) == 2 * (HOPS + 1)
    hops = []
    for q, answer in zip(context.questions, answers(context), strict=True):
        variable, n, before = q.text[len(" The value of VAR ") :][:4], 0, len(text)
        while variable in links:
            at = text.index(f" VAR {variable} = ")
            assert at < before, "assigned before what it is assigned from"
            variable, n, before = links[variable], n + 1, at
        assert variable == answer
        hops.append(n - 1)
    assert hops == [HOPS, 3, 2, 1, 0, HOPS], "the last variable of a chain first"


def test_words() -> None:
    context, text = make("words")
    common = [w for w, _ in Counter(text.split()).most_common(3)]
    assert answers(context) == [" " + ", ".join(common)]


def test_counts() -> None:
    context, text = make("count")
    for q, answer in zip(context.questions, answers(context), strict=True):
        name = re.search(r"How many times does the (.*) appear\?", q.text)
        assert name and text.count(f" Here the {name[1]} appears.") == int(answer)


def test_a_text_that_is_too_short_starts_over() -> None:
    _, text = make("needle", length=20000)
    assert len(text) > 19000 and text.count("number 17,") > 5


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="does not fit 300 tokens"):
        make("needle", length=300, n_question=5)
    with pytest.raises(InvalidArgumentError, match="task 'riddle' is unknown"):
        make("riddle")
    with pytest.raises(InvalidArgumentError, match="no text"):
        Haystack("", encode)
    with pytest.raises(InvalidArgumentError, match="question is 'loud'"):
        Plan(question="loud")
    with pytest.raises(InvalidArgumentError, match="share is 0"):
        Plan(share=0)


def test_a_limit_asks_the_first_ones() -> None:
    plan = Plan(tasks=("needle", "words"), lengths=(100, 200), questions=7, share=5)
    whole, part = list(plan.contexts()), list(plan.contexts(5))
    assert {c[:2] for c in whole} == {("needle", 100), ("needle", 200), ("words", 100), ("words", 200)}
    assert sum(n for task, length, _, n in whole if (task, length) == ("words", 200)) == 7
    assert [c for c in whole if c[0] == "needle" and c[1] == 100] == [("needle", 100, 0, 5), ("needle", 100, 1, 2)]
    assert [c for c in part if c[0] == "needle" and c[1] == 100] == [("needle", 100, 0, 5)]
    assert set(part) < set(whole), "a shorter run is the begin of a longer one"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tasks") / "tiny")


PLAN = Plan(tasks=("kv", "chain"), lengths=(400,), questions=4, share=3)


@pytest.mark.parametrize("question", ["sparse", "dense"])
def test_everything_chosen_is_dense(folder: Path, question: str) -> None:
    plan = Plan(tasks=("kv", "chain"), lengths=(400,), questions=4, share=3, question=question)
    with Model(folder, device="cpu", max_context=400) as model:
        report = retrieve(model, SENTENCES, parse_list(f"{SPARSE},p=1,{SPARSE},p=0.2"), plan)
        assert str(model.attention) == "full" and model.stats()["n_sequence"] == 0
    assert len(report["results"]) == 6 and "| lost |" in render_retrieval(report)
    for row in report["results"]:
        assert row["questions"] == 4
        # The tiny model knows nothing; one digit may be right by accident.
        assert 0 <= row["accuracy"] <= 0.5 and row["interval"][0] <= row["accuracy"] <= row["interval"][1]
        if row["attention"] == "full":
            assert row["kl"] == 0 and row["density"] == 1
        elif row["attention"].endswith("p=1"):
            assert row["kl"] < 1e-3 and row["lost"] == row["gained"] == 0
            assert row.get("read", 1) == 1
        else:
            assert row["kl"] > 1e-3 and row["read"] < 1
    # What a question that is read densely is answered with first is dense, too.
    first = [answer[0] for r in report["contexts"] if r["attention"].endswith("p=0.2") for answer in r["kl"]]
    assert len(first) == 8 and all((x == 0) == (question == "dense") for x in first)


def test_an_answer_is_right_if_greedy_decoding_gives_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model's own continuation, asked for, is right; with its last token changed it is wrong."""
    from pyruntime.evaluate import retrieval
    from pyruntime.evaluate.tasks import Question

    with Model(folder, device="cpu", max_context=400) as model:
        prompt = model.tokenize(SENTENCES)[:300]
        right = model.generate(prompt, max_tokens=6, temperature=0, ignore_eos=True).token_ids
        wrong = [*right[:-1], (right[-1] + 1) % 90]
        context = Context(prompt[:280], [Question(prompt[280:], answer, "") for answer in (right, wrong, right[:1])])
        for question in ("sparse", "dense"):
            policies = parse_list(f"full,{SPARSE},p=1")
            for result in retrieval.ask(model, context, policies, Plan(question=question)):
                assert result["correct"] == [True, False, True] and [len(k) for k in result["kl"]] == [6, 6, 1]


def test_questions_that_share_a_context_do_not_see_each_other(folder: Path) -> None:
    from pyruntime.evaluate import retrieval

    with Model(folder, device="cpu", max_context=400) as model:
        haystack = Haystack(SENTENCES, lambda s: model.tokenize(s, add_special_tokens=False))
        context = make_context("kv", haystack, length=400, n_question=3, seed="x")
        policy = parse_list(f"{SPARSE},p=0.4")
        [together] = retrieval.ask(model, context, policy, PLAN)
        for i, q in enumerate(context.questions):
            [alone] = retrieval.ask(model, Context(context.tokens, [q]), policy, PLAN)
            assert alone["kl"][0] == together["kl"][i] and alone["correct"][0] == together["correct"][i]


def test_going_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyruntime.evaluate import retrieval

    out, policies = tmp_path / "out.json", parse_list(f"{SPARSE},p=0.5")
    with Model(folder, device="cpu", max_context=400) as model:
        whole = retrieve(model, SENTENCES, policies, PLAN)
        seen: list[tuple[int, int]] = []

        def stop(done: int, total: int) -> None:
            seen.append((done, total))
            if done == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            retrieve(model, SENTENCES, policies, PLAN, out=out, progress=stop)
        assert seen == [(1, 4), (2, 4)] and len(json.loads(out.read_text())["contexts"]) == 4
        asked = []
        monkeypatch.setattr(retrieval, "ask", lambda *a, real=retrieval.ask: asked.append(1) or real(*a))
        again = retrieve(model, SENTENCES, policies, PLAN, out=out)
        assert len(asked) == 2 and again["results"] == whole["results"]
        assert retrieve(model, SENTENCES, policies, PLAN, out=out)["results"] == whole["results"] and len(asked) == 2
        more = retrieve(model, SENTENCES, parse_list(f"{SPARSE},p=0.5,{SPARSE},p=0.9"), PLAN, out=out)
        assert len(more["results"]) == 6 and len(asked) == 6, "a policy that is new is asked alone"
        assert [r for r in more["results"] if not r["attention"].endswith("0.9")] == whole["results"]
        with pytest.raises(InvalidArgumentError, match="made with seed 0, not 1"):
            retrieve(model, SENTENCES, policies, Plan(tasks=("kv",), lengths=(400,), share=3, seed=1), out=out)
        out.write_text("[]")
        with pytest.raises(InvalidArgumentError, match="no result of this command"):
            retrieve(model, SENTENCES, policies, PLAN, out=out)


def test_summary() -> None:
    def record(attention: str, context: int, correct: list[bool]) -> dict[str, object]:
        return {
            "task": "kv",
            "length": 9,
            "attention": attention,
            "context": context,
            "correct": correct,
            "kl": [[0.0, 0.5]] * len(correct),
        }

    rows = summarise([record("full", 0, [True, True]), record("full", 1, [False])])
    assert len(rows) == 1 and rows[0]["accuracy"] == pytest.approx(2 / 3) and rows[0]["kl"] == 0.25
    assert rows[0]["lost"] == rows[0]["gained"] == 0 and rows[0]["interval"] == (0.0, 1.0)


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "text.txt", tmp_path / "out.json"
    file.write_text(SENTENCES)
    common = ["eval", str(folder), "--device", "cpu", "--file", str(file), "-q", "--attention", f"{SPARSE},p=0.7"]
    asked = ["--tasks", "kv,needle", "--lengths", "400,450", "--questions", "3", "--share", "2", "--limit", "2", "--out", str(out)]
    assert main([*common, *asked, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {(r["task"], r["length"]) for r in report["results"]} == {(t, n) for t in ("kv", "needle") for n in (400, 450)}
    assert all(r["questions"] == 2 for r in report["results"]) and "contexts" not in report
    assert main([*common, *asked]) == 0
    assert "| kv | 400 | full |" in capsys.readouterr().out
    assert main([*common, "--tasks", "kv,riddle"]) == 2
    assert "task 'riddle' is unknown" in capsys.readouterr().err
    assert main([*common, "--tasks", "kv", "--lengths", "9000"]) == 1
    assert "max_context is 9000" in capsys.readouterr().err
    pytest.importorskip("matplotlib")
    assert main([*common, *asked, "--plot", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_real_model_loses_no_needle(smollm2: Model, text: str) -> None:
    plan = Plan(tasks=("needle",), lengths=(2048,), questions=3, share=3)
    dense, sparse = retrieve(smollm2, text, parse_list("tactic"), plan)["results"]
    assert dense["accuracy"] >= 2 / 3, "the question is too hard for the model to say anything about attention"
    assert sparse["lost"] == 0 and sparse["kl"] < 0.02 and sparse["density"] < 0.3 and sparse["reached"] > 0.8
