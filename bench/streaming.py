#!/usr/bin/env python3
"""StreamingLLM with eviction over a text much longer than the model's context: perplexity by position, and memory.

    python bench/streaming.py --tokens 50000 --out bench/results/streaming.json

The text is read token by token, in a session of `--max-context` tokens; where it ends it starts over.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from pyruntime import Model
from pyruntime.attention import Attention
from pyruntime.evaluate.progress import Bar
from pyruntime.session import Entry, Session

ROOT = Path(__file__).resolve().parent.parent
PARTS = 20


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--file", type=Path, default=ROOT / "tests" / "data" / "jargon-60k.txt")
    parser.add_argument("--tokens", type=int, default=50000)
    parser.add_argument("--attention", default="streaming:sinks=4,window=508,evict=1,min_context=512")
    parser.add_argument("--max-context", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    commit = git.stdout.strip()
    with Model(arguments.model, device="cpu", max_context=arguments.max_context) as model:
        ids = model.tokenize(arguments.file.read_text(encoding="utf-8"))
        text = np.resize(np.asarray(ids, np.int32), arguments.tokens + 1)
        session = Session(model._weights, max_context=arguments.max_context, threads=arguments.threads)
        session.set_attention(Attention.parse(arguments.attention))
        seq = session.create_sequence()
        bar, started = Bar("tokens"), time.perf_counter()
        nll, pages, rss = [], [], []
        for i in range(arguments.tokens):
            result = session.step([Entry(seq, text[i : i + 1])], targets=text[i + 1 : i + 2])
            assert result.target_logprobs is not None
            nll.append(-float(result.target_logprobs[0]))
            if (i + 1) % (arguments.tokens // PARTS) > 0:
                continue
            stats = session.stats()
            pages.append(stats["n_page"] - stats["n_page_free"])
            rss.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
            report = {
                "command": shlex.join(["python", "bench/streaming.py", *sys.argv[1:]]), "commit": commit, "cpus": os.cpu_count(),
                "attention": arguments.attention, "max_context": arguments.max_context, "text_tokens": len(ids), "tokens": i + 1,
                "perplexity_by_part": [round(math.exp(part.mean()), 3) for part in np.array_split(np.array(nll), len(pages))],
                "perplexity": round(math.exp(np.mean(nll)), 3), "pages": pages, "peak_pages": stats["n_page_peak"],
                "peak_rss_mib": rss, "tok_s": round((i + 1) / (time.perf_counter() - started), 1),
            }  # fmt: skip
            if arguments.out:  # as far as it has come
                arguments.out.write_text(json.dumps(report) + "\n", encoding="utf-8")
            bar(i + 1, arguments.tokens)
        session.close()
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
