#!/usr/bin/env python3
"""Throughput and time to the first token of the server, for 1, 4, 16 and 64 requests at a time.

    python bench/server_speed.py smollm2-135m --out bench/results/cpu_server.json

Starts a server and talks to it with OpenAI's client: streams of --max-tokens tokens after prompts of some 100 tokens that share nothing, so
that each is read. Every client asks again as soon as it has its answer; a level ends when --seconds are over and all have theirs. The
time to the first token is what a client sees, waiting included. Needs the extra "server" and the package openai.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import openai
from soak import WORDS, ask, serving


def prompt(rng: random.Random) -> list[dict[str, str]]:
    return [{"role": "user", "content": " ".join(rng.choices(WORDS, k=80))}]


async def level(url: str, n: int, seconds: float, max_tokens: int) -> dict[str, Any]:
    """n clients for so long."""
    firsts: list[float] = []
    load = os.getloadavg()[0]
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=600) as client:
        await ask(client, prompt(random.Random(-n)), 2)  # opens the connection
        started = time.monotonic()

        async def one(seed: int) -> None:
            rng = random.Random(seed)
            while time.monotonic() < started + seconds:
                got = await ask(client, prompt(rng), max_tokens)
                assert got is not None
                firsts.append(got[1])

        await asyncio.gather(*[one(1000 * n + i) for i in range(n)])
        took = time.monotonic() - started
    firsts.sort()
    return {
        "concurrent": n,
        "requests": len(firsts),
        "seconds": round(took, 1),
        "generated_tok_s": round(len(firsts) * max_tokens / took, 1),
        "ttft_p50_s": round(firsts[len(firsts) // 2], 3),
        "ttft_p99_s": round(firsts[min(len(firsts) - 1, len(firsts) * 99 // 100)], 3),
        "load_before": round(load, 1),
        "load_after": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--concurrent", default="1,4,16,64", metavar="N,..", help="(default 1,4,16,64)")
    parser.add_argument("--seconds", type=float, default=30, help="of each level (default 30)")
    parser.add_argument("--max-tokens", type=int, default=32, help="of an answer (default 32)")
    parser.add_argument("--attention", default="full", help="(default full)")
    parser.add_argument("--threads", type=int, help="of the model")
    parser.add_argument("--out", type=Path, help="write the JSON there as well")
    arguments = parser.parse_args()
    rows = []
    with serving(arguments.model, attention=arguments.attention, max_queue=1024, prefix_cache=None, threads=arguments.threads) as (url, _):
        for n in map(int, arguments.concurrent.split(",")):
            rows.append(asyncio.run(level(url, n, arguments.seconds, arguments.max_tokens)))
            print(json.dumps(rows[-1]), flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    report = {
        "commit": commit.stdout.strip(),
        "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "model": arguments.model,
        "attention": arguments.attention,
        "max_tokens": arguments.max_tokens,
        "note": "load_before and load_after are the machine's load averages: above 1 the clients and the server were not alone on it",
        "levels": rows,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
