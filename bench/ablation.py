#!/usr/bin/env python3
"""What each part of Tactic contributes: the same decode steps with one thing changed at a time, as JSON and as a Markdown table.

    python bench/ablation.py --file tests/data/jargon-60k.txt --out bench/results/ablation.json

One dense pass serves all rows. Rows that share a clustering follow each other, so that it is made once; the seconds are of the first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from pyruntime import Model
from pyruntime.attention import Attention
from pyruntime.evaluate import evaluate
from pyruntime.evaluate.progress import Bar

# What is changed, and the policy.
ROWS = [
    ("default", "tactic"),
    ("P 0.75", "tactic:p=0.75"),
    ("P 0.5", "tactic:p=0.5"),
    ("no limit for a head", "tactic:budget=1"),
    ("at most a tenth of the rows for a head", "tactic:budget=0.1"),
    ("no tail", "tactic:tail=0"),
    ("no tail, P 0.75", "tactic:tail=0,p=0.75"),
    ("`fit`", "tactic:estimator=fit"),
    ("`fit`, P 0.75", "tactic:estimator=fit,p=0.75"),
    ("`fit`, no tail", "tactic:estimator=fit,tail=0"),
    ("clusters of 8", "tactic:cluster=8"),
    ("clusters of 8, P 0.75", "tactic:cluster=8,p=0.75"),
    ("clusters of 32", "tactic:cluster=32"),
    ("clusters of 32, P 0.75", "tactic:cluster=32,p=0.75"),
    ("1 iteration", "tactic:iterations=1"),
    ("2 iterations", "tactic:iterations=2"),
    ("3 iterations", "tactic:iterations=3"),
    ("5 iterations", "tactic:iterations=5"),
    ("clustered all at once", "tactic:segment=0"),
    ("clustered all at once, P 0.75", "tactic:segment=0,p=0.75"),
    ("as published, with sinks and window: all at once, `fit`, no tail, no limit", "tactic:segment=0,estimator=fit,tail=0,budget=1"),
]
COLUMNS = ("P 0.9 unless said", "density", "read", "KL", "p90", "top-1", "true mass", "reach P", "clustering, s")


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for r in rows:
        cells = [r["changed"], share(r["density"]), share(r["read"]), f"{r['kl']:.4f}", f"{r['kl_p90']:.4f}"]
        cells += [share(r["top1"]), share(r["true_mass"]), share(r["reached"])]
        cells.append(f"{r['cluster_seconds']:.1f}" if r["cluster_seconds"] > 0.01 else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def share(value: float) -> str:
    return f"{100 * value:.1f} %"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--prompt-tokens", type=int, default=7936)
    parser.add_argument("--decode-tokens", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON; the table goes beside it, with the ending .md")
    arguments = parser.parse_args()
    n_prompt, n_decode = arguments.prompt_tokens, arguments.decode_tokens
    # The smallest clusters have the largest index, which the pool leaves room for.
    with Model(arguments.model, device=arguments.device, max_context=n_prompt + n_decode, attention="tactic:cluster=8") as model:
        ids = model.tokenize(arguments.file.read_text(encoding="utf-8"))
        policies = [Attention.parse(policy) for _, policy in ROWS]
        bar = Bar("decoded tokens")
        report = evaluate(model, ids, policies, n_prompt=n_prompt, n_decode=n_decode, true_mass=True, progress=bar)
    rows = [{"changed": changed, **row} for (changed, _), row in zip(ROWS, report.pop("policies"), strict=True)]
    for row in rows:
        del row["density_by_layer_and_head"]
    text = table(rows)
    print(text)
    if arguments.out:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
        facts = {
            "command": shlex.join(["python", "bench/ablation.py", *sys.argv[1:]]),
            "commit": commit.stdout.strip(),
            "machine": platform.processor() or platform.machine(),
            "cpus": os.cpu_count(),
        }
        lines = ",\n  ".join(map(json.dumps, rows))
        arguments.out.write_text(f'{json.dumps({**facts, **report})[:-1]}, "rows": [\n  {lines}]}}\n')
        arguments.out.with_suffix(".md").write_text(f"`{facts['command']}`, {n_decode} tokens after {n_prompt}\n\n{text}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
