"""Measures pyruntime next to llama.cpp's llama-bench on a GPU: same shapes, bf16 random weights, one run, one after the other.

    python bench/peers/llama_cpp_cuda.py --work DIR                             # Markdown table, Llama-3.1-8B
    python bench/peers/llama_cpp_cuda.py --work DIR -o json --out FILE          # the same with every sample kept

DIR keeps llama.cpp's source, its CUDA build (about 45 CPU minutes for one GPU generation) and the GGUF; --gguf-dir /dev/shm puts the GGUF
into memory. Both programs run greedily from the same depths; llama.cpp uses flash attention, and where its result depends on the physical
batch size (-ub, prompts) the better of 512 and 2048 counts. Its repetitions start from the same depth, as ours do.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from gguf_random import write_random_gguf
from llama_cpp import VERSION, Samples, fetch_source, our_commit, say

# Tests as prt-bench and llama-bench take them: one process each, the model loaded once. The second is decode in long contexts.
SHORT = ["-p", "512,8192", "-n", "128", "-d", "0"]
LONG = ["-p", "0", "-n", "64", "-d", "8192,32768,65536,131072"]
FLAGS = ["-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DGGML_CUDA=ON", "-DGGML_CUDA_NO_VMM=ON", "-DGGML_NATIVE=OFF"]
FLAGS += [f"-DLLAMA_{part}=OFF" for part in ("BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_SERVER", "BUILD_APP", "OPENSSL")]


def build(work: Path, jobs: int, architectures: str) -> Path:
    """llama-bench with CUDA; needs nvcc and cuBLAS on this machine."""
    binary = work / "build-cuda" / "bin" / "llama-bench"
    if binary.exists():
        return binary
    source = fetch_source(work)
    say(f"building llama-bench in {binary.parent.parent} with {jobs} jobs (about 45 CPU minutes)")
    with (work / "build-cuda.log").open("w") as log:
        for command in (
            ["cmake", "-S", str(source), "-B", str(work / "build-cuda"), *FLAGS, f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"],
            ["cmake", "--build", str(work / "build-cuda"), "--target", "llama-bench", "-j", str(jobs)],
        ):
            if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode:
                raise SystemExit(f"building llama.cpp failed: {shlex.join(command)}; see {work / 'build-cuda.log'}")
    return binary


def run_json(command: Sequence[str]) -> Any:
    """What the command printed; what it says on the way goes to our stderr."""
    say(shlex.join(command))
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        raise SystemExit(f"{shlex.join(command)} exited with {result.returncode}")
    try:
        return json.loads(result.stdout)
    except json.JSONDecodeError:
        raise SystemExit(f"{shlex.join(command)} printed no JSON: {result.stdout[:200]!r}") from None


def best_samples(rows: list[dict[str, Any]]) -> Samples:
    """llama-bench's rows by our names; of several physical batch sizes the fastest."""
    best: Samples = {}
    for row in rows:
        name = f"pp{row['n_prompt']}" if row["n_prompt"] else f"tg{row['n_gen']}"
        name += f" @ d{row['n_depth']}" if row.get("n_depth") else ""
        if name not in best or mean(row["samples_ts"]) > mean(best[name]):
            best[name] = row["samples_ts"]
    return best


def statistics_of(values: list[float]) -> dict[str, Any]:
    return {"tok_s_mean": mean(values), "tok_s_sd": stdev(values) if len(values) > 1 else 0.0, "tok_s": values}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    ours = shlex.split(args.prt_bench)
    configs = {c["name"]: c for c in run_json([*ours, "--list-configs", "-o", "json"])}
    if args.config not in configs:
        raise SystemExit(f"--config is {args.config!r}, expected one of {', '.join(configs)}")
    args.work.mkdir(parents=True, exist_ok=True)
    binary = args.llama_bench or build(args.work, args.jobs, args.architectures)
    gguf = (args.gguf_dir or args.work) / f"{args.config}.random.gguf"
    if not gguf.exists():
        say(f"writing {gguf}")
        write_random_gguf(configs[args.config], gguf)

    tests = [("short", SHORT, args.r), ("long", LONG, args.long_r)]
    if args.tests != "all":
        tests = [test for test in tests if test[0] == args.tests]
    theirs: Samples = {}
    machine: dict[str, Any] = {}
    mine: list[dict[str, Any]] = []
    ceilings: dict[str, Any] | None = None
    version = ""
    for name, words, repetitions in tests:
        sizes = ["-ub", "512,2048", "-b", "2048"] if name == "short" else []
        common = [*words, "-r", str(repetitions), "-o", "json"]
        rows = run_json([str(binary), "-m", str(gguf), "-ngl", "999", "-fa", "1", *sizes, *common])
        theirs |= best_samples(rows)
        version = f"llama.cpp build {rows[0]['build_number']} ({rows[0]['build_commit']}) of llama-cpp-python {VERSION}"
        result = run_json([*ours, "--config", args.config, "--device", args.device, *common])
        mine += result["tests"]
        machine, ceilings = result["machine"], result.get("ceilings", ceilings)
    if not args.keep:
        gguf.unlink()
    rows = []
    for test in mine:
        row = {"test": test["test"], "ours": {key: test[key] for key in ("tok_s_mean", "tok_s_sd", "tok_s")}}
        if test["test"] in theirs:
            row["theirs"] = statistics_of(theirs[test["test"]])
            row["ratio"] = test["tok_s_mean"] / row["theirs"]["tok_s_mean"]
        rows.append(row)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": args.commit or our_commit(),
        "machine": machine,
        "ceilings": ceilings,
        "model": args.config,
        "dtype": "bf16",
        "theirs": version,
        "rows": rows,
    }


def markdown(result: dict[str, Any]) -> str:
    lines = [
        f"{result['model']}, bf16, random weights, {result['machine']['name']}, driver {result['machine']['driver']}",
        f"pyruntime {result['commit']} against {result['theirs']}",
        "",
        "| test | pyruntime, tok/s | llama.cpp, tok/s | ratio |",
        "|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = [f"{x['tok_s_mean']:.1f} ± {x['tok_s_sd']:.1f}" if x else "-" for x in (row["ours"], row.get("theirs"))]
        cells.append(f"{row['ratio']:.2f}x" if "ratio" in row else "-")
        lines.append(f"| {row['test']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the source, the build and the GGUF")
    parser.add_argument("--config", default="llama3.1-8b", help="a name that prt-bench knows (llama3.1-8b)")
    parser.add_argument("--prt-bench", default=shutil.which("prt-bench") or "prt-bench", help="our command (prt-bench on the PATH)")
    parser.add_argument("--llama-bench", type=Path, help="a llama-bench built elsewhere; without it, one is built")
    parser.add_argument("--gguf-dir", type=Path, help="where the GGUF goes (--work)")
    parser.add_argument("--keep", action="store_true", help="leave the GGUF there")
    parser.add_argument("--device", default="cuda:0", help="ours (cuda:0); llama.cpp takes the GPUs it sees")
    parser.add_argument("--architectures", default="native", help="GPU generations to build for (native)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compiler processes (all cores)")
    parser.add_argument(
        "--tests",
        choices=("all", "short", "long"),
        default="all",
        help="all, or prompts and decode without a context, or decode in contexts",
    )
    parser.add_argument("-r", type=int, default=5, help="repetitions (5)")
    parser.add_argument("--long-r", type=int, default=3, help="repetitions in long contexts (3)")
    parser.add_argument("--commit", help="of pyruntime (read from git)")
    parser.add_argument("-o", choices=("md", "json"), default="md", help="what to print (md)")
    parser.add_argument("--out", type=Path, help="write the JSON to this file as well")
    args = parser.parse_args()
    result = measure(args)
    text = json.dumps(result, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    print(text if args.o == "json" else markdown(result))


if __name__ == "__main__":
    main()
