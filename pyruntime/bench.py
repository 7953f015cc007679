"""Speed of one model on this machine, in llama-bench's words: pp512 (prefill), tg128 (decode), @ d (tokens already in the cache).

With real weights: `bench()`, which `pyruntime bench` prints. With random weights of any known shape, on the library alone: the program
`prt-bench` that is installed beside it, found by `native_path()`. The rows mean the same in both.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InternalError, InvalidArgumentError
from .model import Model
from .sampling import SamplingParams
from .session import Entry, Int32Array, Sampler

_WARM_UP_STEPS = 8


def bench(
    model: Model,
    *,
    n_prompt: int | Sequence[int],
    n_gen: int | Sequence[int],
    depth: int | Sequence[int],
    batch: int | Sequence[int],
    repetitions: int,
) -> list[dict[str, Any]]:
    """One row per test, for every combination: {"test", "tok_s_mean", "tok_s_sd", "tok_s"}; tokens per second, all sequences together.

    Prompts are random tokens; each decode step takes in the tokens that the one before chose greedily. Each repetition starts from the same
    depth, and a warm-up is not counted.
    """
    values = {"-p": n_prompt, "-n": n_gen, "-d": depth, "-b": batch, "-r": repetitions}
    lists = {name: [value] if isinstance(value, int) else list(value) for name, value in values.items()}
    for name, low in (("-p", 0), ("-n", 0), ("-d", 0), ("-b", 1), ("-r", 1)):
        for value in lists[name]:
            if value < low:
                raise InvalidArgumentError(f"{name} is {value}, expected at least {low}")
    prompts, gens = (sorted(set(lists[name])) for name in ("-p", "-n"))
    for d in lists["-d"]:
        if d + max(prompts[-1], gens[-1]) > model.max_context:
            raise InvalidArgumentError(f"-d {d} with -p {prompts[-1]} and -n {gens[-1]} does not fit max_context {model.max_context}")
    rows = []
    for d in lists["-d"]:
        for b in lists["-b"]:
            with _Depth(model, d, b) as cache:
                tests = [("pp", n) for n in lists["-p"] if n] + [("tg", n) for n in lists["-n"] if n]
                rows += [cache.row(kind, n, repetitions) for kind, n in tests]
    return rows


class _Depth:
    """`batch` sequences with `depth` tokens in the cache, and the tests that start there."""

    def __init__(self, model: Model, depth: int, batch: int) -> None:
        self.session = model._open_session()
        self.depth, self.n_vocab = depth, model.config.n_vocab
        self.rng = np.random.default_rng(0)
        greedy = SamplingParams(temperature=0.0)
        self.samplers = [Sampler(greedy, self.n_vocab, seed=0) for _ in range(batch)]
        self.seqs: list[int] = []
        try:
            for _ in range(batch):
                self.seqs.append(self.session.create_sequence())
                if depth:
                    self.session.step([Entry(self.seqs[-1], self.draw(depth))])
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> _Depth:
        return self

    def __exit__(self, *_: object) -> None:
        for seq in self.seqs:
            self.session.free_sequence(seq)
        for sampler in self.samplers:
            sampler.close()

    def draw(self, n: int) -> Int32Array:
        return self.rng.integers(0, self.n_vocab, n).astype(np.int32)

    def seconds(self, n_steps: int, n_tokens: int) -> float:
        """Time of n_steps steps of n_tokens tokens per sequence; the tokens are forgotten again."""
        tokens: list[Any] = [self.draw(n_tokens) for _ in self.seqs]
        started = time.perf_counter()
        for _ in range(n_steps):
            entries = [Entry(seq, t, sampler) for seq, t, sampler in zip(self.seqs, tokens, self.samplers, strict=True)]
            tokens = [[token] for token in self.session.step(entries).sampled]
        spent = time.perf_counter() - started
        for seq in self.seqs:
            self.session.truncate(seq, self.depth)
        return spent

    def row(self, kind: str, n: int, repetitions: int) -> dict[str, Any]:
        steps, tokens = (1, n) if kind == "pp" else (n, 1)
        self.seconds(min(steps, _WARM_UP_STEPS), tokens)
        rates = [n * len(self.seqs) / self.seconds(steps, tokens) for _ in range(repetitions)]
        batch = len(self.seqs)
        name = f"{kind}{n}" + (f" @ d{self.depth}" if self.depth else "") + (f" b{batch}" if batch > 1 else "")
        sd = statistics.stdev(rates) if len(rates) > 1 else 0.0
        return {"test": name, "tok_s_mean": statistics.mean(rates), "tok_s_sd": sd, "tok_s": rates}


def render(rows: list[dict[str, Any]], form: str) -> str:
    """The rows as a Markdown table, JSON or CSV."""
    if form == "json":
        return json.dumps(rows)
    if form == "csv":
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerow(["test", "tok_s_mean", "tok_s_sd"])
        writer.writerows([r["test"], f"{r['tok_s_mean']:.2f}", f"{r['tok_s_sd']:.2f}"] for r in rows)
        return out.getvalue().rstrip()
    lines = ["| test | tok/s |", "|---|---|"]
    return "\n".join(lines + [f"| {r['test']} | {r['tok_s_mean']:.1f} ± {r['tok_s_sd']:.1f} |" for r in rows])


def native_path() -> Path:
    """The program prt-bench of this package."""
    from . import __path__ as folders

    name = "prt-bench.exe" if sys.platform == "win32" else "prt-bench"
    for folder in folders:
        path = Path(folder) / "bin" / name
        if path.is_file():
            return path
    raise InternalError(f"{name} is not in bin/ of {', '.join(map(str, folders))}: the package is not built; run `pip install .`")


def native_main() -> int:
    """The command `prt-bench`: runs the program with the same arguments."""
    try:
        return subprocess.run([str(native_path()), *sys.argv[1:]]).returncode
    except InternalError as error:
        print(f"prt-bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
