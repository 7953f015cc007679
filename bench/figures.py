#!/usr/bin/env python3
"""What README.md and docs/ quote of bench/results: the text between "made by bench/figures.py" and "end", and docs/figures/*.svg.

    python bench/figures.py            # write it anew, after a result was committed; drawing needs matplotlib
    python bench/figures.py --check    # say what is no longer as in the results (a test does)

A drawing carries a hash of the numbers in it, so that its check does not depend on matplotlib's version.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
FIGURES = ROOT / "docs" / "figures"
Result = dict[str, Any]


def load(name: str) -> Result:
    return dict(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")))


def by_name(rows: list[Result], name: str, key: str = "test") -> Result:
    """The one row of that name."""
    found = [row for row in rows if row[key] == name]
    if len(found) != 1:
        raise SystemExit(f"{name!r} is in the results {len(found)} times, expected once; there are {', '.join(str(r[key]) for r in rows)}")
    return found[0]


# ---------------------------------------------------------------- text


def cpu_table() -> list[str]:
    cpu = load("cpu")
    lines = ["| test | pyruntime, tok/s | llama.cpp, tok/s | ratio |", "|---|---|---|---|"]
    words = {"pp512": "pp512, reading a prompt of 512 tokens", "tg64": "tg64, generating 64 tokens"}
    for name, text in words.items():
        ours, theirs = (by_name(cpu[side]["tests"], name) for side in ("ours", "theirs"))
        cells = [f"{r['tok_s_mean']:{'.0f' if name[0] == 'p' else '.1f'}} ± {r['tok_s_sd']:.{name[0] == 't':d}f}" for r in (ours, theirs)]
        lines.append(f"| {text} | {' | '.join(cells)} | {ours['tok_s_mean'] / theirs['tok_s_mean']:.2g} |")
    return lines


def gpu_table() -> list[str]:
    rows = load("h200")["llama_cpp"]["rows"]
    lines = ["| test | pyruntime, tok/s | llama.cpp, tok/s | ratio |", "|---|---|---|---|"]
    for name in ("pp512", "pp8192", "tg128", "tg64 @ d32768", "tg64 @ d131072"):
        row = by_name(rows, name)
        digits = 0 if name[0] == "p" else 1
        lines.append(f"| {name} | {row['ours']['tok_s_mean']:.{digits}f} | {row['theirs']['tok_s_mean']:.{digits}f} | {row['ratio']:.2f} |")
    return lines


def gpu_more() -> list[str]:
    h200 = load("h200")
    sparse = next(row for row in h200["tests"] if row.get("selected") and row["depth"] == 131072)
    batch = by_name(h200["tests"], "tg64 @ d2048 b32")["tok_s_mean"]
    runs = h200["load_time"]["runs"]
    first = sum(run["first_token_seconds"] for run in runs) / len(runs)
    share = f"{100 * sparse['selected']:.0f} % of the clustered tokens (a share set for the benchmark)"
    return [
        f"Measured beside that: {sparse['tok_s_mean']:.1f} tok/s at a depth of 131,072 tokens with sparse attention to",
        f"{share}; {batch:.0f} tok/s for 32 sequences at",
        f"depth 2048. Beyond weights and KV it takes {h200['memory']['beyond_weights_and_kv'] >> 20} MiB of the GPU,",
        f"and {first:.1f} s from `Model(...)` on 16 GB of safetensors in the page cache to the first token.",
    ]


def policies() -> list[str]:
    rows = load("ablation")["rows"]
    lines = ["| `attention=` | density | read | KL | top token as dense | true mass |", "|---|---|---|---|---|---|"]
    for name in ("default", "P 0.75", "P 0.5", "as published, with sinks and window: all at once, `fit`, no tail, no limit"):
        r = by_name(rows, name, "changed")
        shares = [f"{100 * r[key]:.1f} %" for key in ("density", "read")]
        lines.append(
            f"| `{r['attention']}` | {' | '.join(shares)} | {r['kl']:.4f} | {100 * r['top1']:.1f} % | {100 * r['true_mass']:.1f} % |"
        )
    return lines


def cpu_sparse() -> list[str]:
    result = load("cpu_tactic")
    runs, mean = result["runs"], statistics.fmean
    dense = mean([run["dense_tok_s"] for run in runs])
    lines = ["| decoding | tok/s | ratio | read |", "|---|---|---|---|", f"| dense | {dense:.1f} | | 100 % |"]
    for rows in zip(*(run["policies"] for run in runs), strict=True):  # the same policy in every run
        speed, read = (mean([row[key] for row in rows]) for key in ("tok_s", "read"))
        lines.append(f"| `{rows[0]['attention']}` | {speed:.1f} | {speed / dense:.2f} | {100 * read:.1f} % |")
    return [
        f"{runs[0]['model']}, {runs[0]['n_decode']} tokens after {runs[0]['n_prompt']}, 2 threads; mean of {len(runs)} runs:",
        "",
        *lines,
    ]


def index() -> list[str]:
    h200, cpu = load("h200"), load("ablation")
    default = by_name(cpu["rows"], "default", "changed")
    sparse = next(row for row in h200["tests"] if row.get("selected") and row["depth"] == 131072)
    share = {
        "memory": h200["sparse_memory"]["index_bytes"] / h200["sparse_memory"]["kv_bytes"],
        "cpu": default["cluster_seconds"] / cpu["prefill_seconds"],
        "gpu": sparse["cluster_seconds"] / sparse["prompt_seconds"],
    }
    memory, cpu_time, gpu_time = (f"{100 * share[key]:.{digits}f} %" for key, digits in (("memory", 1), ("cpu", 0), ("gpu", 0)))
    return [
        f"The index takes {memory} of the memory of the KV cache. Making it took {cpu_time} of the time of reading the prompt on a CPU",
        f"({cpu['n_prompt']} tokens), {gpu_time} on an H200 ({sparse['depth']:,} tokens).",
    ]


# Name of a passage: what it says. Where it is: between its two comments, in any of the pages.
TEXTS: dict[str, Callable[[], list[str]]] = {
    "cpu": cpu_table,
    "gpu": gpu_table,
    "gpu-more": gpu_more,
    "policies": policies,
    "cpu-sparse": cpu_sparse,
    "index": index,
}
_PASSAGE = re.compile(r"(?<=<!-- made by bench/figures\.py: )([\w-]+)( -->\n)(.*?)(?=<!-- end -->)", re.DOTALL)


def passages(text: str) -> str:
    """The page with its passages as the results have them."""
    return _PASSAGE.sub(lambda found: found[1] + found[2] + "\n".join(["", *TEXTS[found[1]](), "", ""]), text)


# ---------------------------------------------------------------- drawings


def fidelity() -> Result:
    """KL against what is read, for one thing changed at a time."""
    groups = {
        "P 0.9, 0.75, 0.5": ["default", "P 0.75", "P 0.5"],
        "no tail": ["no tail", "no tail, P 0.75"],
        "estimator `fit`": ["`fit`", "`fit`, P 0.75"],
        "clusters of 8": ["clusters of 8", "clusters of 8, P 0.75"],
        "clusters of 32": ["clusters of 32", "clusters of 32, P 0.75"],
        "clustered all at once": ["clustered all at once", "clustered all at once, P 0.75"],
        "as published": ["as published, with sinks and window: all at once, `fit`, no tail, no limit"],
    }
    report = load("ablation")
    found = {label: [by_name(report["rows"], name, "changed") for name in names] for label, names in groups.items()}
    lines = {label: [[100 * row["read"] for row in rows], [row["kl"] for row in rows]] for label, rows in found.items()}
    return {
        "title": f"{report['model']}, {report['n_decode']} tokens after {report['n_prompt']}", "lines": lines,
        "x": "share of the context that is read (%)", "y": "KL to dense attention (nats)", "y_scale": "log",
    }  # fmt: skip


def layers() -> Result:
    """Density by layer."""
    report = load("ablation")
    names = {"P 0.9": "default", "P 0.75": "P 0.75", "P 0.5": "P 0.5"}
    rows = {label: by_name(report["rows"], name, "changed")["density_by_layer"] for label, name in names.items()}
    lines = {label: [list(range(len(row))), [100 * value for value in row]] for label, row in rows.items()}
    return {
        "title": f"{report['model']}, {report['n_decode']} tokens after {report['n_prompt']}", "lines": lines,
        "x": "layer", "y": "density (%)", "y_scale": "linear",
    }  # fmt: skip


def depth() -> Result:
    """Decode speed against the depth of the context, on the H200."""
    h200 = load("h200")
    dense = [by_name(h200["tests"], f"tg64 @ d{d}") for d in (2048, 8192, 32768, 65536, 131072)]
    theirs = [row for row in h200["llama_cpp"]["rows"] if row["test"].startswith("tg64 @ d")]
    sparse = [row for row in h200["tests"] if row.get("selected")]
    lines = {
        "dense": [[row["depth"] for row in dense], [row["tok_s_mean"] for row in dense]],
        f"sparse, {100 * sparse[0]['selected']:.0f} % of the clustered tokens": [
            [r["depth"] for r in sparse],
            [r["tok_s_mean"] for r in sparse],
        ],
        "llama.cpp, dense": [[int(row["test"].partition("@ d")[2]) for row in theirs], [row["theirs"]["tok_s_mean"] for row in theirs]],
    }
    title = f"{h200['model']['name']} shapes, {h200['model']['dtype']}, one sequence, {h200['machine']['name']}"
    return {"title": title, "lines": lines, "x": "tokens in the context", "y": "tok/s", "y_scale": "linear", "from_zero": True}


DRAWINGS: dict[str, Callable[[], Result]] = {"fidelity": fidelity, "layers": layers, "depth": depth}


def digest(data: Result) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def draw(name: str, data: Result) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 10})
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 3.8), layout="constrained")
    for (label, (x, y)), marker in zip(data["lines"].items(), "os^vDPX", strict=False):
        axis.plot(x, y, marker=marker, markersize=5, linewidth=1, label=label.replace("`", ""))
    axis.set(xlabel=data["x"], ylabel=data["y"], yscale=data["y_scale"], title=data["title"])
    if data.get("from_zero"):
        axis.set_ylim(bottom=0)
    axis.title.set_fontsize(10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(FIGURES / f"{name}.svg", metadata={"Date": None, "Creator": None, "Source": digest(data)})
    pyplot.close(figure)


# ----------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description="Bring the figures of README.md and docs/ up to date with bench/results.")
    parser.add_argument("--check", action="store_true", help="change nothing, fail if something is out of date")
    check = parser.parse_args().check
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        if (made := passages(text)) != text:
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(made, encoding="utf-8")
    FIGURES.mkdir(exist_ok=True)
    for name, make in DRAWINGS.items():
        data, path = make(), FIGURES / f"{name}.svg"
        if not path.exists() or digest(data) not in path.read_text(encoding="utf-8"):
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                draw(name, data)
    if stale:
        print(f"{'not as in bench/results' if check else 'written'}: {', '.join(stale)}{'; run python bench/figures.py' if check else ''}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
