#!/usr/bin/env python3
"""Every attention policy on one text: at its defaults, at equal density, and what Recycled Attention holds of the mass from one choice.

    python bench/policies.py run --file tests/data/jargon-60k.txt      # writes bench/results/policies.json, then the page
    python bench/policies.py page                                      # docs/results.md from the committed JSON

Two runs give the same numbers, but for the speed of dense attention.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
OUT, PAGE = RESULTS / "policies.json", ROOT / "docs" / "results.md"
ENDLESS = RESULTS / "streaming.json"  # of bench/streaming.py
ANSWERS = RESULTS / "h200_policies_retrieval.json"  # of `pyruntime eval --tasks`
SPEED = RESULTS / "h200_policies.json"  # of prt-bench

DEFAULTS = (
    "tactic", "recycled", "recycled:stride=10,k=2048", "recycled:check=10", "tactic_recycled", "tactic_recycled:threshold=0.8",
    "streaming", "quest", "token_select", "oracle",
)  # fmt: skip
# One choice for all tokens, and no choice at all.
MASS = ("recycled:stride=51", "recycled:stride=51,k=1024", "recycled:stride=51,group=max,pool=7,k=1024",
        "streaming:sinks=16,window=128", "streaming:sinks=4,window=4092")  # fmt: skip
EQUAL = ("tactic", "recycled", "quest", "token_select", "streaming", "oracle", "oracle:budget=1")
DENSITIES = (0.01, 0.02, 0.05, 0.1)
KEEP = ("attention", "wanted_density", "kl", "kl_p90", "top1", "nll_change", "density", "read", "true_mass", "true_mass_p10", "reached",
        "full_steps", "stride", "overlap", "density_by_layer")  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    from pyruntime import Model
    from pyruntime.attention import Attention
    from pyruntime.evaluate import evaluate
    from pyruntime.evaluate.progress import Bar

    n_prompt, n_decode = arguments.prompt_tokens, arguments.decode_tokens
    report: dict[str, Any] = {}
    started = time.perf_counter()
    # quest's bounds are the largest index, which the pool leaves room for
    with Model(arguments.model, device=arguments.device, max_context=n_prompt + n_decode, attention="quest") as model:
        ids = model.tokenize(arguments.file.read_text(encoding="utf-8"))
        for name, policies, densities in (("defaults", DEFAULTS + MASS, ()), ("equal", EQUAL, DENSITIES)):
            part = evaluate(
                model, ids, [Attention.parse(p) for p in policies], n_prompt=n_prompt, n_decode=n_decode, true_mass=True,
                densities=densities, timed=False, progress=Bar(name),
            )  # fmt: skip
            rows = [{k: row[k] for k in KEEP if k in row} for row in part.pop("policies")]
            report[name] = {**part, "rows": rows}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    facts = {
        "command": shlex.join(["python", "bench/policies.py", *sys.argv[1:]]), "commit": commit.stdout.strip(),
        "machine": platform.processor() or platform.machine(), "cpus": os.cpu_count(), "seconds": round(time.perf_counter() - started),
    }  # fmt: skip
    text = ",\n".join(
        f'"{name}": {{{json.dumps({k: v for k, v in part.items() if k != "rows"})[1:-1]}, "rows": [\n  '
        + ",\n  ".join(map(json.dumps, part["rows"])) + "]}"
        for name, part in report.items()
    )  # fmt: skip
    arguments.out.write_text(f"{json.dumps(facts)[:-1]},\n{text}}}\n", encoding="utf-8")


def share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def table(columns: list[str], rows: list[list[str]]) -> str:
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *(f"| {' | '.join(r)} |" for r in rows)])


def cells(r: dict[str, Any]) -> list[str]:
    stride = f"{r['stride']:.1f}" if r.get("stride", 1) > 1.05 else ""
    return [share(r["density"]), share(r["read"]), f"{r['kl']:.4f}", share(r["top1"]), f"{r['nll_change']:+.3f}", share(r.get("true_mass")),
            stride, share(r.get("overlap"))]  # fmt: skip


HEAD = ["density", "read", "KL", "top-1", "dNLL", "true mass", "stride", "overlap"]


def endless(r: dict[str, Any]) -> list[str]:
    """StreamingLLM with eviction."""
    parts = [[str(round((i + 1) * r["tokens"] / len(r["pages"]))), f"{p:.1f}", str(n), str(mib)]
             for i, (p, n, mib) in enumerate(zip(r["perplexity_by_part"], r["pages"], r["peak_rss_mib"], strict=True))]  # fmt: skip
    return [
        "## StreamingLLM with eviction: no end",
        f"`{r['command']}`: {r['tokens']} tokens of the text, which starts over after {r['text_tokens']}, read one by "
        f"one under `{r['attention']}` in a session of {r['max_context']} tokens, at most {r['peak_pages']} pages of 64. The file begins "
        "with tables, which are easily foretold.",
        table(["up to token", "perplexity of this part", "pages in use", "peak memory, MiB"], parts),
    ]


def answers(r: dict[str, Any]) -> list[str]:
    """Questions about long contexts."""
    tasks = ("needle", "kv", "chain")
    by = {(row["attention"], row["task"]): row for row in r["results"]}
    rows = []
    for policy in dict.fromkeys(row["attention"] for row in r["results"]):
        mine = [by[policy, task] for task in tasks]
        cost = sum(row["density"] for row in mine) / len(mine), sum(row["read"] for row in mine) / len(mine)
        rows.append([f"`{policy}`", *(f"{100 * row['accuracy']:.0f} %" for row in mine), *(f"{row['kl']:.3f}" for row in mine),
                     *(share(x) for x in cost)])  # fmt: skip
    n, length = r["results"][0]["questions"], r["results"][0]["length"]
    return [
        "## Questions about long contexts",
        f"{n} questions of each kind about contexts of {length} tokens: a needle in a text, a value of a list of random pairs, a chain of "
        f"variables. The context is read densely, the question's last 24 tokens and the answer are decoded with the policy. {r['model']}; "
        f"`{r['command']}` at {r['commit']} ([{ANSWERS.name}](../bench/results/{ANSWERS.name})).",
        table(["policy", *(f"{t}, right" for t in tasks), *(f"KL, {t}" for t in tasks), "density", "read"], rows),
        "Recycled Attention reads what mattered up to `stride` tokens ago. Here that is before the answer begins, which is the 25th of "
        "these tokens, and what it needs did not matter yet. Tactic with its choices kept (`tactic_recycled`) loses answers in the same "
        "way.",
    ]


def speed(r: dict[str, Any]) -> list[str]:
    """Tokens per second on a GPU."""
    depths = sorted({t["depth"] for t in r["tests"]})
    by = {(t.get("attention", "dense") + (f" {100 * t['selected']:g} %" if t.get("selected") else ""), t["depth"]): t for t in r["tests"]}
    rows = []
    for policy in dict.fromkeys(name for name, _ in by):
        mine = [by[policy, d] for d in depths]
        dense = [by["dense", d] for d in depths]
        rows.append([
            f"`{policy}`", *(f"{t['tok_s_mean']:.1f} ({t['tok_s_mean'] / d['tok_s_mean']:.2f})" for t, d in zip(mine, dense, strict=True)),
            *(share(t.get("read_rows", 1)) for t in mine),
        ])  # fmt: skip
    gpu, model = r["machine"]["name"], r["model"]["name"]
    return [
        "## Speed on a GPU",
        f"Tokens per second of one sequence (over dense) and rows read, by depth: {model} with random weights on one {gpu}, "
        f"`{r['command']}` at {r['commit']} ([{SPEED.name}](../bench/results/{SPEED.name})). Random weights: successive queries are "
        "hardly alike, so that policies that look whether a choice serves again (`tactic_recycled`, `token_select`) gain little by it.",
        table(["policy", *(f"at {d}, tok/s" for d in depths), *(f"read at {d}" for d in depths)], rows),
    ]


def page(report: dict[str, Any], ours: bool) -> str:
    """The results page. ours: with what else has been measured of this model."""
    d, equal = report["defaults"], report["equal"]
    mass = [r for r in d["rows"] if r["attention"] in (*MASS, "streaming")]
    parts = [
        "# Results: attention policies beside each other",
        f"Made by `{report['command']}` at {report['commit']} ({report['cpus']} cores, {report['seconds']} s); "
        "[bench/results/policies.json](../bench/results/policies.json) has more digits and the densities by layer. "
        "[long-context.md](long-context.md) explains the words.",
        f"{d['model']}, {d['n_prompt']} tokens of `jargon-60k.txt` read densely, then {d['n_decode']} more decoded one by one; "
        f"NLL of dense attention {d['dense_nll']:.3f}. Everything is against dense attention from the same prefill. So few tokens: "
        "differences of a few tenths in KL's second digit, and of 3 % in top-1, are noise.",
        "*density* counts what a method chose, *read* also sinks, window, tokens since a choice, and the full steps of Recycled Attention. "
        "Neither counts what a method reads to choose: Tactic its index (about 5 % of the cache), Quest its bounds (6 %), TokenSelect and "
        "the oracles all keys whenever they choose. *stride*: steps for each choice. *overlap*: of the rows of a choice, those that the "
        "one before it had. *true mass* leaves full steps out.",
        "## At the defaults",
        "Those of their authors, but for Tactic: its estimator `moment` and the tail are this project's ([ablation](../bench/results/"
        "ablation.md) has it as published).",
        table(["policy", *HEAD], [[f"`{r['attention']}`", *cells(r)] for r in d["rows"] if r["attention"] not in MASS]),
        "## At equal density",
        "Sinks (16) and window (128) are the same for all, 1.8 % of the context. Quest, TokenSelect and `oracle` with a budget choose so "
        "many rows per kv head; Tactic and `oracle` by mass get the P that gives this density in the mean over layers and heads; "
        "StreamingLLM gets a longer window; Recycled Attention's full steps count, so that they come less often at small budgets.",
    ]
    for wanted in dict.fromkeys(r["wanted_density"] for r in equal["rows"]):
        rows = sorted((r for r in equal["rows"] if r["wanted_density"] == wanted), key=lambda r: r["kl"])
        parts += [f"### {100 * wanted:g} %", table(["policy", *HEAD], [[f"`{r['attention']}`", *cells(r)] for r in rows])]
    parts += [
        "## Recycled Attention: how long a choice holds",
        f"The choice is that of the last prompt token; the {d['n_decode']} tokens after it attend to it, the sinks, the window and what "
        "has come since. Share of the softmax mass of dense attention, mean over heads, layers and tokens, and the lowest tenth "
        "of them (published, Llama-3.1-8B: over 90 %, sinks and window about 65 %).",
        table(["policy", "read", "true mass", "p10", "KL"], [
            [f"`{r['attention']}`", share(r["read"]), share(r["true_mass"]), share(r["true_mass_p10"]), f"{r['kl']:.4f}"] for r in mass
        ]),
        *(answers(json.loads(ANSWERS.read_text(encoding="utf-8"))) if ours else []),
        *(endless(json.loads(ENDLESS.read_text(encoding="utf-8"))) if ours else []),
        *(speed(json.loads(SPEED.read_text(encoding="utf-8"))) if ours else []),
        "## Larger models, longer contexts",
        "The same page for another model, and questions whose answers lie in the context:",
        "```sh\n# not run by the tests: the weights are large\n"
        "python bench/policies.py run --model Qwen/Qwen2.5-7B-Instruct --file BOOK.txt --prompt-tokens 30000 --decode-tokens 256 \\\n"
        "  --out qwen.json --page qwen.md\n"
        "pyruntime eval meta-llama/Llama-3.1-8B-Instruct --file BOOK.txt --tasks needle,kv,chain --lengths 8192,32768 --questions 50 \\\n"
        "  --attention tactic,recycled,recycled:stride=10,k=2048,tactic_recycled,streaming,quest,token_select --out llama.json\n"
        "pyruntime eval MODEL --file BOOK.txt --prompt-tokens 30000 --decode-tokens 256 --density 1,2,5,10 \\\n"
        "  --attention tactic,recycled,quest,token_select,streaming,oracle,oracle:budget=1\n```",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("do", choices=("run", "page"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--file", type=Path, default=ROOT / "tests" / "data" / "jargon-60k.txt")
    parser.add_argument("--prompt-tokens", type=int, default=7936)
    parser.add_argument("--decode-tokens", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    if arguments.do == "run":
        run(arguments)
    report = json.loads(arguments.out.read_text(encoding="utf-8"))
    arguments.page.write_text(page(report, arguments.out == OUT), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
