"""Mutation fuzz of Model.load: damaged KV files, under dense and under sparse attention.

    python tests/fuzz/fuzz_kv.py --seconds 20 --seed 0

What is not refused by a PyruntimeError is generated from; no outcome may be a crash, another exception or a lost page. Which inputs are
tried depends on the seed alone; how many, on the time.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import struct
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import SPARSE
from tiny import write_tiny_model

import pyruntime


def damaged(raw: bytes, rng: random.Random, body: int) -> bytes:
    """raw with one to three edits of four bytes, most of them where numbers are, and now and then with rows of NaN and infinities."""
    data = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        at = rng.choice([rng.randrange(len(data)), rng.randrange(body), body + rng.randrange(120)])
        data[at : at + 4] = rng.choice([rng.randbytes(4), b"\xff" * 4, bytes(4), struct.pack("<i", rng.randrange(20))])
    if rng.random() < 0.3:
        data[body + 200 :] = rng.randbytes(len(data) - body - 200)
    if rng.random() < 0.05:
        del data[rng.randrange(len(data)) :]
    return bytes(data)


def fuzz(model: pyruntime.Model, path: Path, seconds: float, rng: random.Random) -> tuple[int, int]:
    """(accepted, refused)"""
    ids = [rng.randrange(4, 90) for _ in range(700)]
    ids += model.generate(ids, temperature=0, max_tokens=40, ignore_eos=True).token_ids
    model.save(path, ids)
    raw = path.read_bytes()
    body = 24 + int.from_bytes(raw[12:16], "little") + 4 * (len(ids) - 1)
    accepted = refused = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        path.write_bytes(damaged(raw, rng, body))
        model.clear_cache()
        begin = time.monotonic()
        try:
            got = model.load(path)
            accepted += 1
        except pyruntime.PyruntimeError as error:
            str(error).encode()  # a message that cannot be printed is a failure too
            refused += 1
        else:
            with contextlib.suppress(pyruntime.PyruntimeError):
                model.generate([*got, 5, 6], temperature=0, max_tokens=5, ignore_eos=True)
        assert time.monotonic() - begin < 20, f"an input took too long, see {path}"
    model.clear_cache()
    assert model.stats()["n_page_free"] == model.stats()["n_page"], f"pages were lost, see {path}"
    return accepted, refused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="pyruntime-fuzz-") as folder:
        tiny = write_tiny_model(Path(folder) / "tiny", max_position_embeddings=4096)
        for attention in ("full", SPARSE):
            with pyruntime.Model(tiny, threads=1, attention=attention) as model:
                accepted, refused = fuzz(model, Path(folder) / "a.kv", args.seconds / 2, rng)
            print(f"{attention.partition(':')[0]:12} {accepted + refused:8} inputs, {accepted:6} accepted, {refused:6} refused")


if __name__ == "__main__":
    main()
