"""Numbers that every evaluation shares: log-probabilities, divergence, sparsity from the session's counters, confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..attention import Attention
from ..session import FloatArray, Session

if TYPE_CHECKING:
    from ..model import Model

RESAMPLES = 2000


def label(model: Model) -> str:
    """The model's name in a report; of a folder or file the last part, the rest of its path says something about the machine only."""
    return Path(model.name).name if Path(model.name).is_absolute() else model.name


def log_softmax(logits: FloatArray) -> FloatArray:
    """Log-probabilities of logits [..., n_vocab]."""
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    x -= np.log(np.exp(x).sum(-1, keepdims=True))
    return x.astype(np.float32)


def divergence(dense: FloatArray, sparse: FloatArray) -> Any:
    """KL(dense || sparse) in nats of log-probabilities [..., n_vocab]."""
    wide = dense.astype(np.float64)
    return (np.exp(wide) * (wide - sparse)).sum(-1)


def measured(policy: Attention, on: bool) -> Attention:
    """The policy, which also computes the true mass if `on`."""
    return policy.with_options(measure=True) if on and policy.policy != "full" else policy


def sparsity(session: Session, n_layer: int, h_kv: int) -> dict[str, Any]:
    """Density after the union, rows read, and masses of the decode steps since the policy was set."""
    layers = [session.attention_stats(layer=i) for i in range(n_layer)]
    heads = [[density(session.attention_stats(layer=i, kv_head=h)) for h in range(h_kv)] for i in range(n_layer)]
    return {
        **summary(session.attention_stats()),
        "density_by_layer": [density(s) for s in layers],
        "density_by_layer_and_head": heads,
    }


def density(stats: dict[str, Any]) -> float:
    return stats["n_selected"] / stats["n_context"] if stats["n_context"] else 1.0


def summary(stats: dict[str, Any]) -> dict[str, Any]:
    """Shares from the counters of prt_attention_stats, of one session or added up over several runs."""
    result = {
        "density": density(stats),
        "read": (stats["n_selected"] + stats["n_exact"]) / stats["n_context"] if stats["n_context"] else 1.0,
    }
    if stats["n_mass"]:
        result["mass"] = stats["mass"] / stats["n_mass"]
    if stats["n_choice"]:
        result["full_steps"] = stats["n_full"] / stats["n_step"]
        result["stride"] = stats["n_step"] / stats["n_choice"]
    if stats["n_compared"]:
        result["overlap"] = stats["n_overlap"] / stats["n_compared"]
    if stats["n_true"]:
        below = np.cumsum(stats["histogram"]) / stats["n_true"]
        result["true_mass"] = stats["true_mass"] / stats["n_true"]
        result["true_mass_p10"] = float(np.searchsorted(below, 0.1)) / len(below)
        result["reached"] = stats["n_reached"] / stats["n_true"]
    return result


def confidence(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """95 % interval of the mean over all values, by bootstrap with a fixed seed. Whole groups are drawn: what shares a context is no
    independent sample."""
    sums = np.array([sum(g) for g in groups], dtype=np.float64)
    counts = np.array([len(g) for g in groups], dtype=np.float64)
    drawn = np.random.default_rng(0).integers(0, len(groups), (RESAMPLES, len(groups)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
