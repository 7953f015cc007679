"""Questions with one right answer about long contexts, answered densely and with sparse policies from the same prefill.

The context is read densely, once for all its questions and policies, which go on from forks of it. The last `TAIL` tokens of context and
question (question="sparse"), or none of them ("dense"), and the answer are decoded one by one with the policy. An answer is right if every
one of its tokens is the most probable one after the tokens before it, which is the same as greedy decoding giving it exactly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..attention import Attention
from ..errors import ContextLengthError, InvalidArgumentError
from ..model import Model
from ..session import Entry, FloatArray, Session
from .alone import alone
from .metrics import confidence, divergence, label, log_softmax, measured, sparsity, summary
from .tasks import TASKS, Context, Haystack, make_context

TAIL = 24
DENSE = Attention.parse("full")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked. share: questions about one context, whose facts then all lie in it. question: "sparse" or "dense"."""

    tasks: tuple[str, ...] = ("needle", "kv", "chain")
    lengths: tuple[int, ...] = (8192,)
    questions: int = 50
    share: int = 5
    question: str = "sparse"
    seed: int = 0
    true_mass: bool = True

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in TASKS:
                raise InvalidArgumentError(f"task {task!r} is unknown, expected some of {', '.join(TASKS)}")
        if self.question not in ("sparse", "dense"):
            raise InvalidArgumentError(f"question is {self.question!r}, expected 'sparse' or 'dense'")
        for name in ("questions", "share"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"{name} is {getattr(self, name)}, expected at least 1")

    def contexts(self, limit: int | None = None) -> Iterator[tuple[str, int, int, int]]:
        """(task, length, number, questions) of every context; limit: of so many questions of each kind at most. The kinds take turns, so
        that what a run has done when it breaks off is a smaller version of the whole."""
        wanted = min(self.questions, limit or self.questions)
        for first in range(wanted):
            for length in self.lengths:
                for task in self.tasks:
                    share = 1 if task == "words" else self.share
                    if first % share == 0:
                        yield task, length, first // share, min(share, wanted - first)


def retrieve(
    model: Model,
    text: str,
    policies: Sequence[Attention],
    plan: Plan,
    *,
    out: Path | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Asks the plan's questions. out: JSON file that is written after every context; what it already holds is not asked again."""
    if max(plan.lengths) > model.max_context:
        raise ContextLengthError(f"length {max(plan.lengths)} does not fit max_context {model.max_context}")
    settings = {
        "model": label(model),
        "device": model.device,
        "dtype": model.dtype,
        "haystack": hashlib.sha256(text.encode()).hexdigest()[:16],
        **{k: v for k, v in asdict(plan).items() if k not in ("tasks", "lengths", "questions")},
    }
    records = _resume(out, settings)
    wanted = list({"full": DENSE, **{str(p): p for p in policies if p.policy != "full"}}.values())
    haystack = Haystack(text, lambda s: model.tokenize(s, add_special_tokens=False))
    begin = model.tokenize("")
    todo = list(plan.contexts(limit))
    for i, (task, length, number, n_question) in enumerate(todo):
        place = {"task": task, "length": length, "context": number}
        own = [r for r in records if place.items() <= r.items()]
        if own and len(own[0]["correct"]) != n_question:  # an earlier limit has cut it short: asked again as a whole
            records = [r for r in records if r not in own]
            own = []
        missing = [p for p in wanted if str(p) not in (r["attention"] for r in own)]
        if missing:
            seed = f"{plan.seed} {task} {length} {number}"
            context = make_context(task, haystack, length=length, n_question=n_question, seed=seed, begin=begin)
            for policy, result in zip(missing, ask(model, context, missing, plan), strict=True):
                records.append({**place, "attention": str(policy), "n_token": len(context.tokens), **result})
            if out:
                _write(out, {"settings": settings, "contexts": records})
        if progress:
            progress(i + 1, len(todo))
    asked = {c[:3] for c in todo}
    shown = [r for r in records if (r["task"], r["length"], r["context"]) in asked and r["attention"] in map(str, wanted)]
    return {"settings": settings, "results": summarise(shown), "contexts": records}


def ask(model: Model, context: Context, policies: Sequence[Attention], plan: Plan) -> list[dict[str, Any]]:
    """Every policy's answers to the questions about one context. Dense attention is always computed: the others are held to it."""
    questions = context.questions
    prompts = [[*context.tokens, *q.prompt] for q in questions]
    ends = [len(p) - (TAIL if plan.question == "sparse" else 0) for p in prompts]  # read densely up to here
    feeds = [[*p[end:], *q.answer[:-1]] for p, end, q in zip(prompts, ends, questions, strict=True)]
    sizes = [len(q.answer) - (plan.question == "dense") for q in questions]
    held: list[int] = []
    with alone(model, len(context.tokens) + sum(map(len, feeds))) as session:
        try:
            session.set_attention(DENSE)
            first = _read(session, context.tokens, prompts, ends, held)
            results: list[dict[str, Any]] = []
            dense: list[FloatArray] = []
            for policy in dict.fromkeys((DENSE, *policies)):
                session.set_attention(measured(policy, plan.true_mass))
                rows = _decode(session, held[1:], feeds, sizes)
                if plan.question == "dense":  # the question's last token has already said what comes first
                    rows = [[row, *more] for row, more in zip(first, rows, strict=True)]
                got = [np.stack(r) for r in rows]
                dense = dense or got
                if policy not in policies:
                    continue
                result: dict[str, Any] = {
                    "correct": [bool((g.argmax(-1) == q.answer).all()) for g, q in zip(got, questions, strict=True)],
                    "kl": [[round(float(x), 6) for x in divergence(d, g)] for d, g in zip(dense, got, strict=True)],
                }
                if policy.policy != "full":
                    by_layer = sparsity(session, model.config.n_layer, model.config.h_kv)["density_by_layer"]
                    result["counters"] = session.attention_stats()
                    result["density_by_layer"] = [round(x, 5) for x in by_layer]
                results.append(result)
            return results
        finally:
            for seq in held:
                session.free_sequence(seq)


def _read(
    session: Session, context: Sequence[int], prompts: Sequence[Sequence[int]], ends: Sequence[int], held: list[int]
) -> list[FloatArray]:
    """Reads what all prompts share, then each up to its end, in sequences that are added to `held`: the shared one, then the prompts'.
    Log-probabilities after each."""
    shared = min(len(context), *(end - 1 for end in ends))
    held.append(session.create_sequence())
    session.step([Entry(held[0], np.asarray(context[:shared], dtype=np.int32))])
    for _ in prompts:
        held.append(session.fork(held[0]))
    rest = [Entry(seq, p[shared:end]) for seq, p, end in zip(held[1:], prompts, ends, strict=True)]
    logits = session.step(rest, logits="last").logits
    assert logits is not None
    return list(log_softmax(logits))


def _decode(session: Session, prompts: Sequence[int], feeds: Sequence[Sequence[int]], sizes: Sequence[int]) -> list[list[FloatArray]]:
    """Log-probabilities after the last sizes[i] tokens of feeds[i], decoded from a fork of prompts[i]; all of them as one batch."""
    seqs = [session.fork(p) for p in prompts]
    rows: list[list[FloatArray]] = [[] for _ in seqs]
    try:
        for at in range(max(map(len, feeds))):
            live = [i for i, feed in enumerate(feeds) if at < len(feed)]
            said = [i for i in live if at >= len(feeds[i]) - sizes[i]]
            logits = session.step([Entry(seqs[i], [feeds[i][at]]) for i in live], logits="last" if said else "none").logits
            for i in said:
                assert logits is not None
                rows[i].append(log_softmax(logits[live.index(i)]))
    finally:
        for seq in seqs:
            session.free_sequence(seq)
    return rows


def summarise(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per task, length and policy: accuracy with its interval, what dense attention knew and the policy did not, KL, sparsity."""
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for r in sorted(records, key=lambda r: r["context"]):
        groups.setdefault((r["task"], r["length"], r["attention"]), []).append(r)
    rows = []
    for (task, length, attention), own in groups.items():
        dense = {r["context"]: r["correct"] for r in groups.get((task, length, "full"), [])}
        pairs = [p for r in own if r["context"] in dense for p in zip(dense[r["context"]], r["correct"], strict=True)]
        correct = [[float(c) for c in r["correct"]] for r in own]
        kl = [x for r in own for answer in r["kl"] for x in answer]
        row: dict[str, Any] = {
            "task": task,
            "length": length,
            "attention": attention,
            "questions": sum(map(len, correct)),
            "accuracy": sum(map(sum, correct)) / sum(map(len, correct)),
            "interval": confidence(correct),
            "lost": sum(d and not s for d, s in pairs),
            "gained": sum(s and not d for d, s in pairs),
            "kl": float(np.mean(kl)),
            "kl_p90": float(np.quantile(kl, 0.9)),
            "kl_max": float(np.max(kl)),
            "density": 1.0,
            "read": 1.0,
        }
        if attention != "full":
            row.update(summary(_total([r["counters"] for r in own])))
            row["density_by_layer"] = np.mean([r["density_by_layer"] for r in own], axis=0).round(5).tolist()
        rows.append(row)
    return rows


def _total(counters: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {k: np.sum([c[k] for c in counters], axis=0).tolist() for k in counters[0]}


def _resume(out: Path | None, settings: dict[str, Any]) -> list[dict[str, Any]]:
    if out is None or not out.exists():
        return []
    try:
        report = json.loads(out.read_text(encoding="utf-8"))
        found, records = report["settings"], report["contexts"]
    except (ValueError, KeyError, TypeError):
        raise InvalidArgumentError(f"{out}: is no result of this command, so there is nothing to go on from; name another file") from None
    for name, value in settings.items():
        if found.get(name) != value:
            raise InvalidArgumentError(f"{out}: was made with {name} {found.get(name)!r}, not {value!r}; name another file")
    return list(records)


def _write(out: Path, report: dict[str, Any]) -> None:
    """As a whole or not at all."""
    part = out.with_name(out.name + ".part")
    part.write_text(json.dumps(report) + "\n", encoding="utf-8")
    part.replace(out)
