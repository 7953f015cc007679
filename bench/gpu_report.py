"""Puts the measurements of one GPU into bench/results/<gpu>.json and says how far each target was reached.

    prt-bench -c llama3.1-8b -p 512,8192 -n 128 --ops -q --out short.json
    prt-bench -c llama3.1-8b -p 0 -n 64 -d 2048,131072 -b 1,8,32 -r 3 -q --out long.json
    python bench/peers/llama_cpp_cuda.py --work DIR --out llama.json
    python bench/peers/flashinfer_attention.py --out flashinfer.json
    python bench/load_time.py FOLDER --out load.json
    python bench/gpu_report.py --prt-bench short.json long.json --llama llama.json --flashinfer flashinfer.json --load-time load.json

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


class Figures:
    """What was measured, by name; None where it was not."""

    def __init__(self, result: Json) -> None:
        self.result = result
        self.tests = {t["test"]: t for t in result.get("tests", [])}
        self.ops = {f"{o['op']} {o['shape']}": o for o in result.get("ops", [])}

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

    def decode_against_flashinfer(self) -> list[tuple[str, float]]:
        """(batch x context, our time over theirs) for every row that both measured."""
        theirs: dict[tuple[int, int], float] = {}
        for row in self.result.get("flashinfer", {}).get("rows", []):
            if row["test"] == "decode":
                key = (row["batch"], row["context"])
                theirs[key] = min(float(row["us"]), theirs.get(key, float("inf")))
        found = []
        for (batch, context), us in sorted(theirs.items()):
            ours = self.ops.get(f"attention_decode {batch} x {context}")
            if ours:
                found.append((f"{batch} x {context}", float(ours["us"]) / us))
        return found

    def worst_against_flashinfer(self) -> float | None:
        return max((ratio for _, ratio in self.decode_against_flashinfer()), default=None)

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
    for name, ratio in figures.decode_against_flashinfer():
        us = figures.ops[f"attention_decode {name}"]["us"]
        lines.append(f"| {name} | {us:.1f} | {us / ratio:.1f} | {ratio:.2f} |")
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
    print(f"\n{out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
