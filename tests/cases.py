"""Which operations run at which sizes: one list for the conformance tests and for the benchmarks.

A case holds sizes only. Element types, instruction sets and thread counts are chosen by whoever runs it; operands are made in
test_ops.py. Sizes are the letters of docs/shapes.md; an attention entry is (query rows, kv_len).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PAGE = 64  # tokens in a KV page
CHUNK = 512  # attention merges partial results of this many keys


class Sizes:
    """What every case has: the name of the operation and a readable id."""

    op: str

    @property
    def id(self) -> str:
        return "-".join(f"{k}={_short(v)}" for k, v in vars(self).items() if k != "op" and v is not False and (k, v) != ("window", 0))


def _short(value: Any) -> str:
    if isinstance(value, tuple):  # of attention entries
        text = [f"{n}:{kv}" for n, kv in value]
        return ",".join(text[:6]) + (f"...{len(text)}" if len(text) > 6 else "")
    return str(value)


@dataclass(frozen=True)
class Embedding(Sizes):
    n_tok: int
    n_vocab: int
    d_model: int
    op: str = "embedding"


@dataclass(frozen=True)
class RmsNorm(Sizes):
    n_row: int
    d: int
    op: str = "rms_norm"


@dataclass(frozen=True)
class Linear(Sizes):
    n_row: int
    n_in: int
    n_out: int
    bias: bool = False
    accumulate: bool = False
    norm: bool = False
    gated: bool = False  # n_out weight rows, half as many results
    f32_out: bool = False  # as for logits; with accumulate always
    op: str = "linear"


@dataclass(frozen=True)
class RopeAngles(Sizes):
    n_tok: int
    d_head: int
    op: str = "rope_angles"


@dataclass(frozen=True)
class RopeKvWrite(Sizes):
    n_tok: int
    h_q: int
    h_kv: int
    d_head: int
    qk_norm: bool = False
    op: str = "rope_kv_write"


@dataclass(frozen=True)
class Attention(Sizes):
    h_q: int
    h_kv: int
    d_head: int
    entries: tuple[tuple[int, int], ...]
    window: int = 0
    op: str = "attention_prefill"

    @property
    def n_tok(self) -> int:
        return sum(n for n, _ in self.entries)


@dataclass(frozen=True)
class SiluMul(Sizes):
    n_tok: int
    d_ff: int
    op: str = "silu_mul"


@dataclass(frozen=True)
class TargetLogprob(Sizes):
    n_row: int
    n_vocab: int
    op: str = "target_logprob"


@dataclass(frozen=True)
class PageCopy(Sizes):
    n_page: int
    h_kv: int
    d_head: int
    n_copy: int
    op: str = "page_copy"


EMBEDDING = [Embedding(1, 1, 1), Embedding(3, 7, 17), Embedding(65, 33, 64), Embedding(4, 5, 576), Embedding(0, 5, 8)]

RMS_NORM = [RmsNorm(1, 1), RmsNorm(1, 8), RmsNorm(2, 15), RmsNorm(5, 33), RmsNorm(3, 576), RmsNorm(2, 4097), RmsNorm(0, 8)]

# n_in off the multiple of 32 and n_out off the multiple of 16 leave the tile unit for the dot products; both have row tails at 16 and 32.
LINEAR = [
    Linear(1, 1, 1),
    Linear(1, 32, 16),
    Linear(1, 31, 17, bias=True),
    Linear(2, 33, 15),
    Linear(3, 96, 80, bias=True, accumulate=True),
    Linear(5, 63, 64, accumulate=True),
    Linear(15, 64, 48),
    Linear(16, 64, 64, bias=True),
    Linear(17, 128, 112, bias=True, accumulate=True),
    Linear(31, 95, 33),
    Linear(33, 160, 144),
    Linear(34, 100, 21, bias=True),
    Linear(49, 64, 272),
    Linear(1, 576, 1536),
    Linear(48, 576, 320, accumulate=True),
    Linear(1, 1536, 576, bias=True),
    Linear(6, 4096, 32),  # a block of x that does not fit the second-level cache beside the weights
    Linear(1, 64, 48, norm=True),
    Linear(3, 96, 64, gated=True),
    Linear(2, 33, 18, bias=True, norm=True, gated=True),
    Linear(1, 576, 960, bias=True, norm=True),
    Linear(17, 64, 128, norm=True, gated=True),
    Linear(5, 576, 320, norm=True, f32_out=True),
    Linear(65, 128, 96, accumulate=True),
    Linear(0, 64, 64, norm=True),
]

ROPE_ANGLES = [RopeAngles(1, 2), RopeAngles(3, 10), RopeAngles(70, 64), RopeAngles(2, 256), RopeAngles(0, 8)]

ROPE_KV_WRITE = [
    RopeKvWrite(1, 1, 1, 8),
    RopeKvWrite(5, 4, 2, 10),
    RopeKvWrite(3, 9, 3, 64, qk_norm=True),
    RopeKvWrite(7, 4, 4, 80),
    RopeKvWrite(2, 3, 1, 96, qk_norm=True),
    RopeKvWrite(65, 2, 1, 128),
    RopeKvWrite(2, 8, 2, 256, qk_norm=True),
    RopeKvWrite(1, 32, 8, 128),  # Llama-3.1-8B
    RopeKvWrite(66, 9, 3, 64),
    RopeKvWrite(3, 4, 2, 32, qk_norm=True),
    RopeKvWrite(0, 2, 1, 8),
]

ATTENTION = [
    Attention(1, 1, 8, ((1, 1),)),
    Attention(2, 1, 10, ((3, 3), (1, 2))),
    Attention(4, 2, 64, ((0, 0), (63, 63), (0, 70), (1, 64), (2, 65))),  # entries without query rows, page boundaries
    Attention(4, 4, 80, ((64, 64), (65, 65))),  # MHA
    Attention(6, 2, 96, ((5, 128), (66, 129))),
    Attention(9, 3, 64, ((3, 511), (2, 512), (4, 513))),  # chunk boundaries, a group that does not divide 64
    Attention(5, 1, 128, ((33, 200),)),  # MQA
    Attention(71, 1, 16, ((3, 70),)),  # a group wider than a block of query rows
    Attention(4, 1, 256, ((2, 130), (1, 1))),
    Attention(3, 1, 64, ((70, 600), (1, 1030))),
    Attention(4, 2, 64, ((40, 150), (1, 200)), window=17),  # smaller than a page
    Attention(4, 2, 64, ((70, 200),), window=64),
    Attention(2, 1, 32, ((90, 700), (3, 1100)), window=130),  # larger than a page, and whole chunks lie before it
    Attention(2, 2, 16, ((5, 9),), window=1),
    Attention(2, 1, 64, ((4, 80),), window=1000),
    Attention(32, 8, 128, ((3, 130),)),  # Llama-3.1-8B
]

ATTENTION_DECODE = [
    Attention(1, 1, 8, ((1, 1),), op="attention_decode"),
    Attention(4, 2, 64, ((1, 63), (1, 64), (1, 65)), op="attention_decode"),
    Attention(9, 3, 64, ((1, 511), (1, 512), (1, 513), (1, 1)), op="attention_decode"),
    Attention(4, 4, 80, ((1, 130), (1, 5)), op="attention_decode"),
    Attention(6, 2, 96, ((1, 129),), op="attention_decode"),
    Attention(5, 1, 128, ((1, 200), (1, 1025)), op="attention_decode"),
    Attention(71, 1, 16, ((1, 70), (1, 600)), op="attention_decode"),
    Attention(4, 1, 256, ((1, 130),), op="attention_decode"),
    Attention(2, 1, 16, tuple((1, 20 + i) for i in range(70)), op="attention_decode"),  # more entries than partial results fit
    Attention(4, 2, 64, ((1, 150), (1, 200)), window=17, op="attention_decode"),
    Attention(2, 1, 32, ((1, 700), (1, 1100), (1, 3)), window=130, op="attention_decode"),
    Attention(2, 2, 16, ((1, 640),), window=1, op="attention_decode"),
    Attention(32, 8, 128, ((1, 300), (1, 17)), op="attention_decode"),  # Llama-3.1-8B
]

SILU_MUL = [SiluMul(1, 1), SiluMul(2, 17), SiluMul(3, 64), SiluMul(2, 1536), SiluMul(0, 8)]

TARGET_LOGPROB = [TargetLogprob(1, 1), TargetLogprob(3, 17), TargetLogprob(5, 4099), TargetLogprob(2, 49152), TargetLogprob(0, 5)]

PAGE_COPY = [PageCopy(2, 1, 8, 1), PageCopy(9, 3, 20, 4), PageCopy(3, 2, 64, 0)]

CASES: list[Sizes] = [
    *EMBEDDING, *RMS_NORM, *LINEAR, *ROPE_ANGLES, *ROPE_KV_WRITE, *ATTENTION, *ATTENTION_DECODE, *SILU_MUL, *TARGET_LOGPROB, *PAGE_COPY,
]  # fmt: skip

# Sizes at which a GPU takes other paths, or which take a CPU too long: row counts around every tile, the widths of SmolLM2-135M and of
# Llama-3.1-8B, contexts that are split over many blocks.
GPU_CASES: list[Sizes] = [
    Embedding(70, 1000, 4096),
    RmsNorm(33, 4096), RmsNorm(2, 16384), RmsNorm(3, 20_000),
    *(Linear(n, 576, 1536, norm=n % 2 == 0) for n in (1, 2, 4, 8, 9, 16, 17, 32, 33, 64, 65, 128, 200, 512)),
    *(Linear(n, 4096, 512, f32_out=n % 2 == 1) for n in (1, 3, 8, 33, 64, 65, 200, 512)),
    *(Linear(n, 4096, 1024, norm=True, gated=True) for n in (1, 8, 33, 64, 65, 512)),
    *(Linear(n, 1536, 576, accumulate=True) for n in (1, 8, 33, 64, 65, 200)),
    Linear(1, 14336, 1024, accumulate=True), Linear(8, 4096, 3072, norm=True), Linear(130, 4096, 3072, bias=True),
    Linear(33, 4096, 3584, norm=True, gated=True), Linear(1, 4096, 3206, norm=True, f32_out=True), Linear(257, 328, 1000),
    RopeAngles(1000, 128),
    RopeKvWrite(300, 32, 8, 128), RopeKvWrite(200, 9, 3, 64, qk_norm=True),
    Attention(32, 8, 128, ((200, 200), (65, 700), (1, 300))),
    Attention(9, 3, 64, ((300, 300), (129, 1000), (0, 64), (2, 65))),
    Attention(8, 8, 128, ((130, 130),), window=100),
    Attention(32, 8, 128, tuple((1, 1 + 97 * i) for i in range(33)), op="attention_decode"),
    Attention(32, 8, 128, ((1, 9000),), op="attention_decode"),
    Attention(9, 3, 64, ((1, 4097), (1, 64), (1, 8192)), op="attention_decode"),
    Attention(40, 8, 128, ((1, 2000), (1, 3)), window=700, op="attention_decode"),
    SiluMul(33, 14336), TargetLogprob(70, 128_256), PageCopy(40, 8, 128, 17),
]  # fmt: skip
