"""Reports as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_FIDELITY = ("attention", "KL", "KL p90", "top-1", "dNLL", "density", "read", "true mass", "p10", "reach P", "stride", "overlap", "tok/s")
_RETRIEVAL = ("task", "length", "attention", "right", "95 %", "lost", "gained", "KL", "density", "read", "true mass", "reach P")

_AGREEMENT = ("attention", "density", "read", "KL", "same tokens", "edits", "tok/s")


def render(report: dict[str, Any]) -> str:
    """The report of evaluate(): a table, the density of each layer, and KL from the begin of the decoded text to its end."""
    rows = []
    for r in report["policies"]:
        cells = [r["attention"], f"{r['kl']:.4f}", f"{r['kl_p90']:.4f}", _share(r["top1"]), f"{r['nll_change']:+.4f}"]
        cells += [_share(r.get(name)) for name in ("density", "read", "true_mass", "true_mass_p10", "reached")]
        stride = f"{r['stride']:.1f}" if r.get("stride", 1) > 1 else ""
        rows.append([*cells, stride, _share(r.get("overlap")), f"{r['tok_s']:.1f}"])
    head = (
        f"{report['model']}: {report['n_prompt']} prompt tokens (dense), then {report['n_decode']} decoded ones; "
        f"dense: NLL {report['dense_nll']:.4f}, {report['dense_tok_s']:.1f} tok/s"
    )
    lines = [head, "", *_table(_FIDELITY, rows)]
    for r in report["policies"]:
        if "density_by_layer" in r:
            lines.append(f"{r['attention']}: density by layer (%) " + " ".join(f"{100 * x:.1f}" for x in r["density_by_layer"]))
            lines.append(f"{r['attention']}: KL by position " + " ".join(f"{x:.4f}" for x in r["kl_by_position"]))
    return "\n".join(lines)


def render_retrieval(report: dict[str, Any]) -> str:
    """The report of retrieve() as a table."""
    s, rows = report["settings"], []
    for r in sorted(report["results"], key=lambda r: (r["task"], r["length"])):
        low, high = r["interval"]
        cells = [r["task"], str(r["length"]), r["attention"], f"{r['accuracy']:.1%} of {r['questions']}", f"{low:.1%} - {high:.1%}"]
        cells += [str(r["lost"]), str(r["gained"]), f"{r['kl']:.4f}"]
        rows.append([*cells, *(_share(r.get(name)) for name in ("density", "read", "true_mass", "reached"))])
    sparse = "the question's last tokens and the answer" if s["question"] == "sparse" else "the answer, but for its first token,"
    head = f"{s['model']}: the context is read densely, {sparse} are decoded sparsely; up to {s['share']} questions share a context"
    return "\n".join([head, "", *_table(_RETRIEVAL, rows)])


def render_agreement(report: dict[str, Any]) -> str:
    """The report of agree(): every answer, then a table."""
    rows = []
    lines = [f"{report['model']}: {report['n_prompt']} tokens of prompt, read densely in {report['prefill_seconds']:.1f} s"]
    for r in report["answers"]:
        lines += ["", f"-- {r['attention']}", r["text"].strip()]
        same = f"{r['same']} of {r['tokens']}"
        rows.append([r["attention"], _share(r["density"]), _share(r["read"]), f"{r['kl']:.4f}", same, str(r["edits"]), f"{r['tok_s']:.1f}"])
    return "\n".join([*lines, "", *_table(_AGREEMENT, rows)])


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
