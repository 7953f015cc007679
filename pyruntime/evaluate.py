"""What sparse attention costs and saves on a text: the same decode steps under several policies, compared with dense attention."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .attention import Attention
from .errors import ContextLengthError, InvalidArgumentError
from .model import Model
from .session import Entry, FloatArray, Session

_COLUMNS = ("KL", "KL p90", "top-1", "dNLL", "density", "read", "mass", "true mass", "p10", "reach P", "tok/s")


def evaluate(
    model: Model,
    ids: Sequence[int],
    policies: Sequence[Attention],
    *,
    n_prompt: int,
    n_decode: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Reads `n_prompt` tokens densely, then for dense attention and each policy the next `n_decode` tokens of the text one by one.

    The prompt is processed densely; every token after it is sparse. KL is of the next-token distribution to that of dense attention.
    """
    if n_prompt < 1 or n_decode < 1:
        raise InvalidArgumentError(f"n_prompt is {n_prompt} and n_decode {n_decode}, expected at least 1")
    if n_prompt + n_decode + 1 > len(ids):
        raise InvalidArgumentError(f"{n_prompt} + {n_decode} tokens and the one after them are needed, the text has {len(ids)}")
    if n_prompt + n_decode > model.max_context:
        raise ContextLengthError(f"{n_prompt} + {n_decode} tokens do not fit max_context {model.max_context}")
    session = model._open_session()
    before = model.attention
    tokens = np.asarray(ids[: n_prompt + n_decode + 1], dtype=np.int32)
    targets = tokens[n_prompt + 1 :]
    total, done = len(policies) + 1, 0

    def step_done() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total * n_decode)

    seq = session.create_sequence()
    try:
        session.set_attention(Attention.parse("full"))
        started = time.perf_counter()
        session.step([Entry(seq, tokens[:n_prompt])])
        prefill = time.perf_counter() - started
        dense, dense_seconds = _decode(session, seq, tokens[n_prompt:-1], step_done)
        rows = []
        for policy in policies:
            session.set_attention(policy)
            clustered = session.stats()["cluster_seconds"]
            logprobs, seconds = _decode(session, seq, tokens[n_prompt:-1], step_done)
            stats = session.stats()
            row = {
                "attention": str(policy),
                **_compare(dense, logprobs, targets),
                **(
                    sparsity(session, model.config.n_layer, model.config.h_kv) if policy.policy != "full" else {"density": 1.0, "read": 1.0}
                ),
                "cluster_seconds": stats["cluster_seconds"] - clustered,
                "index_bytes": stats["index_bytes"],
            }
            row["tok_s"] = len(seconds) / sum(seconds)
            rows.append(row)
    finally:
        session.free_sequence(seq)
        session.set_attention(before)
    return {
        "model": model.name,
        "n_prompt": n_prompt,
        "n_decode": n_decode,
        "prefill_seconds": prefill,
        "dense_tok_s": len(dense_seconds) / sum(dense_seconds),
        "dense_nll": float(-dense[np.arange(len(targets)), targets].mean()),
        "policies": rows,
    }


def _decode(session: Session, prompt: int, tokens: Any, step_done: Callable[[], None]) -> tuple[FloatArray, list[float]]:
    """Log-probabilities after each token, and the seconds of every step but the first, which may cluster."""
    rows, seconds = [], []
    seq = session.fork(prompt)
    try:
        for token in tokens:
            started = time.perf_counter()
            logits = session.step([Entry(seq, [token])], logits="last").logits
            seconds.append(time.perf_counter() - started)
            assert logits is not None
            x = logits[0].astype(np.float64)
            x -= x.max()
            rows.append((x - np.log(np.exp(x).sum())).astype(np.float32))
            step_done()
    finally:
        session.free_sequence(seq)
    return np.stack(rows), seconds[1:] or seconds


def _compare(dense: FloatArray, sparse: FloatArray, targets: Any) -> dict[str, Any]:
    p = np.exp(dense.astype(np.float64))
    kl = (p * (dense.astype(np.float64) - sparse)).sum(-1)
    at = np.arange(len(targets))
    return {
        "kl": float(kl.mean()),
        "kl_p90": float(np.quantile(kl, 0.9)),
        "top1": float((dense.argmax(-1) == sparse.argmax(-1)).mean()),
        "nll_change": float((dense[at, targets] - sparse[at, targets]).mean()),
    }


def sparsity(session: Session, n_layer: int, h_kv: int) -> dict[str, Any]:
    """Density after the union, rows read, and masses of the decode steps since the policy was set."""
    all_ = session.attention_stats()
    layers = [session.attention_stats(layer=i) for i in range(n_layer)]
    heads = [[_density(session.attention_stats(layer=i, kv_head=h)) for h in range(h_kv)] for i in range(n_layer)]
    result = {
        "density": _density(all_),
        "read": (all_["n_selected"] + all_["n_exact"]) / all_["n_context"] if all_["n_context"] else 1.0,
        "density_by_layer": [_density(s) for s in layers],
        "density_by_layer_and_head": heads,
        "mass": all_["mass"] / all_["n_mass"] if all_["n_mass"] else 1.0,
    }
    if all_["n_true"]:
        below = np.cumsum(all_["histogram"]) / all_["n_true"]
        result["true_mass"] = all_["true_mass"] / all_["n_true"]
        result["true_mass_p10"] = float(np.searchsorted(below, 0.1)) / len(below)
        result["reached"] = all_["n_reached"] / all_["n_true"]
    return result


def _density(stats: dict[str, Any]) -> float:
    return stats["n_selected"] / stats["n_context"] if stats["n_context"] else 1.0


def render(report: dict[str, Any]) -> str:
    """The report as a Markdown table, and the density of each layer."""
    lines = [
        f"{report['model']}: {report['n_prompt']} prompt tokens (dense), then {report['n_decode']} decoded ones; "
        f"dense: NLL {report['dense_nll']:.4f}, {report['dense_tok_s']:.1f} tok/s",
        "",
        "| attention | " + " | ".join(_COLUMNS) + " |",
        "|---" * (len(_COLUMNS) + 1) + "|",
    ]

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    for r in report["policies"]:
        cells = [f"{r['kl']:.4f}", f"{r['kl_p90']:.4f}", share(r["top1"]), f"{r['nll_change']:+.4f}", share(r["density"]), share(r["read"])]
        cells += [share(r.get(name)) for name in ("mass", "true_mass", "true_mass_p10", "reached")]
        lines.append(f"| {r['attention']} | " + " | ".join([*cells, f"{r['tok_s']:.1f}"]) + " |")
    for r in report["policies"]:
        if "density_by_layer" in r:
            lines.append(f"{r['attention']}: density by layer (%) " + " ".join(f"{100 * x:.1f}" for x in r["density_by_layer"]))
    return "\n".join(lines)
