"""Greedy continuations of one prompt, dense and with sparse policies: how long they are the same, and how far apart the distributions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..attention import Attention
from ..errors import ContextLengthError, InvalidArgumentError
from ..model import Model
from ..session import Entry, FloatArray, Session
from .alone import alone
from .metrics import divergence, label, log_softmax, sparsity


def agree(
    model: Model,
    prompt: Sequence[int],
    policies: Sequence[Attention],
    *,
    n_generate: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Reads the prompt but for its last token densely, once; from there on every policy writes up to `n_generate` tokens.

    KL is to dense attention over the dense answer, which the policy gets token by token in a second pass. `same` is the number of tokens
    before the first that differs; `edits` is how many to insert, delete or replace for the policy's answer to become the dense one.
    """
    if len(prompt) < 2 or n_generate < 1:
        raise InvalidArgumentError(f"the prompt has {len(prompt)} tokens and n_generate is {n_generate}, expected at least 2 and 1")
    if len(prompt) + n_generate > model.max_context:
        raise ContextLengthError(f"{len(prompt)} tokens of prompt and {n_generate} more do not fit max_context {model.max_context}")
    wanted = [Attention.parse("full"), *(p for p in policies if p.policy != "full")]
    total, done = n_generate * (2 * len(wanted) - 1), 0

    def step_done() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    rows: list[dict[str, Any]] = []
    with alone(model, len(prompt) + n_generate) as session:
        held = session.create_sequence()
        try:
            session.set_attention(wanted[0])
            started = time.perf_counter()
            session.step([Entry(held, np.asarray(prompt[:-1], dtype=np.int32))])
            prefill = time.perf_counter() - started
            dense_ids: list[int] = []
            dense = np.empty((0, 0), dtype=np.float32)
            for policy in wanted:
                session.set_attention(policy)
                ids, logprobs, seconds = _write(session, held, prompt[-1], n_generate, model.eos_ids, None, step_done)
                if policy is wanted[0]:
                    dense_ids, dense, kl = ids, logprobs, np.zeros(1)
                else:
                    _, again, _ = _write(session, held, prompt[-1], n_generate, model.eos_ids, dense_ids, step_done)
                    kl = divergence(dense, again)
                row = {
                    "attention": str(policy),
                    "text": model.detokenize(ids),
                    "tokens": len(ids),
                    "tok_s": len(seconds) / sum(seconds),
                    "same": next(
                        (i for i, (a, b) in enumerate(zip(ids, dense_ids, strict=False)) if a != b), min(len(ids), len(dense_ids))
                    ),
                    "edits": edit_distance(ids, dense_ids),
                    "kl": float(kl.mean()),
                    **(
                        {"density": 1.0, "read": 1.0} if policy is wanted[0] else sparsity(session, model.config.n_layer, model.config.h_kv)
                    ),
                }
                rows.append(row)
        finally:
            session.free_sequence(held)
    if progress and done < total:  # an answer that ended early
        progress(total, total)
    return {"model": label(model), "device": model.device, "n_prompt": len(prompt), "prefill_seconds": prefill, "answers": rows}


def _write(
    session: Session, prompt: int, token: int, n: int, eos_ids: Sequence[int], given: Sequence[int] | None, step_done: Callable[[], None]
) -> tuple[list[int], FloatArray, list[float]]:
    """Tokens, their log-probabilities' rows, and the seconds of every step but the first, which may cluster. given: read these instead of
    what is most probable."""
    ids: list[int] = []
    rows, seconds = [], []
    seq = session.fork(prompt)
    try:
        for i in range(n if given is None else len(given)):
            started = time.perf_counter()
            logits = session.step([Entry(seq, [token])], logits="last").logits
            seconds.append(time.perf_counter() - started)
            assert logits is not None
            rows.append(log_softmax(logits[0]))
            token = int(logits[0].argmax()) if given is None else given[i]
            ids.append(token)
            step_done()
            if given is None and token in eos_ids:
                break
    finally:
        session.free_sequence(seq)
    return ids, np.stack(rows), seconds[1:] or seconds


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Insertions, deletions and replacements between two lists of tokens (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(diagonal + (x != y), row[j] + 1, row[j - 1] + 1)
    return row[-1]
