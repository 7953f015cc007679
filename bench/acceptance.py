#!/usr/bin/env python3
"""What must hold for a release, checked on a real model: one PASS or FAIL line each, and the figures as JSON.

    python bench/acceptance.py --text tests/data/jargon-60k.txt [--hf FOLDER] [--hf-32k FOLDER] [--wheel FILE] [--out FILE]

--text: the text whose perplexities are known. --hf, --hf-32k: SmolLM2-135M as Hugging Face folders, the original and the one stretched to
32K tokens (rope_theta 500000). The known perplexities come from transformers in float32. Runs the installed `pyruntime` command.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

PERPLEXITY = {("smollm2-135m", 2048): 13.44, ("smollm2-135m", 8192): 42.97, ("hf", 2048): 13.44, ("hf_32k", 2048): 9.87}
TOLERANCE = 0.005

MEMORY_PROBE = """
import resource, sys
import pyruntime
def rss():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))
model = pyruntime.Model("smollm2-135m", threads=2)
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")  # restart the high-water mark after load
model.generate("Hello " * 400, max_tokens=64, temperature=0, ignore_eos=True)
stats = model.stats()
used = stats["n_page_peak"] * stats["page_bytes"]
print(rss() - stats["weight_bytes"] - used)
"""


class Report:
    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []

    def add(self, name: str, passed: bool, value: object, expected: str) -> None:
        self.rows.append({"check": name, "passed": passed, "value": value, "expected": expected})
        print(f"{'PASS' if passed else 'FAIL'}  {name}: {value} (expected {expected})", flush=True)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = Path(sys.executable).with_name("pyruntime")
    return subprocess.run([str(command), *arguments], capture_output=True, text=True)


def fastest(command: list[str], repetitions: int = 5) -> float:
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, cwd="/")
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--hf", type=Path)
    parser.add_argument("--hf-32k", type=Path)
    parser.add_argument("--wheel", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    report = Report()

    answer = run("run", "smollm2-135m", "--chat", "--temperature", "0", "What is the capital of France?")
    report.add("the capital of France", "Paris" in answer.stdout, answer.stdout.strip() or answer.stderr.strip(), "Paris")

    models = {"smollm2-135m": "smollm2-135m", "hf": arguments.hf, "hf_32k": arguments.hf_32k}
    for (name, tokens), expected in PERPLEXITY.items():
        if models[name] is None:
            print(f"SKIP  perplexity of {name}: no folder given")
            continue
        done = run("perplexity", str(models[name]), "--file", str(arguments.text), "--tokens", str(tokens), "--json")
        value = json.loads(done.stdout)["perplexity"] if done.returncode == 0 else done.stderr.strip()
        ok = isinstance(value, float) and abs(value / expected - 1) <= TOLERANCE
        report.add(
            f"perplexity of {name}, {tokens} tokens", ok, round(value, 4) if isinstance(value, float) else value, f"{expected} +- 0.5 %"
        )

    python = sys.executable
    base = fastest([python, "-c", "pass"])
    seconds = fastest([python, "-c", "import pyruntime"]) - base
    report.add("import pyruntime", seconds < 0.2, f"{seconds:.3f} s", "< 0.2 s")
    seconds = fastest([str(Path(python).with_name("pyruntime")), "--help"])
    report.add("pyruntime --help", seconds < 0.3, f"{seconds:.3f} s", "< 0.3 s")
    extra = subprocess.run([python, "-c", MEMORY_PROBE], capture_output=True, text=True, cwd="/")
    value = int(extra.stdout) / 2**20 if extra.returncode == 0 else extra.stderr.strip()[-200:]
    ok = isinstance(value, float) and value <= 100
    report.add("peak resident memory beyond weights and KV", ok, f"{value:.1f} MiB" if isinstance(value, float) else value, "<= 100 MB")
    if arguments.wheel:
        size = arguments.wheel.stat().st_size
        report.add("CPU wheel", size < 3_000_000 and "py3-none" in arguments.wheel.name, f"{size / 1e6:.2f} MB", "< 3 MB, py3-none")

    if arguments.out:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
        machine = {
            "commit": commit.stdout.strip(),
            "machine": platform.processor() or platform.machine(),
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
        }
        arguments.out.write_text(json.dumps({**machine, "checks": report.rows}, indent=1) + "\n")
    return 0 if all(row["passed"] for row in report.rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
