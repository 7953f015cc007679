"""Speed of one model on this machine, in llama-bench's words: pp512 (prefill), tg128 (decode), @ d (tokens already in the cache)."""

from __future__ import annotations

import csv
import io
import json
import statistics
import time
from typing import Any

import numpy as np

from .errors import InvalidArgumentError
from .model import Model
from .session import Entry, Int32Array


def bench(model: Model, *, n_prompt: int, n_gen: int, depth: int, batch: int, repetitions: int) -> list[dict[str, Any]]:
    """One row per test: {"test", "tok_s_mean", "tok_s_sd", "tok_s"}; tokens per second, all sequences together.

    Tokens are random, as in llama-bench; each repetition starts from the same depth, and one warm-up repetition is not counted.
    """
    for name, value, low in (("-p", n_prompt, 0), ("-n", n_gen, 0), ("-d", depth, 0), ("-b", batch, 1), ("-r", repetitions, 1)):
        if value < low:
            raise InvalidArgumentError(f"{name} is {value}, expected at least {low}")
    if depth + max(n_prompt, n_gen) > model.max_context:
        raise InvalidArgumentError(f"-d {depth} with -p {n_prompt} and -n {n_gen} does not fit max_context {model.max_context}")
    session = model._open_session()
    rng = np.random.default_rng(0)

    def draw(n: int) -> Int32Array:
        return rng.integers(0, model.config.n_vocab, n).astype(np.int32)

    seqs = [session.create_sequence() for _ in range(batch)]
    rows = []
    try:
        for seq in seqs:
            if depth:
                session.step([Entry(seq, draw(depth))])
        for test, n, chunks in ((f"pp{n_prompt}", n_prompt, 1), (f"tg{n_gen}", n_gen, n_gen)):
            if n == 0:
                continue
            rates = []
            for _ in range(repetitions + 1):
                tokens = [draw(n) for _ in seqs]
                started = time.perf_counter()
                for part in range(chunks):
                    span = slice(None) if chunks == 1 else slice(part, part + 1)
                    session.step([Entry(seq, t[span]) for seq, t in zip(seqs, tokens, strict=True)], logits="last")
                rates.append(n * batch / (time.perf_counter() - started))
                for seq in seqs:
                    session.truncate(seq, depth)
            rates = rates[1:]
            name = test + (f" @ d{depth}" if depth else "") + (f" b{batch}" if batch > 1 else "")
            sd = statistics.stdev(rates) if len(rates) > 1 else 0.0
            rows.append({"test": name, "tok_s_mean": statistics.mean(rates), "tok_s_sd": sd, "tok_s": rates})
    finally:
        for seq in seqs:
            session.free_sequence(seq)
    return rows


def render(rows: list[dict[str, Any]], form: str) -> str:
    """The rows as a Markdown table, JSON or CSV."""
    if form == "json":
        return json.dumps(rows)
    if form == "csv":
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerow(["test", "tok_s_mean", "tok_s_sd"])
        writer.writerows([r["test"], f"{r['tok_s_mean']:.2f}", f"{r['tok_s_sd']:.2f}"] for r in rows)
        return out.getvalue().rstrip()
    lines = ["| test | tok/s |", "|---|---|"]
    return "\n".join(lines + [f"| {r['test']} | {r['tok_s_mean']:.1f} ± {r['tok_s_sd']:.1f} |" for r in rows])
