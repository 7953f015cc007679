"""Measures pyruntime next to llama.cpp's llama-bench: same machine, bf16 weights, threads and run, taking turns.

    python bench/peers/llama_cpp.py FOLDER --work BUILD_DIR          # Markdown table
    python bench/peers/llama_cpp.py FOLDER --work BUILD_DIR -o json --out FILE

FOLDER is a bf16 Hugging Face folder of a Llama-family model. On first use the source of llama.cpp is fetched through
pip, built under BUILD_DIR and the model converted there; later runs reuse all three. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean, stdev
from typing import Any

VERSION = "0.3.36"  # of llama-cpp-python, whose source package carries llama.cpp
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
BUSY_LIMIT = 0.03  # share of the machine that others may use before a run is called disturbed

Samples = dict[str, list[float]]  # test name ("pp512", "tg64") -> tokens per second of every repetition


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def fetch_source(work: Path) -> Path:
    """The llama.cpp source tree under `work`, downloaded and checked on first use."""
    tree = work / f"llama_cpp_python-{VERSION}" / "vendor" / "llama.cpp"
    if tree.is_dir():
        return tree
    say(f"fetching the source of llama-cpp-python {VERSION} (77 MB)")
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "llama-cpp-python"]
    subprocess.run([*pip, "-d", str(work), f"llama-cpp-python=={VERSION}"], check=True)
    archive = work / f"llama_cpp_python-{VERSION}.tar.gz"
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SDIST_SHA256:
        raise SystemExit(f"{archive}: sha256 is {digest}, expected {SDIST_SHA256}")
    with tarfile.open(archive) as tar:
        tar.extractall(work, filter="data")
    return tree


def build(work: Path, jobs: int) -> Path:
    """llama-bench, built for this machine's instruction set; returns the binary."""
    binary = work / "build" / "bin" / "llama-bench"
    if binary.exists():
        return binary
    source = fetch_source(work)
    say(f"building llama-bench in {work / 'build'} with {jobs} jobs (134 files, about 13 CPU minutes)")
    flags = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF"]
    flags += [f"-DLLAMA_{part}=OFF" for part in ("BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_SERVER", "OPENSSL")]
    with (work / "build.log").open("w") as log:
        for command in (
            ["cmake", "-S", str(source), "-B", str(work / "build"), *flags],
            ["nice", "cmake", "--build", str(work / "build"), "--target", "llama-bench", "-j", str(jobs)],
        ):
            if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode:
                raise SystemExit(f"building llama.cpp failed: {shlex.join(command)}; see {work / 'build.log'}")
    return binary


def convert(folder: Path, work: Path) -> Path:
    """The bf16 GGUF of `folder`, kept under `work` and made anew when the folder's weights are newer."""
    from gguf_from_hf import write_gguf  # needs the gguf package, which the comparison on a GPU does without

    out = work / f"{folder.resolve().name}.bf16.gguf"
    newest = max((path.stat().st_mtime for path in folder.glob("*.safetensors")), default=0.0)
    if not out.exists() or out.stat().st_mtime < newest:
        write_gguf(folder, out)
    return out


def busy_seconds() -> tuple[float, float]:
    """CPU seconds that all cores spent working (or lost to the hypervisor), and those of our finished children."""
    ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    times = os.times()
    idle = ticks[3] + ticks[4]
    return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK"), times.children_user + times.children_system


def run_json(command: Sequence[str]) -> tuple[Any, float]:
    """What the command printed, and the share of the machine that others used while it ran."""
    start, (all_before, ours_before) = time.monotonic(), busy_seconds()
    result = subprocess.run(command, capture_output=True, text=True)
    seconds, (all_after, ours_after) = time.monotonic() - start, busy_seconds()
    if result.returncode:
        raise SystemExit(f"{shlex.join(command)} exited with {result.returncode}:\n{result.stderr[-2000:]}")
    others = (all_after - all_before - (ours_after - ours_before)) / (seconds * (os.cpu_count() or 1))
    try:
        return json.loads(result.stdout), round(max(others, 0.0), 3)
    except json.JSONDecodeError:
        raise SystemExit(f"{shlex.join(command)} printed no JSON: {result.stdout[:200]!r}") from None


def llama_bench_samples(rows: list[dict[str, Any]]) -> Samples:
    return {f"pp{row['n_prompt']}" if row["n_prompt"] else f"tg{row['n_gen']}": row["samples_ts"] for row in rows}


def find_ours(command: str | None) -> list[str] | None:
    """`pyruntime` as asked for, beside this Python, or on the PATH; None when it is nowhere."""
    if command:
        return shlex.split(command)
    beside = Path(sys.executable).parent / "pyruntime"
    found = str(beside) if beside.exists() else shutil.which("pyruntime")
    return [found] if found else None


def our_commit() -> str:
    def git(*args: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", "-C", str(here), *args], capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    return f"{commit or 'none'}{'-dirty' if git('status', '--porcelain', '-uno') else ''}"


def cpu_facts() -> dict[str, Any]:
    entry: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        entry[key.strip()] = value.strip()
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
    return {
        "model": entry.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "features": [name for name in wanted if name in entry.get("flags", "").split()],
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Builds what is missing, runs both in turns, and returns everything that is worth keeping."""
    args.work.mkdir(parents=True, exist_ok=True)
    binary = build(args.work, args.jobs)
    model = convert(args.model, args.work)
    common = ["-p", str(args.p), "-n", str(args.n), "-t", str(args.t), "-r", str(args.r), "-o", "json"]
    theirs_command = [str(binary), "-m", str(model), *common]
    ours = find_ours(args.ours)
    ours_command = [*ours, "bench", str(args.model), *common] if ours else None
    if ours_command is None:
        say("pyruntime was not found beside this Python or on the PATH: measuring llama.cpp alone")

    samples: dict[str, Samples] = {"ours": {}, "theirs": {}}
    others: list[float] = []
    theirs_build = ""
    for turn in range(args.rounds):
        for who, command in (("theirs", theirs_command), ("ours", ours_command)):
            if command is None:
                continue
            rows, busy = run_json(command)
            others.append(busy)
            say(f"round {turn + 1} of {args.rounds}: {who} (others used {busy:.0%} of the machine)")
            if who == "theirs":
                theirs_build = f"build {rows[0]['build_number']} ({rows[0]['build_commit']})"
                new = llama_bench_samples(rows)
            else:
                new = {row["test"]: row["tok_s"] for row in rows}
            for test, values in new.items():
                samples[who].setdefault(test, []).extend(values)
    if max(others) > BUSY_LIMIT:
        say(f"warning: others used up to {max(others):.0%} of the machine; repeat when it is idle")

    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_facts(),
        "threads": args.t,
        "model": args.model.resolve().name,
        "dtype": "bf16",
        "rounds": args.rounds,
        "others_busy": others,
        "ours": {"commit": our_commit(), "tests": summary(samples["ours"])},
        "theirs": {
            "version": f"llama.cpp {theirs_build} of llama-cpp-python {VERSION}",
            "tests": summary(samples["theirs"]),
        },
    }


def summary(samples: Samples) -> list[dict[str, Any]]:
    return [{"test": test, "tok_s_mean": mean(x), "tok_s_sd": stdev(x) if len(x) > 1 else 0.0, "tok_s": x} for test, x in samples.items()]


def markdown(result: dict[str, Any]) -> str:
    """One row per test; the ratio is ours / theirs, of the means."""
    ours = {row["test"]: row for row in result["ours"]["tests"]}
    lines = [
        f"{result['model']}, {result['dtype']}, {result['threads']} threads, {result['cpu']['model']}",
        f"pyruntime {result['ours']['commit']} against {result['theirs']['version']}",
        "",
        "| test | pyruntime, tok/s | llama.cpp, tok/s | ratio |",
        "|---|---|---|---|",
    ]
    for theirs in result["theirs"]["tests"]:
        mine = ours.get(theirs["test"])
        cell = f"{mine['tok_s_mean']:.1f} ± {mine['tok_s_sd']:.1f}" if mine else "-"
        ratio = f"{mine['tok_s_mean'] / theirs['tok_s_mean']:.2f}x" if mine else "-"
        lines.append(f"| {theirs['test']} | {cell} | {theirs['tok_s_mean']:.1f} ± {theirs['tok_s_sd']:.1f} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a bf16 Hugging Face folder")
    parser.add_argument("--work", type=Path, required=True, help="folder for the source, the build and the GGUF (1 GB)")
    parser.add_argument("--jobs", type=int, default=2, help="compiler processes (2)")
    parser.add_argument("--ours", help="the command to run instead of the pyruntime found beside this Python")
    parser.add_argument("--rounds", type=int, default=2, help="times that the two take turns (2)")
    parser.add_argument("-p", type=int, default=512, help="prompt tokens (512)")
    parser.add_argument("-n", type=int, default=64, help="generated tokens (64)")
    parser.add_argument("-t", type=int, default=os.cpu_count(), help="threads (all cores)")
    parser.add_argument("-r", type=int, default=5, help="repetitions in each turn (5)")
    parser.add_argument("-o", choices=("md", "json"), default="md", help="what to print (md)")
    parser.add_argument("--out", type=Path, help="write the JSON to this file as well")
    args = parser.parse_args()
    if not (args.model / "config.json").is_file():
        parser.error(f"{args.model} is not a Hugging Face folder: no config.json")
    result = measure(args)
    text = json.dumps(result, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    print(text if args.o == "json" else markdown(result))


if __name__ == "__main__":
    main()
