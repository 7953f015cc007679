"""Every operation against its formula in float64: on every instruction set of this machine, on a GPU, in every storage format.

The formulas get the operands as they are stored, so what is left is the rounding of float32 arithmetic, and tolerances are derived
from it: u = 2^-24 per operation. A sum of n terms in float32, in whatever order, is off by at most depth x u x sum |terms| (+ O(u^2)),
where depth is the number of roundings that a term goes through; unfused products cost one more. A GPU also rounds what it writes, and what
its matrix units read, to the storage format; those units cut off instead of rounding, which counts twice.

Memory that an operation must not read holds NaN, memory that it must not write a pattern that is looked at afterwards.
"""

from __future__ import annotations

import math
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import cases
import numpy as np
import ops
import pytest
from ops import CPU_AND_GPU, EVERY_ISA, GPU, ON_GPU, Array, bits, run, store, value

from pyruntime.errors import InvalidArgumentError, PyruntimeError

U = 2.0**-24
EXP = 4 * U  # the vector e^x is good to 2 ulp; an ulp is at most 2 u
FAST_EXP = 2.0**-18  # a GPU's for 16-bit results, at |x| < 64: the rounding of x log2 e, and 2 ulp
MARGIN = 64  # elements around each operand
CANARY = 0x5A


@dataclass
class Call:
    """Operands of one prt_op_run call, and what must be in the outputs afterwards: (array, value, tolerance)."""

    operands: list[Array | None]
    params: list[float] = field(default_factory=list)
    expect: list[tuple[Array, Any, Any]] = field(default_factory=list)
    after: Callable[[], None] = lambda: None  # further checks


def rng_of(*key: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def padded(array: Array, fill: Array) -> Array:
    """A copy of the array between two margins of `fill`."""
    buffer = np.concatenate([np.resize(fill, MARGIN), array.reshape(-1), np.resize(fill, MARGIN)])
    return buffer[MARGIN : MARGIN + array.size].reshape(array.shape)


def given(array: Array) -> Array:
    """An input; NaN lies before and after it (ids: a value that is out of range everywhere)."""
    if array.dtype == np.int32:
        return padded(array, np.array([-7], np.int32))
    return padded(array, ops.nans([1], {"uint16": "bf16", "float16": "f16", "float32": "f32"}[array.dtype.name]))


def wanted(shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
    """An output with a pattern in it and around it."""
    pattern = np.frombuffer(bytes([CANARY]) * 4, dtype)[:1]
    return padded(np.resize(pattern, shape) if math.prod(shape) else np.empty(shape, dtype), pattern)


def assert_margins(array: Array) -> None:
    base = array.base
    while base.base is not None:
        base = base.base
    edges = np.concatenate([base[:MARGIN], base[-MARGIN:]])
    assert len(set(bits(edges).tolist())) == 1, "memory beside an operand was written"


def assert_close(got: Array, want: Any, tolerance: Any) -> None:
    error = np.abs(value(got) - want)
    bad = ~(error <= tolerance)  # NaN is bad
    if bad.any():
        at = tuple(int(i[0]) for i in np.nonzero(bad))
        limit = np.broadcast_to(tolerance, error.shape)[at]
        one = f"at {at}: {value(got)[at]} for {want[at]}, off by {error[at]}, allowed {limit}"
        raise AssertionError(f"{bad.sum()} of {bad.size} wrong; {one}")


# ---------------------------------------------------------------- operands, formulas, tolerances


def written(want: Any, error: Any, dtype: str) -> Any:
    """The error after rounding to the format of the output."""
    return error if dtype == "f32" else error + ops.ROUNDOFF[dtype] * (np.abs(want) + error) + ops.TINY[dtype]


def embedding(c: cases.Embedding, dtype: str, on: str) -> Call:
    rng = rng_of(c, dtype)
    weight = store(rng.standard_normal((c.n_vocab, c.d_model)), dtype)
    tokens = rng.integers(0, c.n_vocab, c.n_tok).astype(np.int32)
    tokens[:1], tokens[1:2] = c.n_vocab - 1, 0
    out = wanted((c.n_tok, c.d_model))
    return Call([out, given(tokens), given(weight)], [], [(out, value(weight)[tokens], 0)])


def rms_roundings(d: int, on: str) -> float:
    """Relative error of a normalised value, in u. The mean of squares is a sum: a lane's share, the lanes pairwise, the tail one by one,
    each product once; then / d and + eps. The root halves that; root, reciprocal and two products follow. On a GPU a thread sums 16 values
    or a share of the row, the lanes are added pairwise, up to 32 warps one by one."""
    if on == GPU:
        return (max(16, d / 32) + 5 + 32 + 3) / 2 + 6
    width = ops.WIDTH[on]
    return (d // width + math.log2(width) + width + 3) / 2 + 4


def rms_norm(c: cases.RmsNorm, dtype: str, on: str) -> Call:
    rng, eps, act = rng_of(c), np.float32(1e-5), ops.activation(dtype, on)
    x = (rng.standard_normal((c.n_row, c.d)) * 3).astype(np.float32)
    weight = rng.standard_normal(c.d).astype(np.float32)
    out = wanted(x.shape, store(np.empty(0), act).dtype)
    want = value(x) / np.sqrt((value(x) ** 2).mean(-1, keepdims=True) + float(eps)) * value(weight)
    return Call([out, given(x), given(weight)], [float(eps)], [(out, want, written(want, np.abs(want) * rms_roundings(c.d, on) * U, act))])


def linear_depth(c: cases.Linear, dtype: str, on: str) -> float:
    """Roundings that a product goes through. All products of two 16-bit values are exact in float32."""
    if on == GPU:
        if dtype == "f32" or c.n_in % 8:  # the plain form: one after the other
            return c.n_in + 1
        return 2 * (c.n_in / 16 + 24)  # 16 in a matrix instruction, instruction by instruction, then up to 8 parts
    if dtype != "bf16" or on not in ("avx512bf16", "amx"):  # a lane takes every width-th term, then the lanes are added
        return math.ceil(c.n_in / ops.WIDTH[on]) + math.log2(ops.WIDTH[on]) + 1  # the baseline rounds products too
    if on == "amx" and c.n_in % 32 == 0 and c.n_out % 16 == 0:  # blocks of 32: 16 pairs, their two halves; the blocks one by one
        return 16 + 1 + c.n_in / 32
    return 2 * math.ceil(c.n_in / 32) + 4  # 16 lanes take pairs, one product after the other


def linear(c: cases.Linear, dtype: str, on: str) -> Call:
    rng, eps, act = rng_of(c, dtype), np.float32(1e-5), ops.activation(dtype, on)
    in_bf16 = dtype == "bf16" and on in ("avx512bf16", "amx")  # arithmetic in hardware: x is rounded to bf16 first
    read_as = "bf16" if in_bf16 else act
    x = store(rng.standard_normal((c.n_row, c.n_in)), "f32" if c.norm else act)
    weight = store(rng.standard_normal((c.n_out, c.n_in), np.float32), dtype)
    bias = rng.standard_normal(c.n_out).astype(np.float32) if c.bias else None
    norm = rng.uniform(0.5, 1.5, c.n_in).astype(np.float32) if c.norm else None
    before = rng.standard_normal((c.n_row, c.n_out)).astype(np.float32) if c.accumulate else None
    out_type = "f32" if c.accumulate or c.f32_out else act
    out = wanted((c.n_row, c.n_out // 2 if c.gated else c.n_out), store(np.empty(0), out_type).dtype)
    if before is not None:
        out[...] = before

    h, w, relative, depth = value(x), value(weight), 0.0, linear_depth(c, dtype, on)
    if norm is not None:
        h = h / np.sqrt((h**2).mean(-1, keepdims=True) + float(eps)) * value(norm)
        relative = rms_roundings(c.n_in, on) * U + (ops.ROUNDOFF[read_as] if read_as != "f32" else 0)
    elif in_bf16:
        h = value(store(x, "bf16"))
    terms = np.abs(h) @ np.abs(w).T
    want, error = h @ w.T, terms * relative + (ops.TINY["f16"] * np.abs(w).sum(-1) if read_as == "f16" else 0)
    for extra in (bias, before):
        if extra is not None:
            want, terms, depth = want + value(extra), terms + np.abs(value(extra)), depth + 1
    error = (error + terms * depth * U) * 1.001
    if c.gated:  # silu' is below 1.1; a GPU may keep gate and up in its activation type in between
        (gate, up), (gate_error, up_error) = np.split(want, 2, -1), np.split(written(want, error, act), 2, -1)
        silu = gate / (1 + np.exp(-gate))
        exp = FAST_EXP if act != "f32" else EXP
        want = silu * up
        error = 1.1 * gate_error * (np.abs(up) + up_error) + np.abs(silu) * up_error + np.abs(want) * (exp + 3 * U)
    operands = [out, given(x), given(weight), given(bias) if bias is not None else None, given(norm) if norm is not None else None]
    params = [float(c.accumulate), float(c.gated), float(eps) if c.norm else 0.0]
    return Call(operands, params, [(out, want, written(want, error, out_type))])


def rope_angles(c: cases.RopeAngles, dtype: str, on: str) -> Call:
    """The angle is rounded to float32 in the formula too. On the CPU sine and cosine are rounded once; on a GPU they are good to 2 ulp,
    after the rest of the angle, below pi / 4, was rounded twice. Then comes the factor."""
    rng, factor = rng_of(c), np.float32(1.3)
    positions = rng.integers(0, 1 << 21, c.n_tok).astype(np.int32)
    positions[:2], positions[2:3] = 0, 131_071
    inv_freq = (500_000.0 ** -(np.arange(c.d_head // 2) / (c.d_head // 2))).astype(np.float32)
    angle = value(positions.astype(np.float32)[:, None] * inv_freq)
    want = np.stack([np.cos(angle), np.sin(angle)], 1) * float(factor)
    out = wanted(want.shape)
    roundings, turns = (8, 2.0**-52) if on == GPU else (2, 0)
    tolerance = np.abs(want) * roundings * U + (float(factor) * np.abs(angle) * turns)[:, None, :]
    return Call([out, given(positions), given(inv_freq)], [float(factor)], [(out, want, tolerance)])


def rope_kv_write(c: cases.RopeKvWrite, dtype: str, on: str) -> Call:
    rng, eps, half, act = rng_of(c, dtype), np.float32(1e-6), c.d_head // 2, ops.activation(dtype, on)
    heads = c.h_q + 2 * c.h_kv
    qkv = store(rng.standard_normal((c.n_tok, heads, c.d_head)), act)
    angle = rng.uniform(-4, 4, (c.n_tok, half))
    cos_sin = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
    norms = [rng.standard_normal(c.d_head).astype(np.float32) if c.qk_norm else None for _ in "qk"]
    n_page = c.n_tok // cases.PAGE + 3
    last = n_page * cases.PAGE - 1
    slots = np.array([last, *rng.permutation(last)[: max(0, c.n_tok - 1)]][: c.n_tok], np.int32)

    x = value(qkv)
    relative = 0.0
    if c.qk_norm:
        scale = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + float(eps))
        for begin, end, norm in ((0, c.h_q, norms[0]), (c.h_q, c.h_q + c.h_kv, norms[1])):
            x[:, begin:end] *= scale[:, begin:end] * value(norm)
        relative = rms_roundings(c.d_head, on) * U
    cos, sin = (value(cos_sin)[:, i, None, :] for i in (0, 1))
    a, b = x[..., :half], x[..., half:]
    turned = np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    size = np.concatenate([np.abs(a * cos) + np.abs(b * sin), np.abs(b * cos) + np.abs(a * sin)], -1)
    error = size * (relative + 2 * U)  # two products and a sum

    storage = store(np.empty(0), dtype).dtype
    k_pages, v_pages = (wanted((n_page, c.h_kv, cases.PAGE, c.d_head), storage) for _ in "kv")
    pages, rows = slots // cases.PAGE, slots % cases.PAGE
    untouched = np.ones((n_page, cases.PAGE), bool)
    untouched[pages, rows] = False
    buffer = given(qkv.reshape(c.n_tok, heads * c.d_head))
    q, v = buffer.reshape(qkv.shape)[:, : c.h_q], qkv[:, c.h_q + c.h_kv :]

    def rows_of(cache: Array) -> Array:
        return np.moveaxis(cache, 2, 1)[pages, rows]

    want_k, error_k = turned[:, c.h_q : c.h_q + c.h_kv], error[:, c.h_q : c.h_q + c.h_kv]
    call = Call([buffer, *(given(n) if n is not None else None for n in norms), given(cos_sin), given(slots), k_pages, v_pages])
    call.params = [c.h_q, float(eps)]
    call.expect = [(q, turned[:, : c.h_q], written(turned[:, : c.h_q], error[:, : c.h_q], act))]
    pattern = k_pages.reshape(-1)[:1].copy()

    def pages_are_right() -> None:
        assert_close(rows_of(k_pages), want_k, written(want_k, error_k, dtype) + ops.ROUNDOFF["f32"] * np.abs(want_k))
        kept = v if act == dtype else store(v, dtype)
        assert (bits(rows_of(v_pages)) == bits(kept)).all(), "v is stored as it is, rounded to nearest even"
        for cache in (k_pages, v_pages):
            assert (bits(np.moveaxis(cache, 2, 1)[untouched]) == bits(pattern)).all(), "another slot was written"

    call.after = pages_are_right
    return call


def make_pages(c: cases.Attention, dtype: str, rng: np.random.Generator) -> tuple[Array, Array, Array, list[Array], list[Array]]:
    """k_pages, v_pages, page_table, and the keys and values of each entry. What no query row may see is NaN: rows past kv_len, unused
    pages, and pages that lie before every window. The unused part of the page table holds ids that do not exist."""
    need = [math.ceil(kv / cases.PAGE) for _, kv in c.entries]
    n_page = sum(need) + 2
    k_pages, v_pages = (ops.nans((n_page, c.h_kv, cases.PAGE, c.d_head), dtype) for _ in "kv")
    table = np.full((len(need), max(need, default=0) + 1), n_page + 5, np.int32)
    order, keys, values = rng.permutation(n_page), [], []
    for e, (n_row, kv) in enumerate(c.entries):
        table[e, : need[e]], order = order[: need[e]], order[need[e] :]
        k, v = (store(rng.standard_normal((kv, c.h_kv, c.d_head)), dtype) for _ in "kv")
        first = max(0, kv - n_row + 1 - c.window) // cases.PAGE * cases.PAGE if c.window and n_row else 0
        for t in range(first, kv if n_row else 0):
            k_pages[table[e, t // cases.PAGE], :, t % cases.PAGE] = k[t]
            v_pages[table[e, t // cases.PAGE], :, t % cases.PAGE] = v[t]
        keys.append(k)
        values.append(v)
    return k_pages, v_pages, table, keys, values


@lru_cache(maxsize=4)
def attention_reference(c: cases.Attention, dtype: str, in_bf16: bool, gpu: bool) -> tuple[Array, Array, Array, Array, Array, Array]:
    """q, k_pages, v_pages, page_table, result and tolerance; kept because instruction sets share it.

    A score is a dot product of d terms and a product with the scale: off by s_err = (d + 2) u sum |q k|. A weight e^(score - top) then is
    off by a factor 1 +- (s_err + |score - top| u + e^x itself + a rescaling for each page), and the two sums over n keys add n u.
    On the tile unit q (here: as rounded) and the weights above the fraction bar are bf16. On a GPU both are of the storage format, below
    the bar too or not; scores are powers of 2, |score| log2 e rounded before the top is taken off; a weight in f16 may be subnormal."""
    rng = rng_of(c, dtype)
    group, scale = c.h_q // c.h_kv, float(np.float32(c.d_head**-0.5))
    q = store(rng.standard_normal((c.n_tok, c.h_q, c.d_head)) * 2, dtype if gpu else "f32")
    k_pages, v_pages, table, keys, values = make_pages(c, dtype, rng)
    want, tolerance = (np.zeros((c.n_tok, c.h_q, c.d_head)) for _ in "wt")
    row = 0
    for (n_row, kv), key, val in zip(c.entries, keys, values, strict=True):
        if n_row == 0:
            continue
        rows, row = slice(row, row + n_row), row + n_row
        position = np.arange(kv - n_row, kv)[:, None]
        visible = np.arange(kv) <= position
        if c.window:
            visible &= np.arange(kv) > position - c.window
        k, v = (np.repeat(value(x), group, 1).transpose(1, 0, 2) for x in (key, val))  # [h_q][kv][d]
        qe = value(store(q[rows], "bf16") if in_bf16 and not gpu else q[rows]).transpose(1, 0, 2)  # [h_q][row][d]
        score = np.where(visible, qe @ k.transpose(0, 2, 1) * scale, -np.inf)
        gap = score.max(-1, keepdims=True) - score
        p = np.exp(-gap)
        p /= p.sum(-1, keepdims=True)
        score_error = (c.d_head + 2) * U * (np.abs(qe) @ np.abs(k).transpose(0, 2, 1)) * scale
        relative = score_error + np.where(visible, gap, 0) * U + (math.ceil(kv / cases.PAGE) + 1) * (EXP + 2 * U) + (kv + 3) * U
        above, below = relative + (ops.ROUNDOFF["bf16"] if in_bf16 else 0), relative
        if gpu:
            size = np.abs(np.where(visible, score, 0))
            above = 2 * relative + 4 * U * (size + size.max(-1, keepdims=True)) + (ops.ROUNDOFF[dtype] if dtype != "f32" else 0)
            below = above
        result = p @ v
        want[rows] = result.transpose(1, 0, 2)
        error = (p * above) @ np.abs(v) + np.abs(result) * (p * below).sum(-1, keepdims=True)
        if gpu and dtype == "f16":
            error += 2 * ops.TINY["f16"] * (visible @ np.abs(v))
        tolerance[rows] = (written(result, error, dtype) if gpu else error).transpose(1, 0, 2)
    shape = (c.n_tok, c.h_q * c.d_head)
    return q.reshape(shape), k_pages, v_pages, table, want.reshape(shape), tolerance.reshape(shape)


def attention(c: cases.Attention, dtype: str, on: str) -> Call:
    in_bf16 = on == "amx" and dtype == "bf16" and c.d_head % 32 == 0
    q, k_pages, v_pages, table, want, tolerance = attention_reference(c, dtype, in_bf16, on == GPU)
    out = wanted(q.shape, q.dtype)
    q_begin = np.cumsum([0] + [n for n, _ in c.entries]).astype(np.int32)
    kv_len = np.array([kv for _, kv in c.entries], np.int32)
    operands = [out, given(q), given(k_pages), given(v_pages), given(q_begin), given(kv_len), given(table)]
    return Call(operands, [c.window, float(np.float32(c.d_head**-0.5))], [(out, want, tolerance)])


def silu_mul(c: cases.SiluMul, dtype: str, on: str) -> Call:
    """e^-g, 1 +, a quotient, a product. Below -87 e^-g stays at e^88, or the quotient is 0: up to |g| e^-87 is off of what is almost 0."""
    rng, act = rng_of(c), ops.activation(dtype, on)
    gate = (rng.standard_normal((c.n_tok, c.d_ff)) * 5).astype(np.float32)
    hard = np.array([0, -0.0, 80, -80, 86.9, -86.9, 88.5, -88.5, 1e4, -1e4, 1e-30, -1e-30, 3e38 if act != "f16" else 6e4], np.float32)
    gate[:1, : len(hard)] = hard[: c.d_ff]
    up = np.where(np.abs(gate) > 1e4, 0.5, rng.standard_normal(gate.shape)).astype(np.float32)
    gate, up = store(gate, act), store(up, act)
    g, exp = value(gate), EXP if act == "f32" else FAST_EXP
    want = np.where(g > -700, g / (1 + np.exp(-np.maximum(g, -700))), 0) * value(up)
    out = wanted(gate.shape, gate.dtype)
    error = np.abs(want) * (exp + 3 * U) + np.where(g < -86, np.abs(g) * np.exp(-86.9), 0) * np.abs(value(up)) + ops.TINY["f32"]
    return Call([out, given(np.concatenate([gate, up], -1))], [], [(out, want, written(want, error, act))])


def target_logprob(c: cases.TargetLogprob, dtype: str, on: str) -> Call:
    """logit - (top + log sum e^(x - top)). The sum is relatively off by e^x itself, the rounding of x - top under the distribution, and the
    roundings of a part of 4096 terms (parts are added in double); then the logarithm, the sum and the difference are rounded."""
    rng = rng_of(c)
    logits = (rng.standard_normal((c.n_row, c.n_vocab)) * 4).astype(np.float32)
    logits[1:2] += 1000
    logits[2:3, :-1] = -np.inf
    targets = rng.integers(0, c.n_vocab, c.n_row).astype(np.int32)
    targets[3:4] = -1
    x = value(logits)
    gap = x.max(-1, keepdims=True) - x
    total = np.exp(-gap).sum(-1)
    norm = x.max(-1) + np.log(total)
    want = np.where(targets < 0, 0, x[np.arange(c.n_row), targets] - norm)
    p = np.exp(-gap) / total[:, None]
    width = ops.WIDTH.get(on, 16)  # a thread of a GPU sums n_vocab / 1024 values, rescaling when it meets a larger one
    depth = 3 * (c.n_vocab / 1024 + 4) if on == GPU else min(c.n_vocab, 4096) / width + math.log2(width) + 1
    relative = EXP + U * (p * np.where(np.isfinite(gap), gap, 0)).sum(-1) + U * depth
    finite = np.where(np.isfinite(want), np.abs(want), 0)
    tolerance = np.where(targets < 0, 0, relative + U * (np.log(total) + np.abs(norm) + finite))
    out = wanted((c.n_row,))
    infinite = np.isneginf(want)  # compared as such: -inf - -inf is not a number
    call = Call([out, given(logits), given(targets)], [], [])

    def right() -> None:
        assert (np.isneginf(out) == infinite).all()
        assert_close(np.where(infinite, np.float32(0), out), np.where(infinite, 0, want), np.where(infinite, 0, tolerance))

    call.after = right
    return call


def page_copy(c: cases.PageCopy, dtype: str, on: str) -> Call:
    rng = rng_of(c, dtype)
    k_pages, v_pages = (given(store(rng.standard_normal((c.n_page, c.h_kv, cases.PAGE, c.d_head)), dtype)) for _ in "kv")
    order = rng.permutation(c.n_page).astype(np.int32)
    src, dst = order[: c.n_copy], order[c.n_copy : 2 * c.n_copy]
    expect = []
    for pages in (k_pages, v_pages):
        want = value(pages)
        want[dst] = want[src]
        expect.append((pages, want, 0))
    return Call([k_pages, v_pages, given(src), given(dst)], [], expect)


BUILD: dict[str, Callable[..., Call]] = {
    "embedding": embedding, "rms_norm": rms_norm, "linear": linear, "rope_angles": rope_angles, "rope_kv_write": rope_kv_write,
    "attention_prefill": attention, "attention_decode": attention, "silu_mul": silu_mul, "target_logprob": target_logprob,
    "page_copy": page_copy,
}  # fmt: skip


def matrix(of: list[cases.Sizes], on: str | None = None) -> list[tuple[cases.Sizes, str]]:
    """Cases with the formats they come in: without a stored operand one is enough, but on a GPU activations have it too."""
    float_only = {"rms_norm", "silu_mul", "target_logprob", "rope_angles"} - ({"rms_norm", "silu_mul"} if on == GPU else set())
    return [(c, dtype) for c in of for dtype in (("f32",) if c.op in float_only else ops.DTYPES)]


def params_of(pairs: list[tuple[cases.Sizes, str]]) -> Any:
    return pytest.mark.parametrize(("case", "dtype"), [pytest.param(c, d, id=f"{c.op}-{d}-{c.id}") for c, d in pairs])


MATRIX = matrix(cases.CASES)


def check_call(case: cases.Sizes, call: Call, on: str) -> None:
    outputs = {id(array) for array, _, _ in call.expect}
    before = [None if x is None else x.copy() for x in call.operands]
    run(case.op, call.operands, call.params, on=on)
    for array, want, tolerance in call.expect:
        assert_close(array, want, tolerance)
    call.after()
    for array in call.operands:
        if array is not None:
            assert_margins(array)
    if case.op not in ("rope_kv_write", "page_copy"):  # only the first operand is written
        for array, old in zip(call.operands[1:], before[1:], strict=True):
            assert array is None or id(array) in outputs or (bits(array) == bits(old)).all()


@EVERY_ISA
@params_of(MATRIX)
def test_equals_formula(case: cases.Sizes, dtype: str, on: str) -> None:
    check_call(case, BUILD[case.op](case, dtype, on), on)


@ON_GPU
@params_of(matrix([*cases.CASES, *cases.GPU_CASES], GPU))
def test_equals_formula_on_a_gpu(case: cases.Sizes, dtype: str, on: str) -> None:
    """And twice the same bits."""
    call = BUILD[case.op](case, dtype, on)
    again = [None if x is None else x.copy() for x in call.operands]
    check_call(case, call, on)
    run(case.op, again, call.params, on=on)
    for a, b in zip(call.operands, again, strict=True):
        assert a is None or (bits(a) == bits(b)).all()


@EVERY_ISA
@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_values_that_are_hard_to_round(on: str, dtype: str) -> None:
    """v goes to the cache rounded to nearest even: ties, overflow, subnormal numbers, zeros of both signs, infinities and NaN."""
    f16_edges = [65504, 65519.996, 65520, 1e5, 6.1e-5, 6.0975552e-5, 5.96e-8, 2.98e-8, 2.9802326e-8, 2.9e-8, 1e-10, 2049, 2051, 1 + 2**-11]
    bf16_edges = [1 + 2**-8, 1 + 3 * 2**-8, 3.3895314e38, 3.3961775e38, 3.4e38, 1e-40, 9.2e-41, 1e-45]
    special = np.array([0.0, math.inf, math.nan, *f16_edges, *bf16_edges], np.float32)
    v = np.concatenate([special, -special])
    v = np.concatenate([v, np.zeros(-len(v) % 8, np.float32)])
    d = len(v)
    qkv = np.concatenate([np.ones(2 * d, np.float32), v])[None]
    cos_sin = np.stack([np.ones(d // 2), np.zeros(d // 2)])[None].astype(np.float32)
    k_pages, v_pages = (store(np.zeros((1, 1, 64, d)), dtype) for _ in "kv")
    run("rope_kv_write", [qkv, None, None, cos_sin, np.array([5], np.int32), k_pages, v_pages], [1, 0], on=on)
    got, want = v_pages[0, 0, 5], store(v, dtype)
    nan = np.isnan(v)
    assert (bits(got)[~nan] == bits(want)[~nan]).all()
    assert np.isnan(value(got[nan])).all()
    out = np.empty((1, d), np.float32)
    run("embedding", [out, np.array([0], np.int32), got[None]], on=on)  # and back, exactly
    assert (bits(out[0])[~nan] == bits(value(got).astype(np.float32))[~nan]).all()
    assert np.isnan(out[0][nan]).all()


@EVERY_ISA
def test_rms_norm_in_place(on: str) -> None:
    x = rng_of("in place").standard_normal((3, 77)).astype(np.float32)
    weight, out = np.linspace(-1, 1, 77, dtype=np.float32), np.empty_like(x)
    run("rms_norm", [out, x, weight], [1e-5], on=on)
    run("rms_norm", [x, x, weight], [1e-5], on=on)
    assert (bits(out) == bits(x)).all()


# ---------------------------------------------------------------- the same bits, however the work is cut


@EVERY_ISA
@pytest.mark.parametrize("dtype", ops.DTYPES)
@pytest.mark.parametrize(("n_in", "n_out"), [(64, 64), (96, 48), (100, 37), (31, 16), (576, 160)])
def test_a_row_of_linear_does_not_depend_on_the_batch(on: str, dtype: str, n_in: int, n_out: int) -> None:
    rng = rng_of("rows", n_in)
    x = rng.standard_normal((33, n_in)).astype(np.float32)
    weight = store(rng.standard_normal((n_out, n_in)), dtype)
    bias, before = rng.standard_normal(n_out).astype(np.float32), rng.standard_normal((33, n_out)).astype(np.float32)
    for params, extra in ([0.0, 0.0, 0.0], None), ([1.0, 0.0, 0.0], bias):
        alone = before.copy()
        for r in range(33):
            run("linear", [alone[r : r + 1], x[r : r + 1], weight, extra, None], params, on=on)
        for n in (2, 15, 16, 17, 33):
            out = before[:n].copy()
            run("linear", [out, x[:n].copy(), weight, extra, None], params, on=on)
            assert (bits(out) == bits(alone[:n])).all(), f"{n} rows"


@EVERY_ISA
@pytest.mark.parametrize("dtype", ops.DTYPES)
@pytest.mark.parametrize("window", [0, 1, 40, 64, 130])
@pytest.mark.parametrize(("h_q", "h_kv", "d_head"), [(9, 3, 64), (4, 1, 20)])
def test_decode_equals_prefill(on: str, dtype: str, window: int, h_q: int, h_kv: int, d_head: int) -> None:
    """Each row of a prompt, decoded alone, and the prompt in two pieces."""
    n_row, kv = 75, 590
    c = cases.Attention(h_q, h_kv, d_head, ((n_row, kv),), window)
    call = attention(c, dtype, on)
    whole, q, k_pages, v_pages, _, _, table = call.operands
    run("attention_prefill", call.operands, call.params, on=on)
    lengths = np.arange(kv - n_row + 1, kv + 1, dtype=np.int32)
    decoded = np.empty_like(whole)
    begin, tables = np.arange(n_row + 1, dtype=np.int32), np.repeat(table, n_row, 0)
    run("attention_decode", [decoded, q, k_pages, v_pages, begin, lengths, tables], call.params, on=on, threads=2)
    assert (bits(decoded) == bits(whole)).all()
    for cut in (1, 10, 64):
        pieces = np.empty_like(whole)
        for rows, length in ((slice(0, cut), kv - n_row + cut), (slice(cut, n_row), kv)):
            n = len(q[rows])
            operands = [pieces[rows], q[rows].copy(), k_pages, v_pages, np.array([0, n], np.int32), np.array([length], np.int32), table]
            run("attention_prefill", operands, call.params, on=on)
        assert (bits(pieces) == bits(whole)).all(), f"cut after {cut} rows"


THREADED = [
    (c, d) for c, d in MATRIX
    if c.op != "page_copy" and (d == "bf16" or len(matrix([c])) == 1) and c not in cases.LINEAR[:3] and "entries=1:1" not in c.id
]  # fmt: skip


@EVERY_ISA
@params_of(THREADED)
def test_threads_do_not_change_a_bit(case: cases.Sizes, dtype: str, on: str) -> None:
    call = BUILD[case.op](case, dtype, on)
    results = []
    for threads in (1, 2, 3):
        operands = [None if x is None else x.copy() for x in call.operands]
        run(case.op, operands, call.params, on=on, threads=threads)
        results.append(operands)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a is None or (bits(a) == bits(b)).all()


# ---------------------------------------------------------------- walls around every operand


def run_between_walls() -> None:
    """Every small case with each operand against an inaccessible page, first before and then after it. Runs in a process of its own."""
    for case, dtype in MATRIX:
        for isa in ops.SUPPORTED:
            call = BUILD[case.op](case, dtype, isa)
            if sum(x.nbytes for x in call.operands if x is not None) > 1 << 19:
                break
            for side in ("before", "after"):
                print(case.op, dtype, case.id, isa, side, flush=True)
                run(case.op, [None if x is None else ops.guarded(x, side) for x in call.operands], call.params, on=isa)


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in another process, from this folder, so that a crash is a result."""
    command = [sys.executable, "-X", "faulthandler", "-c", code]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
def test_no_access_outside_the_operands() -> None:
    done = python("import test_ops; test_ops.run_between_walls()")
    assert done.returncode == 0, f"stopped at: {done.stdout.splitlines()[-1:]}\n{done.stderr[-2000:]}"
    assert len(done.stdout.splitlines()) > 200 * len(ops.SUPPORTED)


# ---------------------------------------------------------------- hostile calls

SMALL = {
    "embedding": cases.Embedding(3, 5, 8),
    "rms_norm": cases.RmsNorm(2, 8),
    "linear": cases.Linear(2, 32, 16, bias=True),
    "rope_angles": cases.RopeAngles(3, 8),
    "rope_kv_write": cases.RopeKvWrite(2, 4, 2, 8, qk_norm=True),
    "attention_prefill": cases.Attention(4, 2, 8, ((2, 70), (1, 3))),
    "attention_decode": cases.Attention(4, 2, 8, ((1, 70), (1, 3)), op="attention_decode"),
    "silu_mul": cases.SiluMul(2, 8),
    "target_logprob": cases.TargetLogprob(2, 9),
    "page_copy": cases.PageCopy(6, 2, 8, 2),
}
F32, I32 = np.float32, np.int32


def with_item(i: int, at: Any, to: float) -> Callable[[list[Any]], None]:
    """Operand i with one value changed."""

    def change(operands: list[Any]) -> None:
        operands[i][at] = to

    return change


def with_array(i: int, array: Any) -> Callable[[list[Any]], None]:
    """Another operand i; where a GPU keeps bf16 instead of f32, that."""

    def change(operands: list[Any]) -> None:
        bf16 = array is not None and array.dtype == F32 and operands[i] is not None and operands[i].dtype == np.uint16
        operands[i] = array.astype(np.uint16) if bf16 else array

    return change


def like(i: int, **changes: Any) -> Callable[[list[Any]], None]:
    """Operand i described differently."""

    def change(operands: list[Any]) -> None:
        operands[i] = ops.tensor(operands[i], **changes)

    return change


HOSTILE = [
    # op, change of the operands, params or None, what the error must say
    ("embedding", with_item(1, 2, -1), None, "token -1 at position 2"),
    ("embedding", with_item(1, 0, 5), None, "token 5 .*vocabulary of 5"),
    ("embedding", with_array(0, np.zeros((3, 9), F32)), None, "out .*9.*expected .*8"),
    ("embedding", with_array(1, np.zeros(3, F32)), None, "tokens .*f32"),
    ("embedding", with_array(2, np.zeros((5, 8), I32)), None, "weight"),
    ("embedding", with_array(2, None), None, "weight is missing"),
    ("rms_norm", with_array(2, np.zeros(7, F32)), None, "weight .*7"),
    ("rms_norm", with_array(1, None), None, "x is missing"),
    ("rms_norm", with_array(0, np.zeros((2, 8), I32)), None, "out .*i32"),
    ("rms_norm", None, [math.nan], "eps"),
    ("rms_norm", None, [-1.0], "eps is -1"),
    ("linear", with_array(2, np.zeros((16, 31), np.uint16)), None, "weight .*31.*32"),
    ("linear", with_array(2, np.zeros((16, 32), I32)), None, "weight"),
    ("linear", with_array(0, np.zeros((2, 17), F32)), None, "out .*17.*16"),
    ("linear", with_array(0, np.zeros((3, 16), F32)), None, "out .*3.*2"),
    ("linear", with_array(1, np.zeros((2, 32), np.float16)), None, "x .*f16"),
    ("linear", with_array(1, np.zeros(32, F32)), None, "x|operand 1"),
    ("linear", with_array(1, None), None, "x|operand 1"),
    ("linear", with_array(3, np.zeros(15, F32)), None, "bias .*15.*16"),
    ("linear", with_array(4, np.zeros(33, F32)), [0, 0, 1e-5], "x .*expected .*f32|norm .*33.*32"),
    ("linear", None, [0, 1, 0], "out .*16.*expected .*8"),
    ("linear", None, [1, 1, 0], "gated .*no accumulate"),
    ("rope_angles", with_array(0, np.zeros((3, 2, 5), F32)), None, "cos_sin .*5.*expected .*4"),
    ("rope_angles", with_array(1, np.zeros(3, F32)), None, "positions .*f32"),
    ("rope_angles", with_array(2, None), None, "inv_freq is missing"),
    ("rope_kv_write", with_item(4, 1, -1), None, "slot -1 of row 1"),
    ("rope_kv_write", with_item(4, 0, 3 * 64), None, "slot 192 of row 0"),
    ("rope_kv_write", None, [3, 1e-6], "3 query heads .* 2 kv heads"),
    ("rope_kv_write", None, [0, 1e-6], "query heads"),
    ("rope_kv_write", None, [math.nan, 1e-6], "query heads"),
    ("rope_kv_write", None, [8, 1e-6], "qkv"),
    ("rope_kv_write", with_array(1, np.zeros(9, F32)), None, "q_norm"),
    ("rope_kv_write", with_array(2, np.zeros(9, F32)), None, "k_norm"),
    ("rope_kv_write", with_array(3, np.zeros((2, 2, 8), F32)), None, "cos_sin"),
    ("rope_kv_write", with_array(5, np.zeros((3, 2, 32, 8), np.uint16)), None, "k_pages .*32"),
    ("rope_kv_write", with_array(6, np.zeros((2, 2, 64, 8), np.uint16)), None, "v_pages"),
    ("rope_kv_write", with_array(6, np.zeros((3, 2, 64, 8), np.float16)), None, "v_pages .*f16"),
    ("rope_kv_write", lambda o: o.__setitem__(slice(5, 7), [np.zeros((3, 2, 64, 258), np.uint16)] * 2), None, "d_head is 258"),
    ("rope_kv_write", lambda o: o.__setitem__(slice(5, 7), [np.zeros((3, 2, 64, 8), I32)] * 2), None, "k_pages"),
    ("attention_prefill", with_item(6, (0, 1), -1), None, "page -1 .*entry 0"),
    ("attention_prefill", with_item(6, (1, 0), 5), None, "page 5 .*entry 1"),
    ("attention_prefill", with_item(4, 0, 1), None, "q_begin"),
    ("attention_prefill", with_item(4, 2, 2), None, "q_begin"),
    ("attention_prefill", with_item(4, 1, 4), None, "entry 1 has -1 query rows"),
    ("attention_prefill", with_item(4, 1, -3), None, "entry 0 has -3 query rows"),
    ("attention_prefill", with_item(5, 0, 1), None, "entry 0 has 2 query rows and kv_len 1"),
    ("attention_prefill", with_item(5, 1, -5), None, "kv_len -5"),
    ("attention_prefill", with_item(5, 1, 2**31 - 1), None, "entry 1 needs .* pages"),
    ("attention_prefill", None, [-1, 1], "window is -1"),
    ("attention_prefill", None, [0, -1], "scale"),
    ("attention_prefill", None, [0, 0], "scale"),
    ("attention_prefill", None, [0, math.nan], "scale"),
    ("attention_prefill", with_array(1, np.zeros((3, 24), F32)), None, "q has 24 columns"),
    ("attention_prefill", with_array(0, np.zeros((2, 32), F32)), None, "out"),
    ("attention_prefill", with_array(3, np.zeros((5, 2, 64, 8), np.float16)), None, "v_pages"),
    ("attention_prefill", with_array(6, np.zeros((1, 3), I32)), None, "page_table"),
    ("attention_prefill", with_array(4, np.zeros(2, I32)), None, "q_begin"),
    ("attention_prefill", lambda o: o.__setitem__(slice(2, 4), [np.zeros((5, 2, 64, 8), I32)] * 2), None, "k_pages"),
    ("attention_decode", with_item(4, 1, 2), None, "entry 0 has 2 query rows"),
    ("attention_decode", with_item(4, 1, 0), None, "entry 0 has 0 query rows"),
    ("attention_decode", with_item(6, (0, 0), 5), None, "page 5 .*entry 0"),
    ("silu_mul", with_array(1, np.zeros((2, 15), F32)), None, "gate_up .*15.*16"),
    ("target_logprob", with_item(2, 1, -2), None, "target -2 of row 1"),
    ("target_logprob", with_item(2, 0, 9), None, "target 9 .*vocabulary of 9"),
    ("target_logprob", with_array(2, np.zeros(3, I32)), None, "targets"),
    ("page_copy", with_item(2, 1, -1), None, "page -1"),
    ("page_copy", with_item(3, 1, 6), None, "page .* 6 "),
    ("page_copy", with_array(3, np.zeros(3, I32)), None, "dst"),
    ("page_copy", with_array(1, np.zeros((5, 2, 64, 8), np.uint16)), None, "v_pages"),
    ("page_copy", with_array(0, None), None, "k_pages"),
    ("rms_norm", like(1, dtype=7), None, "operand 1: dtype is 7"),
    ("rms_norm", like(1, shape=()), None, "operand 1: n_dim is 0"),
    ("rms_norm", like(1, shape=(2, 2, 2, 1, 1)), None, "operand 1: n_dim is 5"),
    ("rms_norm", like(1, shape=(-2, 8)), None, r"operand 1: shape\[0\] is -2"),
    ("rms_norm", like(1, shape=(2, 2**50)), None, r"operand 1: shape\[1\]"),
    ("rms_norm", lambda o: o.pop(), None, "takes 3 operands and 1 parameters, got 2"),
    ("rms_norm", None, [], "takes 3 operands and 1 parameters, got 3 and 0"),
]


@CPU_AND_GPU
@pytest.mark.parametrize(
    ("op", "change", "params", "says"), [pytest.param(*h, id=f"{h[0]}-{h[3]}") for h in HOSTILE]
)  # fmt: skip
def test_bad_operands_are_refused_by_name_and_nothing_is_written(op: str, change: Any, params: Any, says: str, on: str) -> None:
    call = BUILD[op](SMALL[op], "bf16", on)
    operands: list[Any] = list(call.operands)
    if change:
        change(operands)
    arrays = [x for x in operands if isinstance(x, np.ndarray)]
    before = [x.copy() for x in arrays]
    with pytest.raises(InvalidArgumentError, match=says):
        run(op, operands, call.params if params is None else params, on=on)
    for array, old in zip(arrays, before, strict=True):
        assert (bits(array) == bits(old)).all(), "an operand was written"


def test_bad_calls() -> None:
    x = np.ones((1, 8), np.float32)
    good: list[Any] = [x.copy(), x, x[0]]
    for changes, says in (
        ({"op": "rms_nrom"}, "rms_nrom"), ({"op": ""}, "operation ''"), ({"on": "sse9"}, "sse9"), ({"threads": 0}, "n_threads is 0"),
        ({"threads": 10**6}, "n_threads"),
    ):  # fmt: skip
        with pytest.raises(InvalidArgumentError, match=says):
            run(**{"op": "rms_norm", "operands": good, "params": [0.0], **changes})
    with pytest.raises(InvalidArgumentError, match="n_operand is 17"):
        run("rms_norm", [x] * 17, [0.0])


ZERO_SIZES = {
    "linear over no inputs": "run('linear', [z(2, 16), z(2, 0), z(16, 0), None, None], [0, 0, 0])",
    "linear over no inputs, bf16": "run('linear', [z(2, 16), z(2, 0), z(16, 0).astype('u2'), None, None], [0, 0, 0])",
    "linear of no rows": "run('linear', [z(0, 32), z(0, 64), z(32, 64), None, None], [0, 0, 0])",
    "linear of no rows, bf16": "run('linear', [z(0, 32), z(0, 64), z(32, 64).astype('u2'), None, None], [0, 0, 0])",
    "linear to no outputs": "run('linear', [z(2, 0), z(2, 32), z(0, 32), None, None], [0, 0, 0])",
    "rms_norm over nothing": "run('rms_norm', [z(2, 0), z(2, 0), z(0)], [0])",
    "embedding of width 0": "run('embedding', [z(2, 0), i(2), z(3, 0)])",
    "rope without kv heads": "run('rope_kv_write', [z(1, 8), None, None, z(1, 2, 4), i(1), z(1, 0, 64, 8), z(1, 0, 64, 8)], [1, 0])",
    "rope without a head": "run('rope_kv_write', [z(1, 0), None, None, z(1, 2, 0), i(1), z(1, 1, 64, 0), z(1, 1, 64, 0)], [1, 0])",
    "attention without kv heads":
        "run('attention_prefill', [z(1, 8), z(1, 8), z(1, 0, 64, 8), z(1, 0, 64, 8), i01, i(1) + 1, i(1, 1)], [0, 1])",
    "attention without a head":
        "run('attention_prefill', [z(1, 0), z(1, 0), z(1, 1, 64, 0), z(1, 1, 64, 0), i01, i(1) + 1, i(1, 1)], [0, 1])",
    "attention without query heads":
        "run('attention_decode', [z(1, 0), z(1, 0), z(1, 1, 64, 8), z(1, 1, 64, 8), i01, i(1) + 1, i(1, 1)], [0, 1])",
    "attention over no entries":
        "run('attention_prefill', [z(0, 8), z(0, 8), z(1, 1, 64, 8), z(1, 1, 64, 8), i(1), i(0), i(0, 1)], [0, 1])",
    "sizes that overflow": "run('linear', [z(1, 1)] + [ops.tensor(z(1), shape=(2**39, 2**39))] * 2 + [None, None], [0, 0, 0])",
    "target_logprob over no tokens": "run('target_logprob', [z(1), z(1, 0), i(1) - 1])",
    "sample from no tokens": "run('sample', [z(1, 0), i(1), z(1)], [1, 0, 1, 0])",
}  # fmt: skip


def run_codes(codes: Sequence[str], on: str) -> None:
    """Runs them in another process."""
    setup = "import numpy as np, ops\nfrom functools import partial\nfrom pyruntime.errors import InvalidArgumentError\n"
    setup += f"run = partial(ops.run, on={on!r})\ni01 = np.array([0, 1], 'i4')\n"
    setup += "z = lambda *s: np.zeros(s, 'f4')\ni = lambda *s: np.zeros(s, 'i4')\n"
    done = python(setup + "".join(f"try:\n    {code}\nexcept InvalidArgumentError as e:\n    assert str(e)\n" for code in codes))
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("code", ZERO_SIZES.values(), ids=ZERO_SIZES.keys())
def test_sizes_of_zero_never_crash(code: str) -> None:
    """A size that makes no sense is refused, an empty one is done at once; neither may divide by zero."""
    run_codes([code], ops.SUPPORTED[-1])


@ON_GPU
def test_sizes_of_zero_never_crash_a_gpu(on: str) -> None:
    run_codes([*ZERO_SIZES.values()], on)


def test_isa_above_the_machine_is_refused() -> None:
    missing = [isa for isa in ops.ISAS if ops.missing(isa)]
    if not missing:
        pytest.skip("this machine has every instruction set")
    x = np.ones((1, 8), np.float32)
    with pytest.raises(PyruntimeError, match=missing[0]):
        run("rms_norm", [x.copy(), x, x[0]], [0.0], on=missing[0])
