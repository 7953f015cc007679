"""The operations that choose rows by score against numpy in float64: scores, bounds, votes, cuts, what is kept, and what is counted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import ops
import pytest
from ops import CPU_AND_GPU, EVERYWHERE, GPU, ROUNDOFF, Array, activation, nans, run, store, value

from pyruntime.errors import InvalidArgumentError

PAGE, BLOCK, BINS = 64, 16, 100
FIRST, MAX, SUM, LAYER = range(4)
FIELDS = ("n_step", "n_context", "n_selected", "n_exact", "n_mass", "mass", "n_true", "true_mass", "n_reached")
LATER = ("n_full", "n_choice", "n_compared", "n_overlap")
N_COUNTER = len(FIELDS) + BINS + len(LATER)
LENGTHS = (5 * PAGE + 37, 3 * PAGE, 1, 2 * PAGE + 1)


class Step:
    """Decode rows over pages in random places; what lies past their ends is NaN."""

    def __init__(self, dtype: str, h_q: int = 6, h_kv: int = 2, d: int = 24, seed: int = 0, on: str | None = None) -> None:
        rng = np.random.default_rng(seed)
        used = [-(-n // PAGE) for n in LENGTHS]
        self.n_page, self.max_pages, self.h_q, self.h_kv, self.d = sum(used) + 2, 8, h_q, h_kv, d
        self.k, self.v = (store(rng.standard_normal((self.n_page, h_kv, PAGE, d)), dtype) for _ in range(2))
        self.q = store((rng.standard_normal((len(LENGTHS), h_q * d)) * 1.5).astype(np.float32), activation(dtype, on))
        free = rng.permutation(self.n_page).tolist()
        self.table = np.full((len(LENGTHS), self.max_pages), -7, np.int32)
        for e, n in enumerate(LENGTHS):
            for p in range(used[e]):
                self.table[e, p] = free.pop()
            if n % PAGE:
                self.k[self.table[e, used[e] - 1], :, n % PAGE :] = nans([1], dtype)[0]
        for p in free:
            self.k[p] = self.v[p] = nans([1], dtype)[0]
        self.kv_len = np.array(LENGTHS, np.int32)
        self.scale, self.dtype = 1 / math.sqrt(d), dtype
        self.room = self.max_pages * PAGE

    def keys(self, e: int, kv_head: int, array: Array | None = None) -> np.ndarray:
        pages = self.k if array is None else array
        rows = np.concatenate([pages[p, kv_head] for p in self.table[e, : -(-LENGTHS[e] // PAGE)]])
        return value(rows)[: LENGTHS[e]]

    def query(self, e: int, h: int) -> np.ndarray:
        return value(self.q[e].reshape(self.h_q, -1)[h])

    def true_scores(self, e: int, h: int, *, amx: bool = False) -> np.ndarray:
        q = value(store(self.query(e, h).astype(np.float32), "bf16")) if amx else self.query(e, h)
        return self.keys(e, h // (self.h_q // self.h_kv)) @ q * self.scale


def sum_roundoff(on: str) -> float:
    """Of one addition in float32; the matrix units of a GPU truncate."""
    return ROUNDOFF["f32"] * (2 if on == GPU else 1)


def log_sum_exp(x: np.ndarray) -> float:
    return float(x.max() + np.log(np.exp(x - x.max()).sum()))


@EVERYWHERE
@pytest.mark.parametrize("dtype", ops.DTYPES)
@pytest.mark.parametrize(("h_q", "d"), [(6, 24), (2, 64), (10, 128)])
def test_score_rows(on: str, dtype: str, h_q: int, d: int) -> None:
    s = Step(dtype, h_q=h_q, d=d, on=on)
    scores, total = np.full((4, h_q, s.room), np.nan, np.float32), np.full((4, h_q), np.nan, np.float32)
    state = np.array([3, -1, 0, 2], np.int32)
    run("score_rows", [scores, total, s.q, s.k, s.table, s.kv_len, state], [s.scale], on=on, threads=2)
    for e, n in enumerate(LENGTHS):
        for h in range(h_q):
            if state[e] < 0:
                assert np.isnan(scores[e]).all() and np.isnan(total[e]).all()
                continue
            want = s.true_scores(e, h)
            # a sum of d products, in float32 and any order
            close = sum_roundoff(on) * (d + 2) * (np.abs(s.keys(e, h // (h_q // 2))) @ np.abs(s.query(e, h))).max() * s.scale
            assert np.abs(scores[e, h, :n] - want).max() <= close and np.isnan(scores[e, h, n:]).all()
            assert abs(total[e, h] - log_sum_exp(want)) < close + 2e-6 * max(1, abs(log_sum_exp(want)))


@EVERYWHERE
@pytest.mark.parametrize("dtype", ops.DTYPES)
@pytest.mark.parametrize(("h_q", "d"), [(6, 64), (20, 64), (6, 128), (20, 128), (4, 40), (4, 96), (4, 256)])
def test_dense_decode_gives_its_scores_and_leaves_entries_alone(on: str, dtype: str, h_q: int, d: int) -> None:
    s = Step(dtype, h_q=h_q, d=d, on=on)
    begin = np.arange(5, dtype=np.int32)
    scores, total = np.full((4, h_q, s.room), np.nan, np.float32), np.full((4, h_q), np.nan, np.float32)
    plain, out = (nans(s.q.shape, activation(dtype, on)) for _ in range(2))
    state = np.array([3, -1, 0, 2], np.int32)
    operands = [s.q, s.k, s.v, begin, s.kv_len, s.table]
    run("attention_decode", [plain, *operands], [0, s.scale], on=on)
    run("attention_decode", [out, *operands, scores, total, state], [0, s.scale], on=on, threads=2)
    assert np.isnan(value(out)[1]).all() and np.isnan(scores[1]).all() and np.isnan(total[1]).all()
    got, want = value(out)[state >= 0], value(plain)[state >= 0]
    # A GPU divides the rows anew among its blocks: weights of the softmax are rounded to the keys' type by other maxima, then the result.
    apart = 2 * ROUNDOFF[dtype] * (np.nanmax(np.abs(value(s.v))) + np.abs(want)) if on == GPU else 0
    assert (np.abs(got - want) <= apart).all()
    amx = on == "amx" and dtype == "bf16" and d % 32 == 0
    for e in (0, 2, 3):
        for h in range(h_q):
            want, n = s.true_scores(e, h, amx=amx), LENGTHS[e]
            close = sum_roundoff(on) * (d + 6) * (np.abs(s.keys(e, h // (h_q // 2))) @ np.abs(s.query(e, h))).max() * s.scale
            assert np.abs(scores[e, h, :n] - want).max() <= close and np.isnan(scores[e, h, n:]).all()
            assert abs(total[e, h] - log_sum_exp(want)) < close + 1e-5


@EVERYWHERE
@pytest.mark.parametrize("dtype", ops.DTYPES)
@pytest.mark.parametrize("d", [24, 64, 128])
def test_bounds_of_blocks(on: str, dtype: str, d: int) -> None:
    s = Step(dtype, d=d, on=on)
    low, high = (nans((s.n_page, 2, 4, d), dtype) for _ in range(2))
    pages = np.concatenate([s.table[e, : (n - 1) // PAGE] for e, n in enumerate(LENGTHS)])
    run("page_bounds", [low, high, s.k, pages], on=on)
    for p in range(s.n_page):
        blocks = value(s.k[p]).reshape(2, 4, BLOCK, d)
        if p in pages:
            assert np.array_equal(value(low[p]), blocks.min(2)) and np.array_equal(value(high[p]), blocks.max(2))
        else:
            assert np.isnan(value(low[p])).all()
    room = 4 * s.max_pages
    scores, total = np.full((4, 6, room), np.nan, np.float32), np.full((4, 6), np.nan, np.float32)
    run("score_blocks", [scores, total, s.q, low, high, s.table, s.kv_len], [s.scale], on=on, threads=2)
    for e, n in enumerate(LENGTHS):
        n_block = (n - 1) // PAGE * 4
        for h in range(6):
            q, keys = s.query(e, h), s.keys(e, h // 3)[: n_block * BLOCK].reshape(n_block, BLOCK, d)
            want = np.maximum(q * keys.min(1), q * keys.max(1)).sum(-1) * s.scale if n_block else np.zeros(0)
            assert np.abs(scores[e, h, :n_block] - want).max(initial=0) < 1e-5 and np.isnan(scores[e, h, n_block:]).all()
            assert abs(total[e, h] - (log_sum_exp(want) if n_block else 0)) < 1e-5
            true = (keys @ q).max(1) * s.scale if n_block else want
            assert (scores[e, h, :n_block] >= true - 1e-5).all(), "no upper bound"


# ---------------------------------------------------------------- choosing


def wanted_rows(scores: np.ndarray, n: int, kv_head: int, *, unit: int, k: int, fraction: float, p: float, sinks: int, window: int,
                vote: int, pool: int) -> set[int]:  # fmt: skip
    """The rows that one kv head of two chooses, by sorting; scores [h_q][units] of an entry with n rows."""
    h_q, group = len(scores), len(scores) // 2
    end = n - window if unit == 1 else min(n - window, (n - 1) // PAGE * PAGE)
    end = max(end, min(sinks, n))
    begin = min(sinks, end)
    exact = {*range(begin), *range(end, n)}
    total = np.array([log_sum_exp(x.astype(np.float64)) if len(x) else 0 for x in scores])
    share = np.exp(scores - total[:, None])
    heads = range(h_q) if vote == LAYER else range(kv_head * group, kv_head * group + group)
    first, past = begin // unit, -(-end // unit)
    if p > 0:
        rows = set(exact)
        for h in heads:
            mine = [i for i in np.argsort(-scores[h], kind="stable") if begin <= i < end]
            taken = share[h][sorted(exact)].sum()
            for i in mine:
                if p < 1 and taken >= p:
                    break
                taken += share[h][i]
                rows.add(int(i))
        return rows
    worth = (
        scores[heads[0]].astype(np.float64) if vote == FIRST else share[list(heads)].max(0) if vote == MAX else share[list(heads)].sum(0)
    )
    half = pool // 2
    worth = np.array([worth[max(0, i - half) : min(past, i + half + 1)].max(initial=-np.inf) for i in range(past)])
    n_unit = -(-(round(fraction * n) if fraction else k) // unit)
    order = first + np.argsort(-worth[first:past], kind="stable")[:n_unit]
    return exact | {r for u in order for r in range(max(begin, u * unit), min(end, (u + 1) * unit))}


def rows_of(ranges: np.ndarray, n: int) -> list[int]:
    first, upto = ranges[:n].T
    lengths = np.diff(upto, prepend=0)
    assert (lengths > 0).all() and (first[1:] > (first + lengths)[:-1]).all(), "ranges are neither sorted nor joined"
    return np.concatenate([np.arange(a, a + m) for a, m in zip(first, lengths, strict=True)]).tolist()


@EVERYWHERE
@pytest.mark.parametrize(
    "given",
    [
        {"vote": FIRST, "k": 40},
        {"vote": FIRST, "k": 40, "pool": 7},
        {"vote": MAX, "k": 64, "pool": 7},
        {"vote": SUM, "k": 10, "sinks": 4, "window": 8},
        {"vote": LAYER, "k": 100},
        {"vote": LAYER, "k": 1000},
        {"vote": SUM, "fraction": 0.05},
        {"vote": SUM, "p": 0.6},
        {"vote": SUM, "p": 0.95, "sinks": 0, "window": 1},
        {"vote": SUM, "p": 1.0},
        {"vote": MAX, "k": 48, "unit": BLOCK},
        {"vote": MAX, "k": 50, "unit": BLOCK, "sinks": 4, "window": 100},
        {"vote": MAX, "fraction": 0.2, "unit": BLOCK, "sinks": 0, "window": 1},
        {"vote": SUM, "k": 0},
    ],
    ids=str,
)
def test_top_rows(on: str, given: dict[str, Any]) -> None:
    """Scores with many ties: of equal rows the first are taken."""
    o = {"unit": 1, "k": 0, "fraction": 0.0, "p": 0.0, "sinks": 16, "window": 32, "vote": SUM, "pool": 1, **given}
    rng = np.random.default_rng(3)
    room = 8 * PAGE // o["unit"]
    scores = np.full((4, 6, room), np.nan, np.float32)
    for e, n in enumerate(LENGTHS):
        used = n if o["unit"] == 1 else (n - 1) // PAGE * 4
        scores[e, :, :used] = np.round(rng.standard_normal((6, used)) * 3, 1 if o["vote"] == FIRST else 6)
    total = np.array(
        [[log_sum_exp(x[~np.isnan(x)].astype(np.float64)) if (~np.isnan(x)).any() else 0 for x in e] for e in scores], np.float32
    )
    ranges, n_range = np.full((5, 2, room + 2, 2), -9, np.int32), np.full((5, 2), -9, np.int32)
    made = np.zeros(5, np.int32)
    state = np.array([4, 0, 2, -1], np.int32)
    counters = np.zeros((2, N_COUNTER), np.int64)
    numbers = [6, *(o[name] for name in ("unit", "k", "fraction", "p", "sinks", "window", "vote", "pool"))]
    run("top_rows", [ranges, n_range, made, counters, scores, total, np.array(LENGTHS, np.int32), state], numbers, on=on, threads=2)
    for e in range(3):
        used = LENGTHS[e] if o["unit"] == 1 else (LENGTHS[e] - 1) // PAGE * 4
        for h in range(2):
            got = rows_of(ranges[state[e], h], n_range[state[e], h])
            assert set(got) == wanted_rows(scores[e, :, :used], LENGTHS[e], h, **o)
    assert made.tolist() == [LENGTHS[1], 0, LENGTHS[2], 0, LENGTHS[0]] and (n_range[[1, 3]] == -9).all()
    assert (counters[:, -3] == 3).all() and (np.delete(counters, N_COUNTER - 3, 1) == 0).all(), "no choice came before these"


@CPU_AND_GPU
@pytest.mark.parametrize(("sinks", "window"), [(4, 32), (0, 1), (16, 400), (1000, 1)])
def test_sinks_and_window_alone(on: str, sinks: int, window: int) -> None:
    """Without scores nothing else is chosen (StreamingLLM)."""
    ranges, n_range = np.full((4, 2, 2, 2), -9, np.int32), np.full((4, 2), -9, np.int32)
    run("top_rows", [ranges, n_range, None, None, None, None, np.array(LENGTHS, np.int32), None],
        [6, 1, 0, 0, 0, sinks, window, SUM, 1], on=on)  # fmt: skip
    for e, n in enumerate(LENGTHS):
        for h in range(2):
            assert rows_of(ranges[e, h], n_range[e, h]) == sorted({*range(min(sinks, n)), *range(max(0, n - window), n)})


@CPU_AND_GPU
def test_overlap_of_successive_choices(on: str) -> None:
    rng = np.random.default_rng(0)
    first, second = (rng.standard_normal((1, 2, 400)).astype(np.float32) for _ in range(2))
    second[..., :200] = first[..., :200]
    ranges, n_range, made = np.zeros((1, 1, 402, 2), np.int32), np.zeros((1, 1), np.int32), np.zeros(1, np.int32)
    counters, chosen = np.zeros((1, N_COUNTER), np.int64), []
    for scores, n in ((first, 300), (second, 320)):
        total = np.array([[log_sum_exp(x[:n].astype(np.float64)) for x in scores[0]]], np.float32)
        operands = [ranges, n_range, made, counters, scores, total, np.array([n], np.int32), None]
        run("top_rows", operands, [2, 1, 50, 0, 0, 4, 8, SUM, 1], on=on)
        chosen.append(set(rows_of(ranges[0, 0], n_range[0, 0])))
    both = {r for r in range(4, 292)}  # where the first could choose
    assert counters[0, -3:].tolist() == [2, len(chosen[1] & both), len(chosen[1] & chosen[0] & both)]


@CPU_AND_GPU
@pytest.mark.parametrize("mean", [True, False])
def test_reuse(on: str, mean: bool) -> None:
    """A choice serves while it is young and the query is like its own; then it reaches to the newest row."""
    d, rng = 8, np.random.default_rng(0)
    base = rng.standard_normal((4, d)).astype(np.float32)
    turned = base.copy()
    turned[0] *= -3  # the mean turns more than the whole
    w = d if mean else 4 * d
    ranges = np.tile(np.array([[0, 4], [50, 14], [90, 24]], np.int32), (6, 2, 1, 1))
    n_range, made = np.full((6, 2), 3, np.int32), np.array([100, 0, 100, 100, 100, 100], np.int32)
    query = np.tile(base.sum(0) if mean else base.ravel(), (6, 1)).astype(np.float32)
    q = np.stack([base, base, turned, turned, base, base]).reshape(6, -1)
    kv_len = np.array([105, 105, 105, 104, 110, 100], np.int32)
    state = np.array([0, 1, 2, 3, 4, 5], np.int32)
    anew, kept = (np.full(6, -9, np.int32) for _ in range(2))
    run("reuse", [anew, kept, ranges, n_range, made, query, q, kv_len, state], [10, 5, 0.8], on=on)
    # serves; none there; unlike at a check; unlike between checks; too old; of this very length
    assert anew.tolist() == [-1, 1, 2, -1, 4, 5] and kept.tolist() == [0, -1, -1, 3, -1, -1]
    assert ranges[0, :, 2].tolist() == [[90, 29]] * 2 and ranges[3, :, 2].tolist() == [[90, 28]] * 2
    assert (ranges[[1, 2, 4, 5]] == [[0, 4], [50, 14], [90, 24]]).all()
    want = (turned.sum(0) if mean else turned.ravel()).astype(np.float32)
    assert np.allclose(query[2], want, atol=1e-6) and np.allclose(query[3], query[0], atol=1e-6)
    assert query.shape[1] == w


@EVERYWHERE
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_count_rows(on: str, dtype: str) -> None:
    s = Step(dtype, d=64, on=on)
    ranges = np.tile(np.array([[0, 4], [20, 14], [100, 0]], np.int32), (4, 2, 1, 1))
    n_range = np.full((4, 2), 3, np.int32)
    kv_len = np.array([LENGTHS[0], LENGTHS[1], 1, LENGTHS[3]], np.int32)
    ranges[:, :, 2, 1] = (14 + kv_len - 100)[:, None]
    state, made = np.array([0, -1, -1, 3], np.int32), np.array([110, 0, 0, 129], np.int32)
    counters, true = np.zeros((2, N_COUNTER), np.int64), np.full((4, 6), np.nan, np.float32)
    run("count_rows", [counters, true, s.q, s.k, s.table, kv_len, ranges, n_range, state, made, None], [1, 4, 10, s.scale, 0.9], on=on)
    for e in (0, 3):
        rows = rows_of(ranges[e, 0], 3)
        for h in range(6):
            y = np.exp(s.true_scores(e, h))
            assert abs(true[e, h] - y[rows].sum() / y.sum()) < 1e-5
    assert np.isnan(true[1:3]).all()
    # exact: 4 sinks, and from row 100 on; from row 119 on; everything dense but what could have been chosen
    exact = [4 + 357 - 100, 4 + 10, 1, 4 + 129 - 119]
    attended = [14 + 357 - 100, 192, 1, 14 + 29]
    for h in range(2):
        got = dict(zip((*FIELDS, *("bin",) * BINS, *LATER), counters[h].tolist(), strict=True))
        assert got["n_step"] == 4 and got["n_full"] == 2 and got["n_context"] == int(kv_len.sum()) and got["n_exact"] == sum(exact)
        assert got["n_selected"] == sum(attended) - sum(exact) and got["n_true"] == 6
        assert abs(got["true_mass"] / 2**32 - true[[0, 3], 3 * h : 3 * h + 3].sum()) < 1e-6
        assert counters[h, len(FIELDS) : len(FIELDS) + BINS].sum() == 6


@EVERYWHERE
@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_rope_shift(on: str, dtype: str) -> None:
    s = Step(dtype)
    before, pages = s.k.copy(), np.array([s.table[0, 1], s.table[1, 0]], np.int32)
    angle = -448 * 10000.0 ** -(np.arange(12) / 12)
    run("rope_shift", [s.k, pages, np.stack([np.cos(angle), np.sin(angle)]).astype(np.float32)], on=on, threads=2)
    for p in range(s.n_page):
        if p not in pages:
            assert np.array_equal(ops.bits(s.k[p]), ops.bits(before[p]))
            continue
        x, y = np.split(value(before[p]), 2, -1)
        want = np.concatenate([x * np.cos(angle) - y * np.sin(angle), y * np.cos(angle) + x * np.sin(angle)], -1)
        # cos and sin, two products and a sum in float32, then the keys' type
        assert (np.abs(value(s.k[p]) - want) <= ROUNDOFF[dtype] * np.abs(want) + 4 * ROUNDOFF["f32"] * (np.abs(x) + np.abs(y)).max()).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"state": np.array([9], np.int32)}, "state of entry 0 is 9, expected -1 or one of 1"),
        ({"kv_len": np.array([999], np.int32)}, "entry 0 has 999 scores, there is room for 64"),
        ({"ranges": np.zeros((1, 1, 4, 2), np.int32)}, "ranges has room for 4"),
        ({"numbers": [2, 1, 8, 0, 0, 0, 0, SUM, 1]}, "window is 0"),
        ({"numbers": [2, 1, 8, 0, 0, 0, 1, SUM, 2]}, "pool is 2, expected an odd number"),
        ({"numbers": [2, 4, 8, 0, 0, 0, 1, SUM, 1]}, "unit is 4, expected 1 or 16"),
        ({"numbers": [2, 1, 8, 0, 0, 0, 1, 7, 1]}, "vote is 7"),
    ],
)
def test_refusals(change: dict[str, Any], says: str) -> None:
    o = {
        "ranges": np.zeros((1, 1, 16, 2), np.int32),
        "kv_len": np.array([60], np.int32),
        "state": np.array([0], np.int32),
        "numbers": [2, 1, 8, 0, 0, 0, 1, SUM, 1],
        **change,
    }
    operands = [o["ranges"], np.zeros((1, 1), np.int32), None, None, np.zeros((1, 2, 64), np.float32), np.zeros((1, 2), np.float32)]
    with pytest.raises(InvalidArgumentError, match=says):
        run("top_rows", [*operands, o["kv_len"], o["state"]], o["numbers"])
