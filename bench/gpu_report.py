"""Puts the measurements of one GPU into bench/results/<gpu>.json and says how far each target was reached.

    prt-bench -c llama3.1-8b -p 512,8192 -n 128 --ops -q --out short.json
    prt-bench -c llama3.1-8b -p 0 -n 64 -d 2048,131072 -b 1,8,32 -r 3 -q --out long.json
    prt-bench -c llama3.1-8b -p 0 -n 64 -d 131072 -r 3 -q --attention tactic --selected 0.005,0.01,0.02,0.05,0.1 --ops --structured \\
        --match "decode attention" --out sparse.json
    python bench/peers/llama_cpp_cuda.py --work DIR --out llama.json
    python bench/peers/flashinfer_attention.py --beside prt-bench --rounds 3 --out flashinfer.json
    python bench/load_time.py FOLDER --out load.json
    python bench/gpu_report.py --prt-bench short.json long.json sparse.json --llama llama.json --flashinfer flashinfer.json \\
        --load-time load.json

Of rows that several files have, the last one's count; all files must be of the same commit. --more FILE adds figures that none of these
programs makes, as a JSON object; its "wheel_bytes" is a target too.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

Json = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
SPARSE = "select + sparse_attention"


class Figures:
    """What was measured, by name; None where it was not."""

    def __init__(self, result: Json) -> None:
        self.result = result
        self.tests = {t["test"]: t for t in result.get("tests", [])}
        self.ops = {f"{o['op']} {o['shape']}" + (f", {o['selected']:g}" if "selected" in o else ""): o for o in result.get("ops", [])}

    def tok_s(self, test: str) -> float | None:
        """Of one end-to-end test; the comparison's own run counts where there is one."""
        for row in self.result.get("llama_cpp", {}).get("rows", []):
            if row["test"] == test:
                return float(row["ours"]["tok_s_mean"])
        return float(self.tests[test]["tok_s_mean"]) if test in self.tests else None

    def ratio(self, test: str) -> float | None:
        for row in self.result.get("llama_cpp", {}).get("rows", []):
            if row["test"] == test and "ratio" in row:
                return float(row["ratio"])
        return None

    def share(self, test: str) -> float | None:
        """Of the bytes floor, in per cent."""
        t = self.tests.get(test)
        return 100 * float(t["share"]) if t and "share" in t else None

    def tflops(self, op: str) -> float | None:
        o = self.ops.get(op)
        return float(o["flops"]) / float(o["us"]) / 1e6 if o else None

    def flashinfer(self) -> dict[str, float]:
        """batch x context -> us of dense decode attention, the best of its page sizes."""
        best: dict[tuple[int, int], float] = {}
        for row in self.result.get("flashinfer", {}).get("rows", []):
            if row["test"] == "decode":
                key = (row["batch"], row["context"])
                best[key] = min(float(row["us"]), best.get(key, float("inf")))
        return {f"{batch} x {context}": us for (batch, context), us in sorted(best.items())}

    def sparse_against_flashinfer(self, shape: str, selected: float = 0.02) -> float | None:
        """FlashInfer's time of dense attention over that of selection and sparse attention."""
        ours, theirs = self.ops.get(f"{SPARSE} {shape}, {selected:g}"), self.flashinfer().get(shape)
        return theirs / float(ours["us"]) if ours and theirs else None

    def sparse_speedup(self, test: str, selected: str = "2 %") -> float | None:
        """Tokens per second of sparse decoding over dense, in one run."""
        dense, sparse = self.tests.get(test), self.tests.get(f"{test} tactic {selected}")
        return float(sparse["tok_s_mean"]) / float(dense["tok_s_mean"]) if dense and sparse else None

    def sparse_against_llama(self, test: str, selected: str = "2 %") -> float | None:
        sparse = self.tests.get(f"{test} tactic {selected}")
        for row in self.result.get("llama_cpp", {}).get("rows", []):
            if row["test"] == test and "theirs" in row and sparse:
                return float(sparse["tok_s_mean"]) / float(row["theirs"]["tok_s_mean"])
        return None

    def clustering_share(self, depth: int) -> float | None:
        """Of the time that reading the prompt took, in per cent."""
        shares = [
            100 * t["cluster_seconds"] / t["prompt_seconds"] for t in self.tests.values() if t.get("prompt_seconds") and t["depth"] == depth
        ]
        return max(shares, default=None)

    def index_share(self) -> float | None:
        memory = self.result.get("sparse_memory", {})
        return 100 * memory["index_bytes"] / memory["kv_bytes"] if "index_bytes" in memory else None

    def decode_against_flashinfer(self) -> list[tuple[str, float, float]]:
        """(batch x context, our time, our time over theirs) for every row that both measured; in turns, if they were."""
        turns = {f"{r['batch']} x {r['context']}": float(r["us"]) for r in self.result.get("flashinfer", {}).get("ours", [])}
        found = []
        for shape, us in self.flashinfer().items():
            op = self.ops.get(f"attention_decode {shape}")
            ours = turns.get(shape, float(op["us"]) if op else None)
            if ours:
                found.append((shape, ours, ours / us))
        return found

    def worst_against_flashinfer(self) -> float | None:
        return max((ratio for _, _, ratio in self.decode_against_flashinfer()), default=None)

    def beyond_mib(self) -> float | None:
        beyond = self.result.get("memory", {}).get("beyond_weights_and_kv")
        return beyond / 2**20 if beyond else None

    def first_token_seconds(self) -> float | None:
        runs = [float(run["first_token_seconds"]) for run in self.result.get("load_time", {}).get("runs", [])]
        return median(runs) if runs else None

    def more(self, key: str, scale: float = 1.0) -> float | None:
        value = self.result.get("more", {}).get(key)
        return None if value is None else float(value) / scale


@dataclass
class Target:
    what: str
    unit: str
    floor: float
    aim: float
    value: Callable[[Figures], float | None]
    less_is_better: bool = False

    def reached(self, value: float, limit: float) -> bool:
        return value <= limit if self.less_is_better else value >= limit


# One H200, Llama-3.1-8B in bf16.
TARGETS = [
    Target("decode, batch 1, tg128", "tok/s", 235, 256, lambda f: f.tok_s("tg128")),
    Target("decode at depth 131072", "tok/s", 110, 121, lambda f: f.tok_s("tg64 @ d131072")),
    Target("decode attention, slowest row over FlashInfer's time", "x", 1.00, 0.95, Figures.worst_against_flashinfer, True),
    Target("decode, batch 8, depth 2048, of the bytes floor", "%", 80, 92, lambda f: f.share("tg64 @ d2048 b8")),
    Target("decode, batch 32, depth 2048, of the bytes floor", "%", 80, 92, lambda f: f.share("tg64 @ d2048 b32")),
    Target("prefill pp512 over llama.cpp", "x", 1.0, 1.4, lambda f: f.ratio("pp512")),
    Target("prefill pp8192 over llama.cpp", "x", 1.0, 1.4, lambda f: f.ratio("pp8192")),
    Target("prefill attention, causal, 8192", "TFLOP/s", 380, 620, lambda f: f.tflops("attention_prefill 8192")),
    Target("prefill attention, causal, 32768", "TFLOP/s", 380, 690, lambda f: f.tflops("attention_prefill 32768")),
    Target("matrix product 8192 x 4096 x 14336", "TFLOP/s", 600, 0.95 * 780, lambda f: f.tflops("linear 8192 x 4096 x 14336")),
    Target("Model(...) to the first token, 16 GB in the page cache", "s", 8, 4, Figures.first_token_seconds, True),
    Target("memory beyond weights and KV", "MiB", 600, 300, Figures.beyond_mib, True),
    Target(
        "sparse decode attention 1 x 131072, 2 %, over FlashInfer dense", "x", 6, 10, lambda f: f.sparse_against_flashinfer("1 x 131072")
    ),
    Target(
        "sparse decode attention 1 x 32768, 2 %, over FlashInfer dense", "x", 2.5, 4.5, lambda f: f.sparse_against_flashinfer("1 x 32768")
    ),
    Target("sparse decode attention 8 x 65536, 2 %, over FlashInfer dense", "x", 8, 14, lambda f: f.sparse_against_flashinfer("8 x 65536")),
    Target("sparse decode at depth 131072, 2 %, over our dense", "x", 1.58, 1.9, lambda f: f.sparse_speedup("tg64 @ d131072")),
    Target("sparse decode at depth 131072, 2 %, over llama.cpp", "x", 2.3, 2.9, lambda f: f.sparse_against_llama("tg64 @ d131072")),
    Target("clustering at 131072, share of prefill", "%", 3, 1, lambda f: f.clustering_share(131072), True),
    Target("index memory, share of KV", "%", 8, 4, Figures.index_share, True),
    Target("wheel with all architectures", "MB", 60, 30, lambda f: f.more("wheel_bytes", 1e6), True),
]


def targets_table(figures: Figures) -> tuple[str, list[Json]]:
    lines, rows = ["| what | measured | floor to pass | aim | |", "|---|---|---|---|---|"], []
    for t in TARGETS:
        value = t.value(figures)
        if value is None:
            lines.append(f"| {t.what} | - | {t.floor:g} {t.unit} | {t.aim:g} | not measured |")
            continue
        verdict = "aim" if t.reached(value, t.aim) else "pass" if t.reached(value, t.floor) else "FAIL"
        lines.append(f"| {t.what} | {value:.4g} {t.unit} | {t.floor:g} | {t.aim:g} | {verdict} |")
        rows.append({"what": t.what, "value": value, "unit": t.unit, "floor": t.floor, "aim": t.aim, "verdict": verdict})
    return "\n".join(lines), rows


def attention_table(figures: Figures) -> str:
    lines = ["| batch x context | ours, us | FlashInfer, us | ratio |", "|---|---|---|---|"]
    for name, us, ratio in figures.decode_against_flashinfer():
        lines.append(f"| {name} | {us:.1f} | {us / ratio:.1f} | {ratio:.2f} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def sparse_table(figures: Figures) -> str:
    """us of one layer: selection, attention, both; and how that compares with dense attention of the same contexts."""
    lines = [
        "| batch x context, rows chosen | select, us | attend, us | both, us | ours dense | FlashInfer dense |",
        "|---|---|---|---|---|---|",
    ]
    theirs = figures.flashinfer()
    for op in figures.ops.values():
        if op["op"] != SPARSE:
            continue
        shape, chosen, us = op["shape"], op["selected"], float(op["us"])
        parts = [figures.ops.get(f"{name} {shape}, {chosen:g}") for name in ("select", "sparse_attention")]
        dense = figures.ops.get(f"attention_decode {shape}")
        cells = [f"{float(p['us']):.1f}" if p else "-" for p in parts] + [f"{us:.1f}"]
        cells += [f"{x:.1f} ({x / us:.1f}x)" if x else "-" for x in (float(dense["us"]) if dense else None, theirs.get(shape))]
        lines.append(f"| {shape}, {100 * op['selected_rows']:.2f} % | " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""


def clustering_table(figures: Figures) -> str:
    lines = ["| clustering, batch x context | us per layer | us per 2048 tokens |", "|---|---|---|"]
    for op in figures.ops.values():
        if op["op"] == "cluster":
            batch, context = map(int, op["shape"].split(" x "))
            lines.append(f"| {op['shape']} | {float(op['us']):.0f} | {float(op['us']) * 2048 / (batch * context):.1f} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def merged(old: list[Json], new: list[Json], key: Callable[[Json], object]) -> list[Json]:
    """New rows replace old ones of the same key, in their place."""
    rows = {key(row): row for row in old}
    rows.update({key(row): row for row in new})
    return list(rows.values())


def gather(args: argparse.Namespace) -> Json:
    result: Json = {}
    for path in args.prt_bench:
        run: Json = json.loads(path.read_text())
        if not run.get("prt_bench"):
            raise SystemExit(f"{path} was not written by prt-bench")
        for what, here, there in (
            ("model", run["model"]["name"], result.get("model", {}).get("name")),
            ("device", run["machine"]["name"], result.get("machine", {}).get("name")),
            ("commit", run["commit"], result.get("commit")),
        ):
            if there not in (None, here) and not (what == "commit" and args.commit):
                raise SystemExit(f"{path} has {what} {here}, the file before it {there}")
        for field in ("commit", "date", "machine", "model", "ceilings"):
            if field in run:
                result[field] = run[field]
        if "beyond_weights_and_kv" in run["memory"] or "memory" not in result:
            result["memory"] = run["memory"]
        result["tests"] = merged(result.get("tests", []), run["tests"], lambda t: t["test"])
        result["ops"] = merged(result.get("ops", []), run["ops"], lambda o: (o["group"], o["op"], o["shape"]))
        if "index_bytes" in run["memory"]:
            result["sparse_memory"] = run["memory"]
    for field, path in (("llama_cpp", args.llama), ("flashinfer", args.flashinfer), ("load_time", args.load_time)):
        if path:
            result[field] = json.loads(path.read_text())
    for path in args.more:
        result.setdefault("more", {}).update(json.loads(path.read_text()))
    if args.commit:
        result["commit"] = args.commit
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prt-bench", type=Path, nargs="+", required=True, metavar="JSON", help="written by prt-bench --out")
    parser.add_argument("--llama", type=Path, metavar="JSON", help="written by peers/llama_cpp_cuda.py")
    parser.add_argument("--flashinfer", type=Path, metavar="JSON", help="written by peers/flashinfer_attention.py")
    parser.add_argument("--load-time", type=Path, metavar="JSON", help="written by load_time.py")
    parser.add_argument("--more", type=Path, nargs="*", default=[], metavar="JSON", help="other figures")
    parser.add_argument("--commit", help="that was measured (what prt-bench was built from)")
    parser.add_argument("--out", type=Path, help="the result (bench/results/<gpu>.json)")
    args = parser.parse_args()
    for path in [*args.prt_bench, *args.more, *filter(None, (args.llama, args.flashinfer, args.load_time))]:
        if not path.is_file():
            parser.error(f"{path} does not exist")
    machine = json.loads(args.prt_bench[0].read_text()).get("machine", {}).get("name", "gpu")
    out = args.out or RESULTS / (re.sub(r"[^a-z0-9]+", "_", machine.lower().removeprefix("nvidia ")).strip("_") + ".json")
    result = gather(args)
    figures = Figures(result)
    table, result["targets"] = targets_table(figures)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(table)
    if attention := attention_table(figures):
        print("\n" + attention)
    for table in (sparse_table(figures), clustering_table(figures)):
        if table:
            print("\n" + table)
    print(f"\n{out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
