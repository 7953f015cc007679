"""Times FlashInfer's attention kernels, one layer of Llama-3.1-8B shape in bf16: paged decode and causal prefill.

    pip install torch ninja flashinfer-python==0.5.3 apache-tvm-ffi
    python bench/peers/flashinfer_attention.py                                  # Markdown table
    python bench/peers/flashinfer_attention.py --decode 1x8192 --prefill "" -o json --out FILE
    python bench/peers/flashinfer_attention.py --beside prt-bench --rounds 3 --out FILE   # taking turns with ours

Decode is the tensor-core path (the fastest one for 4 query heads per kv head), in a CUDA graph of launches that take turns on KV sets
larger together than the L2. Prefill is one causal sequence over a ragged cache, by both backends ("fa2": mma.sync, "fa3": wgmma).
FlashInfer compiles its kernels on first use, which takes minutes; `--compile-only` does just that.

A GPU's memory gets about a percent slower as it warms up, so whoever comes first looks faster. With `--beside`, ours and theirs are
measured in turns, `--rounds` times, and every figure is the median of its rounds.

JSON: {"gpu", "torch", "flashinfer", "h_q", "h_kv", "d_head", "rows": [{"test": "decode" | "prefill", "backend", "batch", "context", "page",
"us", "us_all", and "tb_s" or "tflop_s"}]}. `us` is the median of `us_all`, the time of one launch in each replay of the graph of every
round. With `--beside` also "ours": [{"batch", "context", "us", "us_all"}], a figure of `us_all` for each round.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

H_Q, H_KV, D_HEAD = 32, 8, 128
DECODE = "1x8192,1x32768,1x65536,1x131072,4x8192,4x32768,4x65536,4x131072,8x8192,8x32768,8x65536,32x2048"
PREFILL = "512,2048,8192,32768"
REPLAYS = 7
ROTATED_BYTES = 512 << 20  # KV sets together: several times any L2
KV_LIMIT = 5 << 30

Row = dict[str, Any]
Launch = Callable[[int], object]


def parse_decode(text: str) -> list[tuple[int, int]]:
    """ "4x8192,8x2048" -> [(4, 8192), (8, 2048)]: batch and context."""
    pairs = [item.split("x") for item in text.split(",") if item]
    return [(int(batch), int(context)) for batch, context in pairs]


class Peer:
    """torch and FlashInfer, imported where they are needed: neither is a dependency of pyruntime."""

    def __init__(self) -> None:
        self.torch: Any = importlib.import_module("torch")
        self.flashinfer: Any = importlib.import_module("flashinfer")
        self.device: Any = self.torch.device("cuda", 0)
        self.workspace: Any = self.torch.zeros(512 << 20, dtype=self.torch.uint8, device=self.device)

    def compile(self) -> None:
        """Builds the two modules that the tests below use, both at once."""
        modules: Any = importlib.import_module("flashinfer.jit.attention.modules")
        t = self.torch

        def build(backend: str) -> None:
            types = (t.bfloat16, t.bfloat16, t.bfloat16, t.int32)
            modules.gen_batch_prefill_module(backend, *types, D_HEAD, D_HEAD, 0, False, False, False).build_and_load()

        with ThreadPoolExecutor() as pool:
            list(pool.map(build, ("fa2", "fa3")))

    def randn(self, *shape: int) -> Any:
        return self.torch.randn(shape, dtype=self.torch.bfloat16, device=self.device)

    def ints(self, values: Any) -> Any:
        return self.torch.tensor(values, dtype=self.torch.int32, device=self.device)

    def time_graph(self, launch: Launch, n: int) -> list[float]:
        """Microseconds per launch of a graph of `n` launches, one figure per replay, slowest first call left out."""
        t = self.torch
        for i in range(2):
            launch(i)
        t.cuda.synchronize()
        graph = t.cuda.CUDAGraph()
        with t.cuda.graph(graph):
            for i in range(n):
                launch(i)
        times = []
        for _ in range(REPLAYS + 1):
            begin, end = t.cuda.Event(enable_timing=True), t.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(1000 * float(begin.elapsed_time(end)) / n)
        return times[1:]

    def decode(self, batch: int, context: int, page: int, padded: bool) -> Row:
        """Paged decode. `padded`: planned for graphs whose lengths change, as a server would; otherwise for these lengths alone."""
        t, n_page = self.torch, batch * math.ceil(context / page)
        set_bytes = 2 * n_page * page * H_KV * D_HEAD * 2
        n_set = max(1, min(math.ceil(ROTATED_BYTES / set_bytes), KV_LIMIT // set_bytes))
        caches = [(self.randn(n_page, page, H_KV, D_HEAD), self.randn(n_page, page, H_KV, D_HEAD)) for _ in range(n_set)]
        begin = self.ints(range(0, n_page + 1, n_page // batch))
        pages = t.randperm(n_page, device=self.device).to(t.int32)
        last = self.ints([(context - 1) % page + 1] * batch)
        buffers = (begin.clone(), pages.clone(), last.clone()) if padded else (None, None, None)
        wrapper = self.flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self.workspace, "NHD", use_cuda_graph=padded, use_tensor_cores=True,
            paged_kv_indptr_buffer=buffers[0], paged_kv_indices_buffer=buffers[1], paged_kv_last_page_len_buffer=buffers[2],
        )  # fmt: skip
        wrapper.plan(begin, pages, last, H_Q, H_KV, D_HEAD, page, q_data_type=t.bfloat16, kv_data_type=t.bfloat16)
        q = self.randn(batch, H_Q, D_HEAD)
        out = t.empty_like(q)
        n = max(n_set, 4) if set_bytes < 1 << 28 else 3
        us = self.time_graph(lambda i: wrapper.run(q, caches[i % n_set], out=out), n)
        backend = "fa2 padded" if padded else "fa2"
        rate = 2 * batch * context * H_KV * D_HEAD * 2 / median(us) / 1e6
        return {"test": "decode", "backend": backend, "batch": batch, "context": context, "page": page, "us": median(us),
                "us_all": us, "tb_s": rate}  # fmt: skip

    def prefill(self, context: int, backend: str) -> Row:
        t = self.torch
        q, k, v = self.randn(context, H_Q, D_HEAD), self.randn(context, H_KV, D_HEAD), self.randn(context, H_KV, D_HEAD)
        begin = self.ints([0, context])
        wrapper = self.flashinfer.BatchPrefillWithRaggedKVCacheWrapper(self.workspace, "NHD", backend=backend)
        wrapper.plan(begin, begin, H_Q, H_KV, D_HEAD, causal=True, q_data_type=t.bfloat16, kv_data_type=t.bfloat16)
        out = t.empty_like(q)
        us = self.time_graph(lambda i: wrapper.run(q, k, v, out=out), 10 if context <= 8192 else 3)
        rate = 2 * context * (context + 1) * H_Q * D_HEAD / median(us) / 1e6
        return {"test": "prefill", "backend": backend, "batch": 1, "context": context, "page": 0, "us": median(us), "us_all": us,
                "tflop_s": rate}  # fmt: skip

    def verify(self) -> None:
        """One small decode against torch in float32, so that a broken build cannot pass for a fast one."""
        t, context, page = self.torch, 1000, 16
        n_page = math.ceil(context / page)
        k, v, q = self.randn(n_page, page, H_KV, D_HEAD), self.randn(n_page, page, H_KV, D_HEAD), self.randn(1, H_Q, D_HEAD)
        wrapper = self.flashinfer.BatchDecodeWithPagedKVCacheWrapper(self.workspace, "NHD", use_tensor_cores=True)
        last = self.ints([(context - 1) % page + 1])
        wrapper.plan(self.ints([0, n_page]), self.ints(range(n_page)), last, H_Q, H_KV, D_HEAD, page,
                     q_data_type=t.bfloat16, kv_data_type=t.bfloat16)  # fmt: skip
        got = wrapper.run(q, (k, v))[0].float()
        keys = k.flatten(0, 1)[:context].float().repeat_interleave(H_Q // H_KV, 1)
        values = v.flatten(0, 1)[:context].float().repeat_interleave(H_Q // H_KV, 1)
        weights = t.einsum("hd,khd->hk", q[0].float(), keys).div(math.sqrt(D_HEAD)).softmax(-1)
        want = t.einsum("hk,khd->hd", weights, values)
        error = float((got - want).norm() / want.norm())
        if not error < 1e-2:
            raise SystemExit(f"FlashInfer's decode is off by {error:.3g}")


def median_of(rounds: list[list[Row]]) -> list[Row]:
    """The rows of all rounds as one: their times together, and what follows from the median."""
    merged = []
    for same in zip(*rounds, strict=True):
        us_all = [us for row in same for us in row["us_all"]]
        merged.append({**same[0], "us": median(us_all), "us_all": us_all})
        for rate in ("tb_s", "tflop_s"):
            if rate in same[0]:
                merged[-1][rate] = same[0][rate] * same[0]["us"] / median(us_all)
    return merged


def ours(prt_bench: str) -> list[Row]:
    """Our decode attention of the same shapes, by prt-bench."""
    command = [prt_bench, "-c", "llama3.1-8b", "--ops-only", "--no-ceilings", "-q", "--match", "decode attention", "-o", "json"]
    ops = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["ops"]
    rows = []
    for op in ops:
        batch, context = (int(n) for n in op["shape"].split(" x "))
        rows.append({"batch": batch, "context": context, "us": op["us"], "us_all": [op["us"]]})
    return rows


def table(rows: list[Row]) -> str:
    lines = ["| test | backend | batch x context | page | us | rate |", "|---|---|---|---|---|---|"]
    for r in rows:
        rate = f"{r['tb_s']:.2f} TB/s" if "tb_s" in r else f"{r['tflop_s']:.0f} TFLOP/s"
        lines.append(f"| {r['test']} | {r['backend']} | {r['batch']} x {r['context']} | {r['page']} | {r['us']:.1f} | {rate} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times FlashInfer's decode and prefill attention.")
    parser.add_argument("--decode", default=DECODE, help="BATCHxCONTEXT, comma-separated; empty for none")
    parser.add_argument("--pages", default="16,64", help="page sizes of decode (default %(default)s)")
    parser.add_argument("--prefill", default=PREFILL, help="tokens, comma-separated; empty for none")
    parser.add_argument("--beside", metavar="PRT_BENCH", help="our benchmark program: measured in turns with theirs")
    parser.add_argument("--rounds", type=int, default=1, help="how often everything is measured (default %(default)s)")
    parser.add_argument("--compile-only", action="store_true", help="build the kernels and stop")
    parser.add_argument("-o", choices=("md", "json"), default="md", help="what to print")
    parser.add_argument("--out", type=Path, help="file for the JSON")
    args = parser.parse_args()

    peer = Peer()
    peer.compile()
    if args.compile_only:
        return
    peer.verify()
    theirs: list[list[Row]] = []
    beside: list[list[Row]] = []
    for _ in range(args.rounds):
        if args.beside:
            beside.append(ours(args.beside))
        rows: list[Row] = []
        for batch, context in parse_decode(args.decode):
            for page in (int(p) for p in args.pages.split(",")):
                for padded in (False, True):
                    rows.append(peer.decode(batch, context, page, padded))
                    print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
        for context in (int(c) for c in args.prefill.split(",") if c):
            for backend in ("fa2", "fa3"):
                rows.append(peer.prefill(context, backend))
        theirs.append(rows)
    rows = median_of(theirs)
    result: dict[str, Any] = {
        "gpu": peer.torch.cuda.get_device_name(0), "torch": peer.torch.__version__, "flashinfer": peer.flashinfer.__version__,
        "h_q": H_Q, "h_kv": H_KV, "d_head": D_HEAD, "rows": rows,
    }  # fmt: skip
    if beside:
        result["ours"] = median_of(beside)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1) if args.o == "json" else table(rows))


if __name__ == "__main__":
    main()
