"""Writes a bf16 GGUF with the shapes of a model and random weights: what llama-bench needs and no more.

    prt-bench --list-configs -o json > configs.json
    python bench/peers/gguf_random.py configs.json llama3.1-8b /dev/shm/llama3.1-8b.gguf

Needs numpy. 16 GB take about 10 seconds: every matrix is cut from one block of random numbers and written by several threads.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

UINT32, FLOAT32, STRING = 4, 6, 8  # GGUF's value types
F32, BF16 = 0, 30  # GGUF's tensor types
MOSTLY_BF16 = 32  # its file type
ALIGNMENT = 32
BLOCK = 16 << 20  # random numbers; a piece of a file is at most this long

Tensors = list[tuple[str, tuple[int, ...]]]  # [out_features, in_features] or [size]


def text(s: str) -> bytes:
    return struct.pack("<Q", len(s.encode())) + s.encode()


def key_value(key: str, value: int | float | str) -> bytes:
    if isinstance(value, str):
        return text(key) + struct.pack("<I", STRING) + text(value)
    if isinstance(value, int):
        return text(key) + struct.pack("<II", UINT32, value)
    return text(key) + struct.pack("<If", FLOAT32, value)


def tensors_of(c: dict[str, Any]) -> Tensors:
    """llama.cpp's names, with the shapes of the configuration."""
    q, kv, d, d_ff = c["h_q"] * c["d_head"], c["h_kv"] * c["d_head"], c["d_model"], c["d_ff"]
    tensors: Tensors = [("token_embd.weight", (c["n_vocab"], d)), ("output_norm.weight", (d,))]
    if not c["tied_embeddings"]:
        tensors.append(("output.weight", (c["n_vocab"], d)))
    if c["rope_factor"]:
        tensors.append(("rope_freqs.weight", (c["d_head"] // 2,)))
    for i in range(c["n_layer"]):
        shapes: dict[str, tuple[int, ...]] = {"attn_norm": (d,), "attn_q": (q, d), "attn_k": (kv, d), "attn_v": (kv, d)}
        shapes |= {"attn_output": (d, q), "ffn_norm": (d,), "ffn_gate": (d_ff, d), "ffn_up": (d_ff, d), "ffn_down": (d, d_ff)}
        tensors += [(f"blk.{i}.{name}.weight", shape) for name, shape in shapes.items()]
        if c["qkv_bias"]:
            tensors += [(f"blk.{i}.attn_{name}.bias", (size,)) for name, size in (("q", q), ("k", kv), ("v", kv))]
    return tensors


def header(c: dict[str, Any], tensors: Tensors) -> tuple[bytes, list[int], int]:
    """The file's head, where each tensor starts, and the length of the file."""
    arch = "qwen2" if c["qkv_bias"] else "llama"
    values: dict[str, int | float | str] = {
        "general.architecture": arch,
        "general.name": c["name"],
        "general.file_type": MOSTLY_BF16,
        f"{arch}.context_length": max(c["max_position"], 1 << 18),  # the tests decide how long it gets
        f"{arch}.embedding_length": c["d_model"],
        f"{arch}.feed_forward_length": c["d_ff"],
        f"{arch}.block_count": c["n_layer"],
        f"{arch}.attention.head_count": c["h_q"],
        f"{arch}.attention.head_count_kv": c["h_kv"],
        f"{arch}.attention.key_length": c["d_head"],
        f"{arch}.attention.value_length": c["d_head"],
        f"{arch}.attention.layer_norm_rms_epsilon": float(c["norm_eps"]),
        f"{arch}.rope.dimension_count": c["d_head"],
        f"{arch}.rope.freq_base": float(c["rope_theta"]),
        f"{arch}.vocab_size": c["n_vocab"],
        "tokenizer.ggml.model": "none",  # llama-bench feeds random ids
    }
    infos, starts, end = b"", [], 0
    for name, shape in tensors:
        matrix = len(shape) == 2
        infos += text(name) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", n) for n in reversed(shape))
        infos += struct.pack("<IQ", BF16 if matrix else F32, end)
        starts.append(end)
        end += -(-int(np.prod(shape)) * (2 if matrix else 4) // ALIGNMENT) * ALIGNMENT
    pairs = b"".join(key_value(key, value) for key, value in values.items())
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values)) + pairs + infos
    head += b"\0" * (-len(head) % ALIGNMENT)
    return head, [len(head) + start for start in starts], len(head) + end


def random_block(n_in: int) -> npt.NDArray[np.uint16]:
    """bf16 numbers of variance 1 / n_in, so that activations stay of size 1."""
    numbers = np.random.default_rng(n_in).standard_normal(BLOCK, np.float32) / np.float32(np.sqrt(n_in))
    return (numbers.view(np.uint32) >> 16).astype(np.uint16)


def write_random_gguf(c: dict[str, Any], out: Path) -> None:
    tensors = tensors_of(c)
    head, starts, size = header(c, tensors)
    widths = sorted({shape[1] for _, shape in tensors if len(shape) == 2})
    part = out.with_suffix(".part")
    fd = os.open(part, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
    try:
        os.truncate(fd, size)
        os.pwrite(fd, head, 0)
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            blocks = dict(zip(widths, pool.map(random_block, widths), strict=True))

            def write(piece: tuple[int, memoryview]) -> None:
                at, data = piece
                while data:  # one call writes at most 2 GB
                    n = os.pwrite(fd, data, at)
                    at, data = at + n, data[n:]

            pieces: list[tuple[int, memoryview]] = []
            for (name, shape), start in zip(tensors, starts, strict=True):
                if len(shape) == 1:
                    values = np.zeros(shape, np.float32) if name.endswith(".bias") else np.ones(shape, np.float32)
                    pieces.append((start, values.data.cast("B")))
                    continue
                left, block = 2 * shape[0] * shape[1], blocks[shape[1]].data.cast("B")
                while left:
                    n = min(left, len(block))
                    pieces.append((start, block[:n]))
                    start, left = start + n, left - n
            list(pool.map(write, pieces))
    finally:
        os.close(fd)
    part.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", type=Path, help="what `prt-bench --list-configs -o json` printed")
    parser.add_argument("name")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    found = [c for c in json.loads(args.configs.read_text()) if c["name"] == args.name]
    if not found:
        parser.error(f"{args.configs} has no configuration {args.name!r}")
    write_random_gguf(found[0], args.out)
    print(args.out, file=sys.stderr)


if __name__ == "__main__":
    main()
