"""The same decode steps of a text under several policies, compared with dense attention."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np

from ..attention import Attention
from ..errors import ContextLengthError, InvalidArgumentError
from ..model import Model
from ..session import Entry, FloatArray, Session
from .alone import alone
from .budget import at_density
from .metrics import density, divergence, label, log_softmax, measured, sparsity

TIMED_STEPS = 32  # of a policy whose true mass is measured: those steps are as slow as dense ones, so its speed is taken apart
SEARCH_STEPS = 16  # of the search for a density
POSITIONS = 8  # parts of the decoded text whose NLL is reported apart


def evaluate(
    model: Model,
    ids: Sequence[int],
    policies: Sequence[Attention],
    *,
    n_prompt: int,
    n_decode: int,
    true_mass: bool = False,
    densities: Sequence[float] = (),
    timed: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Reads `n_prompt` tokens densely, then for dense attention and each policy the next `n_decode` tokens of the text one by one.

    The prompt is processed densely, once, but for its last two tokens, which each policy reads (densely, too) so that it knows what the
    prompt's end attended to; every token after it is sparse. KL is of the next-token distribution to that of dense attention.
    true_mass: also measure the softmax mass that was attended to. densities: run every policy at each of these shares of the context, see
    budget.at_density. timed: with true_mass, take the speed apart, in some steps more that do not measure.
    """
    if n_prompt < 1 or n_decode < 1:
        raise InvalidArgumentError(f"n_prompt is {n_prompt} and n_decode {n_decode}, expected at least 1")
    last = 2 if n_prompt > 2 else 0  # two, so that they are a prompt
    if n_prompt + n_decode + 1 > len(ids):
        raise InvalidArgumentError(f"{n_prompt} + {n_decode} tokens and the one after them are needed, the text has {len(ids)}")
    if n_prompt + n_decode > model.max_context:
        raise ContextLengthError(f"{n_prompt} + {n_decode} tokens do not fit max_context {model.max_context}")
    tokens = np.asarray(ids[: n_prompt + n_decode + 1], dtype=np.int32)
    targets = tokens[n_prompt + 1 :]
    total, done = len(policies) * max(1, len(densities)) + 1, 0

    def step_done() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total * n_decode)

    with alone(model, n_prompt + n_decode) as session:
        prompt = session.create_sequence()
        try:
            session.set_attention(Attention.parse("full"))
            started = time.perf_counter()
            session.step([Entry(prompt, tokens[: n_prompt - last])])
            prefill = time.perf_counter() - started

            def decode(n: int = n_decode, step_done: Callable[[], None] = lambda: None) -> tuple[FloatArray, list[float]]:
                return _decode(session, prompt, tokens[n_prompt - last : n_prompt], tokens[n_prompt : n_prompt + n], step_done)

            def density_of(policy: Attention) -> float:
                session.set_attention(policy)
                decode(min(n_decode, SEARCH_STEPS))
                return density(session.attention_stats())

            dense, dense_seconds = decode(step_done=step_done)
            rows = []
            for wanted, policy in product(densities or (None,), policies):
                if wanted is not None:
                    policy = at_density(policy, wanted, n_context=n_prompt + n_decode // 2, n_decode=n_decode, measure=density_of)
                ran = measured(policy, true_mass)
                session.set_attention(ran)
                clustered = session.stats()["cluster_seconds"]
                logprobs, seconds = decode(step_done=step_done)
                stats = session.stats()
                sparse = policy.policy != "full"
                row = {
                    "attention": str(policy),
                    **_compare(dense, logprobs, targets),
                    **(sparsity(session, model.config.n_layer, model.config.h_kv) if sparse else {"density": 1.0, "read": 1.0}),
                    "cluster_seconds": stats["cluster_seconds"] - clustered,
                    "index_bytes": stats["index_bytes"],
                }
                if timed and sparse and "true_mass" in row and not policy.options.get("measure"):
                    session.set_attention(policy)
                    _, seconds = decode(min(n_decode, TIMED_STEPS))
                if wanted is not None:
                    row["wanted_density"] = wanted
                row["tok_s"] = len(seconds) / sum(seconds)
                rows.append(row)
        finally:
            session.free_sequence(prompt)
    return {
        "model": label(model),
        "device": model.device,
        "n_prompt": n_prompt,
        "n_decode": n_decode,
        "prefill_seconds": prefill,
        "dense_tok_s": len(dense_seconds) / sum(dense_seconds),
        "dense_nll": float(-dense[np.arange(len(targets)), targets].mean()),
        "dense_nll_by_position": _by_position(-dense[np.arange(len(targets)), targets]),
        "policies": rows,
    }


def _decode(session: Session, prompt: int, last: Any, tokens: Any, step_done: Callable[[], None]) -> tuple[FloatArray, list[float]]:
    """Log-probabilities after each token that follows prompt and `last`, and the seconds of every step but the first, which may cluster."""
    rows, seconds = [], []
    seq = session.fork(prompt)
    try:
        if len(last):
            session.step([Entry(seq, last)])
        for token in tokens:
            started = time.perf_counter()
            logits = session.step([Entry(seq, [token])], logits="last").logits
            seconds.append(time.perf_counter() - started)
            assert logits is not None
            rows.append(log_softmax(logits[0]))
            step_done()
    finally:
        session.free_sequence(seq)
    return np.stack(rows), seconds[1:] or seconds


def _compare(dense: FloatArray, sparse: FloatArray, targets: Any) -> dict[str, Any]:
    kl = divergence(dense, sparse)
    at = np.arange(len(targets))
    change = dense[at, targets] - sparse[at, targets]
    return {
        "kl": float(kl.mean()),
        "kl_p90": float(np.quantile(kl, 0.9)),
        "top1": float((dense.argmax(-1) == sparse.argmax(-1)).mean()),
        "nll_change": float(change.mean()),
        "kl_by_position": _by_position(kl),
        "nll_change_by_position": _by_position(change),
    }


def _by_position(values: Any) -> list[float]:
    """Means over equal parts of the decoded text, from its begin to its end."""
    return [float(part.mean()) for part in np.array_split(values, min(POSITIONS, len(values)))]
