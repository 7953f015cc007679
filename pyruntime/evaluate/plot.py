"""Plots of the reports, with matplotlib (the extra `plot`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InvalidArgumentError


def pyplot() -> Any:
    """matplotlib.pyplot, drawing into files only."""
    try:
        import matplotlib
    except ImportError:
        raise InvalidArgumentError("--plot needs matplotlib: pip install 'pyruntime[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(report: dict[str, Any], path: Path) -> None:
    """The report of evaluate(): KL against density, and every policy's density by layer and kv head."""
    plt = pyplot()
    sparse = [r for r in report["policies"] if "density_by_layer_and_head" in r]
    figure, axes = plt.subplots(1, 1 + len(sparse), figsize=(6 + 3 * len(sparse), 5), squeeze=False, layout="constrained")
    first = axes[0, 0]
    for r in sparse:
        first.plot(100 * r["density"], r["kl"], "o")
        first.annotate(r["attention"], (100 * r["density"], r["kl"]), xytext=(4, 4), textcoords="offset points", fontsize=8)
    _labels(first, "density (%)", "KL to dense (nats)")
    for axis, r in zip(axes[0, 1:], sparse, strict=True):
        heat = 100 * np.array(r["density_by_layer_and_head"])
        image = axis.imshow(heat, aspect="auto", vmin=0, cmap="viridis", interpolation="nearest")
        axis.set(title=r["attention"], xlabel="kv head", ylabel="layer", xticks=range(heat.shape[1]))
        axis.title.set_fontsize(8)
        figure.colorbar(image, ax=axis, label="density (%)")
    figure.suptitle(f"{report['model']}: {report['n_decode']} tokens decoded after {report['n_prompt']}")
    _save(plt, figure, path)


def plot_retrieval(report: dict[str, Any], path: Path) -> None:
    """The report of retrieve(): accuracy with its interval, and KL, against density."""
    plt = pyplot()
    figure, (right, kl) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    kinds = list(dict.fromkeys((r["task"], r["length"]) for r in report["results"]))
    for r in report["results"]:
        kind = (r["task"], r["length"])
        style = {"color": colors[kinds.index(kind) % len(colors)], "marker": "s" if r["attention"] == "full" else "o"}
        low, high = r["interval"]
        error = [[100 * (r["accuracy"] - low)], [100 * (high - r["accuracy"])]]
        label = f"{r['task']}, {r['length']}" if r["attention"] == "full" else None
        right.errorbar(100 * r["density"], 100 * r["accuracy"], error, capsize=3, label=label, **style)
        if r["attention"] != "full":
            kl.plot(100 * r["density"], r["kl"], **style)
            kl.annotate(r["attention"], (100 * r["density"], r["kl"]), xytext=(4, 4), textcoords="offset points", fontsize=7)
    _labels(right, "density (%)", "right answers (%)")
    _labels(kl, "density (%)", "KL to dense (nats)")
    right.set_xscale("log")
    right.legend(title="square: dense")
    figure.suptitle(report["settings"]["model"])
    _save(plt, figure, path)


def plot_agreement(report: dict[str, Any], path: Path) -> None:
    """The report of agree(): KL, and the tokens that are the same as dense, against density."""
    plt = pyplot()
    figure, (kl, same) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for r in report["answers"][1:]:
        for axis, value in ((kl, r["kl"]), (same, r["same"])):
            axis.plot(100 * r["density"], value, "o", color="C0")
            axis.annotate(r["attention"], (100 * r["density"], value), xytext=(4, 4), textcoords="offset points", fontsize=8)
    _labels(kl, "density (%)", "KL to dense (nats)")
    _labels(same, "density (%)", "tokens until the first that differs")
    figure.suptitle(f"{report['model']}: greedy answers after {report['n_prompt']} tokens")
    _save(plt, figure, path)


def _labels(axis: Any, x: str, y: str) -> None:
    axis.set(xlabel=x, ylabel=y)
    axis.grid(alpha=0.3)


def _save(plt: Any, figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: a format that matplotlib does not know
        raise InvalidArgumentError(f"{path}: cannot be written ({error})") from None
    finally:
        plt.close(figure)
