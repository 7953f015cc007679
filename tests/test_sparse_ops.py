"""The operations of sparse attention against numpy in float64: clustering, selection, attention over ranges, and taking a segment apart."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import ops
import pytest
from ops import CPU_AND_GPU, EVERYWHERE, GPU, ON_GPU, ROUNDOFF, Array, activation, bits, nans, run, store, value

from pyruntime.errors import InvalidArgumentError

PAGE = 64
FIT, MOMENT = 0, 1
U16 = 4  # prt_dtype
EXACT_CLUSTERS, FEW_CLUSTERS, TAIL_SPREAD = 64, 16, 0.5  # kExactClusters, kFewClusters, kTailSpread
F8_ROUNDOFF, F8_TINY = 2.0**-4, 2.0**-10  # 4 bits of precision; half the smallest subnormal
COUNTERS = ("n_step", "n_context", "n_selected", "n_exact", "n_mass", "mass", "n_true", "true_mass", "n_reached")
BINS, LATER = 100, 4  # of the histogram; counters after it, which only other policies use
# A GPU's kernels for d_head 64 and 128 in 16 bits are others than for the rest.
WITH_D = pytest.mark.parametrize(
    ("on", "d"),
    [pytest.param(*t.values, d, marks=t.marks) for t in EVERYWHERE.args[1] for d in ((24, 64, 128) if t.values[0] == GPU else (24,))],
)


class Cache:
    """Pages with random clustered keys, and an index of NaN and out-of-range numbers."""

    def __init__(self, n_page: int, h_kv: int, d: int, n_slot: int, dtype: str, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.n_page, self.h_kv, self.d, self.n_slot = n_page, h_kv, d, n_slot
        centers = rng.standard_normal((12, d)) * 1.5
        keys = centers[rng.integers(0, 12, (n_page, h_kv, PAGE))] + rng.standard_normal((n_page, h_kv, PAGE, d)) * 0.7
        self.k, self.v = store(keys, dtype), store(rng.standard_normal(keys.shape), dtype)
        self.centroid, self.variance, self.mean_value = (np.full((n_page, h_kv, n_slot, d), 0x7F, np.uint8) for _ in range(3))
        self.range = np.full((n_page, h_kv, n_slot, 2), -(2**31), np.int32)
        self.order = np.full((n_page, h_kv, PAGE), 0xFFFF, np.uint16)

    def cluster(self, segments: Any, *, iterations: int = 10, seed: int = 0, on: str | None = None, threads: int = 1) -> None:
        pages = np.array(segments, np.int32)
        order = ops.tensor(self.order, dtype=U16)
        operands = [self.k, self.v, pages, self.centroid, self.variance, self.mean_value, self.range, order]
        run("cluster", operands, [iterations, seed], on=on, threads=threads)

    def rows(self, array: Array, pages: Any, h: int) -> Array:
        """[rows of the segment][d] of one head"""
        return np.concatenate([array[p, h] for p in pages])

    def slots(self, array: Array, pages: Any, h: int) -> Array:
        return np.concatenate([array[p, h] for p in pages])

    def ranges(self, pages: Any, h: int) -> np.ndarray:
        """[cluster][first row of the segment, rows]"""
        out = self.slots(self.range, pages, h).astype(np.int64)
        out[:, 0] += np.arange(len(out)) // self.n_slot * PAGE
        return out


def lloyd(keys: np.ndarray, k: int, iterations: int, seed: int) -> np.ndarray:
    """The cluster of each row, from the same draws."""
    mask = (1 << 64) - 1

    def draw() -> int:
        nonlocal seed
        seed = (seed + 0x9E3779B97F4A7C15) & mask
        z = seed
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    deck = list(range(len(keys)))
    for j in range(k):
        i = j + draw() % (len(keys) - j)
        deck[j], deck[i] = deck[i], deck[j]
    centroids, of = keys[deck[:k]].copy(), np.full(len(keys), -1)
    for _ in range(iterations):
        nearest = (keys @ centroids.T - (centroids**2).sum(-1) / 2).argmax(-1)
        if (nearest == of).all():
            break
        of = nearest
        for j in range(k):
            if (of == j).any():
                centroids[j] = keys[of == j].mean(0)
    return of


def inertia(keys: np.ndarray, of: np.ndarray) -> float:
    """Sum of squared distances from the means of the clusters."""
    return sum(float(((keys[of == j] - keys[of == j].mean(0)) ** 2).sum()) for j in set(of.tolist()))


@EVERYWHERE
@pytest.mark.parametrize("dtype", ops.DTYPES)
@pytest.mark.parametrize(("d", "n_slot", "iterations"), [(64, 4, 10), (40, 2, 3), (128, 8, 1), (10, 1, 5)])
def test_cluster(on: str, dtype: str, d: int, n_slot: int, iterations: int) -> None:
    check_clusters(Cache(9, 2, d, n_slot, dtype), [[7, 2, 5], [0, 8, 1]], iterations, on, exact=on != GPU or dtype == "f32" or d % 64 > 0)


@ON_GPU
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("n_page", [4, 13, 32])
def test_cluster_many_segments(on: str, dtype: str, d: int, n_page: int) -> None:
    """As a session does it after a prompt; twice the same bits."""
    pages = np.random.default_rng(n_page).permutation(6 * n_page + 1)[: 6 * n_page].reshape(6, n_page)
    first, second = Cache(6 * n_page + 1, 3, d, 4, dtype), Cache(6 * n_page + 1, 3, d, 4, dtype)
    check_clusters(first, pages.tolist(), 10, on, exact=False)
    second.cluster(pages, seed=5, on=on)
    for name in ("k", "v", "centroid", "variance", "mean_value", "range", "order"):
        assert np.array_equal(bits(getattr(first, name)), bits(getattr(second, name))), name


def check_clusters(c: Cache, segments: list[list[int]], iterations: int, on: str, *, exact: bool) -> None:
    """The clusters are Lloyd's in float64, rows have changed places accordingly and nothing else, and what is kept about them is right.
    Not exact: the centroids were rounded to the keys' type after each iteration; the clusters are then others, and about as good."""
    d, k = c.d, len(segments[0]) * c.n_slot
    before = [x.copy() for x in (c.k, c.v)]
    c.cluster(segments, iterations=iterations, seed=5, on=on)
    for pages in segments:
        for h in range(c.h_kv):
            keys, values = (value(c.rows(x, pages, h)) for x in before)
            order, of = c.rows(c.order, pages, h).astype(np.int64), np.empty(len(keys), np.int64)
            assert sorted(order.tolist()) == list(range(len(keys)))
            of[order] = np.repeat(np.arange(k), c.ranges(pages, h)[:, 1])
            wanted_of = lloyd(keys, k, iterations, 5 + 0x632BE59BD9B4E019 * h & (1 << 64) - 1)
            assert np.array_equal(of, wanted_of) if exact else inertia(keys, of) < 1.1 * inertia(keys, wanted_of)
            assert order.tolist() == np.lexsort((np.arange(len(of)), of)).tolist()
            for old, new in zip(before, (c.k, c.v), strict=True):
                assert (bits(c.rows(old, pages, h))[order] == bits(c.rows(new, pages, h))).all()
            ranges = c.ranges(pages, h)
            assert ranges[:, 1].tolist() == np.bincount(of, minlength=k).tolist()
            assert ranges[:, 0].tolist() == (np.cumsum(ranges[:, 1]) - ranges[:, 1]).tolist()
            for j, (first, n) in enumerate(ranges):
                members = order[first : first + n]
                mean = keys[members].mean(0) if n else np.zeros(d)
                wanted = (mean, ((keys[members] - mean) ** 2).mean(0) if n else mean, values[members].mean(0) if n else mean)
                # e4m3 of a sum of n terms in float32, and of n squares of differences from a mean so computed
                for got, want in zip((c.centroid, c.variance, c.mean_value), wanted, strict=True):
                    error = np.abs(value(c.slots(got, pages, h)[j]) - want)
                    assert (error <= F8_ROUNDOFF * np.abs(want) + F8_TINY + 1e-5).all()
    for p in set(range(c.n_page)) - set(np.concatenate(segments).tolist()):  # in no segment
        assert (bits(c.k[p]) == bits(before[0][p])).all() and (c.order[p] == 0xFFFF).all() and (c.range[p] == -(2**31)).all()


@EVERYWHERE
def test_clusters_do_not_depend_on_threads_or_on_where_the_pages_are(on: str) -> None:
    caches = [Cache(8, 3, 32, 4, "bf16") for _ in range(3)]
    moved = np.array([4, 5, 6, 7, 0, 1, 2, 3])
    caches[2].k, caches[2].v = caches[2].k[moved].copy(), caches[2].v[moved].copy()
    caches[0].cluster([[0, 1, 2, 3], [4, 5, 6, 7]], on=on, threads=1)
    caches[1].cluster([[0, 1, 2, 3], [4, 5, 6, 7]], on=on, threads=3)
    caches[2].cluster([[0, 1, 2, 3], [4, 5, 6, 7]], on=on, threads=2)
    for name in ("k", "v", "centroid", "variance", "mean_value", "range", "order"):
        first, second, third = (getattr(c, name) for c in caches)
        assert np.array_equal(first, second) and np.array_equal(first[moved], third), name


@CPU_AND_GPU
@pytest.mark.parametrize("keep", [3, 2])
def test_uncluster(on: str, keep: int) -> None:
    for dtype in ops.DTYPES:
        c = Cache(8, 2, 24, 4, dtype)
        before = [x.copy() for x in (c.k, c.v)]
        c.cluster([[5, 1, 3]], on=on)
        dst = [5, 1, 3] if keep == 3 else [0, 7]
        operands = [c.k, c.v, ops.tensor(c.order, dtype=U16), np.array([5, 1, 3], np.int32), np.array(dst, np.int32)]
        clustered = [x.copy() for x in (c.k, c.v)]
        run("uncluster", operands, on=on)
        for now, first, middle in zip((c.k, c.v), before, clustered, strict=True):
            for to, of in zip(dst, [5, 1, 3], strict=False):
                assert (bits(now[to]) == bits(first[of])).all()
            for p in set(range(8)) - set(dst):
                assert (bits(now[p]) == bits(middle[p])).all()


# ---------------------------------------------------------------- selection and attention

LENGTHS = ((8 * PAGE + 37, 1, 7), (3 * PAGE, 0, 0), (6 * PAGE + 1, 0, 6), (5, 0, 0))  # kv_len, first and end of the closed pages


class Step:
    """Entries with closed segments of three pages, or fewer at the end; the rest of the cache is NaN."""

    def __init__(self, dtype: str, h_q: int = 6, h_kv: int = 2, d: int = 24, n_slot: int = 4, on: str | None = None,
                 lengths: tuple[tuple[int, int, int], ...] = LENGTHS) -> None:  # fmt: skip
        self.lengths = lengths
        n_page = sum(-(-n // PAGE) for n, _, _ in lengths)
        self.c = c = Cache(n_page + 2, h_kv, d, n_slot, dtype)
        rng = np.random.default_rng(1)
        self.q = store((rng.standard_normal((len(lengths), h_q * d)) * 1.5).astype(np.float32), activation(dtype, on))
        self.h_q, self.scale = h_q, 1 / math.sqrt(d)
        free = rng.permutation(n_page + 2).tolist()
        self.max_pages = 2 + max(-(-n // PAGE) for n, _, _ in lengths) // 2 * 2
        self.table = np.full((len(lengths), self.max_pages), -7, np.int32)
        self.kv_len = np.array([n for n, _, _ in lengths], np.int32)
        self.closed = np.array([x for _, *x in lengths], np.int32)
        for e, (n, first, end) in enumerate(lengths):
            for p in range(-(-n // PAGE)):
                self.table[e, p] = free.pop()
            for p in range(first, end, 3):
                c.cluster([self.table[e, p : min(end, p + 3)]])
            last = self.table[e, -(-n // PAGE) - 1]
            if n % PAGE:
                c.k[last, :, n % PAGE :] = c.v[last, :, n % PAGE :] = nans([1], dtype)[0]
        for p in free:
            c.k[p] = c.v[p] = nans([1], dtype)[0]
        self.max_range = self.max_pages * n_slot + 2
        self.ranges = np.full((len(lengths), h_kv, self.max_range, 2), -9, np.int32)
        self.n_range = np.full((len(lengths), h_kv), -9, np.int32)
        self.tail = np.full((len(lengths), h_q, self.max_pages * n_slot), np.nan, np.float32)
        self.counters = np.zeros((h_kv, len(COUNTERS) + BINS + LATER), np.int64)
        self.mass, self.true_mass = (np.full((len(lengths), h_q), np.nan, np.float32) for _ in range(2))

    def select(self, p: float, estimator: int, *, budget: float = 1, on: str | None = None, threads: int = 1,
               places: tuple[Array, Array] | None = None) -> None:  # fmt: skip
        """places: state, made"""
        c = self.c
        out = [self.ranges, self.n_range, self.tail, self.mass, self.true_mass, self.counters]
        operands = [*out, self.q, c.k, self.table, self.kv_len, self.closed, c.centroid, c.variance, c.range, *(places or ())]
        run("select", operands, [self.scale, p, budget, estimator], on=on, threads=threads)

    def attend(self, *, tail: bool, on: str | None = None, threads: int = 1, state: Array | None = None) -> Array:
        out = nans(self.q.shape, {"uint16": "bf16", "float16": "f16", "float32": "f32"}[self.q.dtype.name])
        operands = [out, self.q, self.c.k, self.c.v, self.table, self.ranges, self.n_range]
        rest = [self.tail, self.closed, self.c.mean_value] if tail else [None] * 3
        run("sparse_attention", [*operands, *rest, *([] if state is None else [state])], [self.scale], on=on, threads=threads)
        return out

    def rows(self, array: Array, e: int, kv_head: int) -> np.ndarray:
        n = self.kv_len[e]
        return value(np.concatenate([array[p, kv_head] for p in self.table[e, : -(-n // PAGE)]])[:n])

    def clusters(self, e: int, kv_head: int) -> list[tuple[int, int, int, int]]:
        """(first row of the sequence, rows, page, slot)"""
        out = []
        for p in range(*self.closed[e]):
            for s in range(self.c.n_slot):
                first, n = self.c.range[self.table[e, p], kv_head, s]
                out.append((int(first) + p * PAGE, int(n), int(self.table[e, p]), s))
        return out

    def chosen_rows(self, e: int, kv_head: int) -> np.ndarray:
        first, upto = self.ranges[e, kv_head, : self.n_range[e, kv_head]].T
        n = np.diff(upto, prepend=0)
        assert (n > 0).all() and (first[1:] > (first + n)[:-1]).all(), "ranges are neither sorted nor joined"
        return np.concatenate([np.arange(at, at + rows) for at, rows in zip(first, n, strict=True)])


def wanted_choice(s: Step, e: int, head: int, p: float, estimator: int, budget: float = 1) -> tuple[set[int], float, np.ndarray]:
    """(chosen clusters, estimated share, log mass of each cluster for the tail) of one query head, in float64"""
    p, budget = float(np.float32(p)), float(np.float32(budget))
    c, kv_head = s.c, head // (s.h_q // s.c.h_kv)
    q = value(s.q)[e].reshape(s.h_q, -1)[head]
    y = np.exp(s.rows(c.k, e, kv_head) @ q * s.scale)
    clusters = s.clusters(e, kv_head)
    n = np.array([x[1] for x in clusters])
    mean = np.array([value(c.centroid[page, kv_head, slot]) @ q for _, _, page, slot in clusters]) * s.scale
    spread = np.array([value(c.variance[page, kv_head, slot]) @ q**2 for _, _, page, slot in clusters]) * s.scale**2 / 2
    with np.errstate(divide="ignore"):
        if clusters and estimator == MOMENT:  # the largest of n, where the mean of a lognormal is above it
            log_n = np.log(np.maximum(n, 1))
            spread = np.where(spread > log_n, 2 * np.sqrt(spread * log_n) - log_n, spread)
        log_mass = np.log(n) + mean + spread if clusters else np.zeros(0)
        unchosen = log_mass - spread * (1 - TAIL_SPREAD if estimator == MOMENT else 1) if clusters else log_mass
    exact = np.array([y[first : first + m].sum() for first, m, _, _ in clusters])
    begin, end = s.closed[e] * PAGE
    taken = y[:begin].sum() + y[end:].sum()
    chosen: set[int] = set()
    if estimator == MOMENT:
        mass, least, rows, p = np.exp(log_mass), math.ceil(4 * p), n.sum(), p / (p + 0.9 * (1 - p))
        order = [int(j) for j in np.argsort(np.where(n > 0, -mean - spread, np.inf), kind="stable") if n[j]]
        for stage in (FEW_CLUSTERS, EXACT_CLUSTERS):
            counted, behind = order[:stage], order[stage:]
            worth = exact[counted].sum() / mass[counted].sum() if len(counted) == EXACT_CLUSTERS else 1
            total = taken + exact[counted].sum() + worth * mass[behind].sum()
            best = sorted(counted, key=lambda j: (-exact[j] / n[j], j))
            got = [0, *np.cumsum(n[best])]
            share = (taken + np.concatenate([[0], np.cumsum(exact[best])])) / total if total else np.ones(1)
            ends = [i for i in range(len(best) + 1) if got[i] >= budget * rows or (i >= least and p < 1 and share[i] >= p)]
            if ends or not behind:
                end = ends[0] if ends else len(best)
                unchosen[counted] = np.log(exact[counted])
                return set(best[:end]), share[end], unchosen
        chosen, got, rest = set(counted), n[counted].sum(), mass[behind].sum()
        taken += exact[counted].sum()
        for j in behind:
            if got >= budget * rows or (p < 1 and taken >= p * (taken + worth * rest)):
                break
            rest -= mass[j]
            got += n[j]
            taken += worth * mass[j]
            chosen.add(j)
        return chosen, taken / (taken + worth * rest), unchosen
    order = [j for j in np.argsort(-mean, kind="stable") if n[j]]
    starts, rows = np.cumsum([0, *n[order]]), n.sum()
    if not order:
        return chosen, 1.0, unchosen
    x = np.array([0.1, 0.6]) * rows
    near = [[j for j, at in zip(order, starts, strict=False) if at < xi + rows / 200 and at + n[j] > xi - rows / 200] for xi in x]
    m = [exact[js].sum() / n[js].sum() for js in near]
    a = (m[0] - m[1]) / (1 / x[0] - 1 / x[1])
    b = m[0] - a / x[0]
    mass = np.array([
        exact[j] if at < 0.02 * rows else max(0, a * math.log((at + n[j]) / at) + b * n[j]) for j, at in zip(order, starts, strict=False)
    ])  # fmt: skip
    total = taken + mass.sum()
    for j, part in zip(order, mass, strict=True):
        if n[list(chosen)].sum() >= budget * rows or (p < 1 and taken >= p * total):
            break
        taken += part
        chosen.add(int(j))
    return chosen, taken / total, unchosen


def check_choices(s: Step, p: float, estimator: int, budget: float, on: str, n_off: int) -> None:
    """A GPU squares queries in f16: up to n_off of its clusters may be others."""
    close = 2e-3 if on == GPU else 1e-4
    for e, (kv_len, first, end) in enumerate(s.lengths):
        for kv_head in range(2):
            choices = [wanted_choice(s, e, h, p, estimator, budget) for h in range(kv_head * 3, kv_head * 3 + 3)]
            union = set().union(*(chosen for chosen, _, _ in choices))
            clusters, open_rows = s.clusters(e, kv_head), {*range(first * PAGE), *range(end * PAGE, kv_len)}
            want = open_rows.union(*(range(clusters[j][0], sum(clusters[j][:2])) for j in union))
            rows = s.chosen_rows(e, kv_head)
            there = set(rows.tolist())
            got = {j for j, x in enumerate(clusters) if x[1] > 0 and x[0] in there}
            if on == GPU and got != union:
                assert len(got ^ union) <= n_off
                want, union = open_rows.union(*(range(clusters[j][0], sum(clusters[j][:2])) for j in got)), got
                choices = [(chosen, s.mass[e, kv_head * 3 + g], unchosen) for g, (chosen, _, unchosen) in enumerate(choices)]
            assert there == want
            if p == budget == 1:
                assert len(rows) == kv_len
            for g, (_, mass, unchosen) in enumerate(choices):
                h = kv_head * 3 + g
                # scores are sums of d products in float32 below 2^5: off by 2^-24 x 24 x 2^5 at most; so are their exponentials
                assert abs(s.mass[e, h] - mass) < close
                y = np.exp(s.rows(s.c.k, e, kv_head) @ value(s.q)[e].reshape(6, -1)[h] * s.scale)
                assert abs(s.true_mass[e, h] - y[rows].sum() / y.sum()) < close
                tail = np.where([j not in union and clusters[j][1] > 0 for j in range(len(clusters))], unchosen, -np.inf)
                assert np.allclose(s.tail[e, h, : len(tail)], tail, rtol=0, atol=close) and np.isnan(s.tail[e, h, len(tail) :]).all()


@WITH_D
@pytest.mark.parametrize("dtype", ops.DTYPES)
@pytest.mark.parametrize(("estimator", "n_slot"), [(FIT, 4), (MOMENT, 4), (MOMENT, 16)])
@pytest.mark.parametrize(("p", "budget"), [(0.3, 1), (0.9, 1), (1.0, 1), (1.0, 0.2), (0.9, 0.35)])
def test_select(on: str, d: int, dtype: str, estimator: int, n_slot: int, p: float, budget: float) -> None:
    """With 16 clusters to a page a head has up to 96 of them: more than are counted exactly."""
    s = Step(dtype, n_slot=n_slot, d=d, on=on)
    s.select(p, estimator, budget=budget, on=on)
    check_choices(s, p, estimator, budget, on, n_off=3 if p < 1 else 0)


@CPU_AND_GPU
@pytest.mark.parametrize("query", [1, 3])
@pytest.mark.parametrize(("p", "budget"), [(0.1, 1), (0.3, 1), (0.7, 1), (0.7, 0.06), (1, 0.03), (1, 0.06), (1, 0.5), (0.9, 0.2)])
def test_select_among_many(on: str, query: float, p: float, budget: float) -> None:
    """3,200 clusters, of which a head takes a few, some hundreds, or most: a GPU sorts the first 192 or a few more, and searches behind
    these. Queries three times as long concentrate the mass."""
    s = Step("bf16", n_slot=16, d=64, on=on, lengths=((203 * PAGE + 11, 1, 201), (40 * PAGE, 3, 40)))
    s.q = store(query * value(s.q), {"uint16": "bf16", "float16": "f16", "float32": "f32"}[s.q.dtype.name])
    s.select(p, MOMENT, budget=budget, on=on)
    check_choices(s, p, MOMENT, budget, on, n_off=12)


@WITH_D
def test_wide_clusters_are_worth_their_largest_row(on: str, d: int) -> None:
    """Queries four times as long: half the variance of a cluster's scores is mostly more than the logarithm of its rows. In the tail of
    clusters that are surely behind those that are counted."""
    s = Step("f32" if d == 24 else "bf16", d=d, on=on, n_slot=16)
    s.q = store(4 * value(s.q), {"uint16": "bf16", "float16": "f16", "float32": "f32"}[s.q.dtype.name])
    s.select(0.5, MOMENT, on=on)
    n_wide = 0
    for e in range(len(LENGTHS)):
        for h in range(s.h_q):
            q, want = value(s.q)[e].reshape(s.h_q, -1)[h], []
            for j, (_, n, page, slot) in enumerate(s.clusters(e, h // 3)):
                if n:
                    mean = value(s.c.centroid[page, h // 3, slot]) @ q * s.scale
                    w = value(s.c.variance[page, h // 3, slot]) @ q**2 * s.scale**2 / 2
                    gain = w if w <= math.log(n) else 2 * math.sqrt(w * math.log(n)) - math.log(n)
                    want.append((mean + gain, j, w, w > math.log(n), math.log(n) + mean + TAIL_SPREAD * gain))
            for _, j, w, wide, mass in sorted(want)[: -EXACT_CLUSTERS - 4]:
                if s.tail[e, h, j] > -np.inf:
                    n_wide += wide
                    # A GPU squares in f16: 2^-11 of w
                    assert abs(s.tail[e, h, j] - mass) < (2**-10 if on == GPU else 2**-18) * (w + 10)
    assert n_wide > 50


@WITH_D
def test_an_over_estimated_cluster_does_not_end_the_choice(on: str, d: int) -> None:
    """Its variance says 20 nats too much, so that it is all but 1e-8 of the estimated mass: what is left once it is counted must not be
    the rounding of a float."""
    s = Step("f32" if d == 24 else "bf16", d=d, on=on)
    e, kv_head, heads = 0, 0, slice(0, 3)
    _, _, page, slot = max((c for c in s.clusters(e, kv_head) if c[1] > 0), key=lambda c: c[1])
    s.c.variance[page, kv_head, slot] = 0x59  # 18
    s.select(0.9, 1, on=on)
    assert (s.true_mass[e, heads] > 0.85).all()


@CPU_AND_GPU
def test_counters_add_up(on: str) -> None:
    s = Step("bf16", on=on)
    want = np.zeros_like(s.counters)
    for p in (0.4, 0.8):
        s.select(p, MOMENT, on=on)
        for h in range(2):
            mine = slice(3 * h, 3 * h + 3)
            for e, (kv_len, first, end) in enumerate(LENGTHS):
                exact, reached = kv_len - (end - first) * PAGE, s.true_mass[e, mine] >= np.float32(p)
                mass, true = ((x[e, mine].astype(np.float64) * 2**32).astype(np.int64).sum() for x in (s.mass, s.true_mass))
                want[h, : len(COUNTERS)] += [1, kv_len, len(s.chosen_rows(e, h)) - exact, exact, 3, mass, 3, true, reached.sum()]
                np.add.at(want[h, len(COUNTERS) : -LATER], np.minimum(s.true_mass[e, mine] * np.float32(BINS), BINS - 1).astype(int), 1)
    assert np.array_equal(s.counters, want)


def test_shares_that_are_no_numbers_do_not_spoil_the_counters() -> None:
    """A loaded file may hold any bits. What they are worth may be no number; in the counters it is 0 to 2^32 parts of one."""
    rng = np.random.default_rng(0)
    n = np.int64(3 * len(LENGTHS))
    for _ in range(40):
        s = Step("f32")
        for array in (s.c.k, s.c.centroid, s.c.variance):
            raw = array.view(np.uint8)
            raw[:] = rng.integers(0, 256, raw.shape, dtype=np.uint8)
        s.select(0.8, MOMENT, on="baseline")
        for name, parts in (("mass", n << 32), ("true_mass", n << 32), ("n_true", n)):
            got = s.counters[:, COUNTERS.index(name)]
            assert (got >= 0).all() and (got <= parts).all(), name
        assert (s.counters[:, len(COUNTERS) : -LATER].sum(axis=1) == n).all()


@CPU_AND_GPU
def test_f8_is_rounded_to_nearest_even_and_saturated(on: str) -> None:
    """A cluster for every row: its centroid is the row. Halfway between two numbers the even one is taken."""
    c = Cache(4, 1, 128, 64, "f32")
    finite = np.sort(ops.F8[:127])
    wide = np.concatenate([finite, (finite[1:] + finite[:-1]) / 2, np.geomspace(2.0**-14, 2e4, 200), [np.inf, 460, 470]]).astype(np.float32)
    keys = np.random.default_rng(0).choice(np.concatenate([wide, -wide]), (64, 128)).astype(np.float32)
    keys[np.isinf(keys)] = 1e6
    c.k[2, 0] = keys
    c.cluster([[2]], iterations=1, on=on)
    distance = np.abs(finite - np.minimum(np.abs(keys.astype(np.float64)), 448)[..., None])
    nearest = distance.argmin(-1)
    other = np.minimum(nearest + 1, 126)
    tie = np.take_along_axis(distance, other[..., None], -1)[..., 0] == distance.min(-1)
    even = np.where(tie & (nearest % 2 == 1), other, nearest)
    got = c.centroid[2, 0]
    for cluster, (first, n) in enumerate(c.range[2, 0]):
        assert n == 1
        row = c.order[2, 0, first]
        assert (got[cluster] & 127).tolist() == even[row].tolist()
        assert ((got[cluster] >> 7) == (keys[row] < 0)).all()


@EVERYWHERE
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_every_f8_number_is_read_exactly(on: str, dtype: str) -> None:
    """In the tail of the last two of 18 clusters: the 16 in front of them are counted."""
    c = Cache(9, 1, 128, 2, dtype)
    c.range[:] = [[0, 32], [32, 32]]
    c.k[:] = 0
    c.variance[:] = 0
    q = store(np.random.default_rng(0).choice([-1.0, 1.0], (1, 128)).astype(np.float32), activation(dtype, on))
    c.centroid[:] = np.where(value(q[0]) > 0, 0x48, 0xC8)  # 4 in the direction of q: more than those sum up to
    c.centroid[8, 0] = np.arange(256).reshape(2, 128)
    c.centroid[8, 0, :, 127] = 0  # NaN
    tail = np.full((1, 1, 18), np.nan, np.float32)
    spare = [np.zeros((1, 1, 20, 2), np.int32), np.zeros((1, 1), np.int32), tail, np.zeros((1, 1), np.float32), None, None]
    where = [np.arange(9, dtype=np.int32)[None], np.array([576], np.int32), np.array([[0, 9]], np.int32)]
    scale = 2.0**-7
    run("select", [*spare, q, c.k, *where, c.centroid, c.variance, c.range], [scale, 1e-30, 1, MOMENT], on=on)
    want = np.append(np.full(16, np.log(32)), value(c.centroid[8, 0]) @ value(q[0]) * scale + np.log(32))
    got = value(tail[0, 0])
    assert np.isneginf(got).sum() == 1 and np.abs(got - want)[np.isfinite(got)].max() < 1e-5


@EVERYWHERE
@pytest.mark.parametrize("dtype", ops.DTYPES)
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize(("group", "d"), [(1, 64), (3, 64), (3, 128), (2, 40)])
def test_sparse_attention(on: str, dtype: str, tail: bool, group: int, d: int) -> None:
    """Against the formula in float64. On AMX queries and softmax weights are rounded to bf16, as in dense attention; on a GPU weights and
    results to the type of the keys."""
    s = Step(dtype, h_q=2 * group, d=d, on=on)
    s.select(0.5, MOMENT, on=on)
    out = s.attend(tail=tail, on=on)
    amx = on == "amx" and dtype == "bf16"
    for e in range(len(LENGTHS)):
        for h in range(2 * group):
            rows = s.chosen_rows(e, h // group)
            q = value(store(s.q[e].reshape(2 * group, -1)[h], "bf16") if amx else s.q[e].reshape(2 * group, -1)[h])
            y = np.exp(s.rows(s.c.k, e, h // group)[rows] @ q * s.scale)
            top, bottom = y @ s.rows(s.c.v, e, h // group)[rows], y.sum()
            if tail:
                clusters = s.clusters(e, h // group)
                weight = np.exp(value(s.tail[e, h, : len(clusters)]))
                means = np.array([value(s.c.mean_value[page, h // group, slot]) for _, _, page, slot in clusters]).reshape(-1, d)
                top, bottom = top + weight @ means, bottom + weight.sum()
            tolerance = max(2e-5, 4 * ROUNDOFF[dtype]) if on == GPU else 2.0**-8 * 4 if amx else 2e-5
            assert np.abs(value(out[e].reshape(2 * group, -1)[h]) - top / bottom).max() < tolerance


@EVERYWHERE
@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_everything_selected_is_dense_attention(on: str, dtype: str) -> None:
    s = Step(dtype, d=64, on=on)
    s.select(1.0, MOMENT, on=on)
    dense = np.empty_like(s.q)
    begin = np.arange(len(LENGTHS) + 1, dtype=np.int32)
    run("attention_decode", [dense, s.q, s.c.k, s.c.v, begin, s.kv_len, np.maximum(s.table, 0)], [0, s.scale], on=on)
    out = s.attend(tail=True, on=on)
    if on == GPU:  # divides the rows among its blocks in another way
        assert np.abs(value(out) - value(dense)).max() < max(2e-5, 8 * ROUNDOFF[dtype])
    else:
        assert np.array_equal(out, dense)  # the same rows in the same chunks


@WITH_D
def test_selection_and_attention_do_not_depend_on_threads(on: str, d: int) -> None:
    s, t = Step("bf16", d=d, on=on), Step("bf16", d=d, on=on)
    s.select(0.7, MOMENT, on=on)
    t.select(0.7, MOMENT, on=on, threads=4)
    for name in ("ranges", "n_range", "mass", "true_mass", "tail", "counters"):
        assert np.array_equal(bits(getattr(s, name)), bits(getattr(t, name))), name
    assert np.array_equal(s.attend(tail=True, on=on), t.attend(tail=True, on=on, threads=4))


@EVERYWHERE
@pytest.mark.parametrize("dtype", ops.DTYPES)
@pytest.mark.parametrize("d", [40, 64, 128])
def test_choices_in_the_places_that_state_names(on: str, dtype: str, d: int) -> None:
    """What is chosen for an entry, and attended to, is what it would be without; entries with -1 are left alone."""
    plain, s = Step(dtype, d=d, on=on), Step(dtype, d=d, on=on)
    plain.select(0.7, MOMENT, on=on)
    want = plain.attend(tail=True, on=on)
    n = len(LENGTHS)
    state, made = np.roll(np.arange(n, dtype=np.int32), 1), np.zeros(n + 1, np.int32)
    state[0], state[1] = n, -1
    for name in ("ranges", "n_range", "tail"):
        old = getattr(s, name)
        setattr(s, name, np.concatenate([old, old[:1]]))
    s.select(0.7, MOMENT, on=on, places=(state, made))
    out = s.attend(tail=True, on=on, state=state)
    for e, place in enumerate(state):
        if place < 0:
            assert np.isnan(value(out[e])).all() and np.isnan(s.mass[e]).all()
            continue
        assert made[place] == s.kv_len[e] and np.array_equal(s.n_range[place], plain.n_range[e])
        assert np.array_equal(bits(s.tail[place]), bits(plain.tail[e]))
        for h in range(2):
            m = s.n_range[place, h]
            assert np.array_equal(s.ranges[place, h, :m], plain.ranges[e, h, :m])
        # a GPU divides the rows anew among its blocks
        assert np.abs(value(out[e]) - value(want[e])).max() <= (max(2e-5, 8 * ROUNDOFF[dtype]) if on == GPU else 0)
    for place in {*range(n + 1)} - set(state.tolist()):
        assert made[place] == 0 and (s.n_range[place] == -9).all() and np.isnan(s.tail[place]).all()
    names = (*COUNTERS, *("bin",) * BINS, "n_full", "n_choice", "n_compared", "n_overlap")
    for h in range(2):
        got = dict(zip(names, s.counters[h].tolist(), strict=True))
        assert got["n_step"] == got["n_choice"] == n - 1 and got["n_full"] == 0


# ---------------------------------------------------------------- hostile calls


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.cluster([[0, 1, 9]]), "page 9 .* 9 pages"),
        (lambda c: c.cluster([[0, 1, -1]]), "page -1"),
        (lambda c: c.cluster([[0, 1], [1, 2]]), "page 1 is listed twice"),
        (lambda c: c.cluster([[0, 1]], iterations=0), "iterations is 0"),
        (lambda c: c.cluster(np.zeros((1, 0))), "a segment has 0 pages"),
        (lambda c: c.cluster(np.zeros((1, 1025))), "too large"),
    ],
)
def test_cluster_refuses(change: Any, says: str) -> None:
    with pytest.raises(InvalidArgumentError, match=says):
        change(Cache(9, 2, 16, 4, "bf16"))


@pytest.mark.parametrize(
    ("name", "at", "to", "says"),
    [
        ("table", (0, 3), 99, "page 99 .number 3 of entry 0"),
        ("kv_len", 1, 0, "kv_len 0"),
        ("kv_len", 1, 2**31 - 1, "entry 1 has kv_len"),
        ("closed", (0, 1), 9, "closed pages 1 to 9"),
        ("closed", (0, 0), -1, "closed pages -1"),
    ],
)
def test_select_refuses(name: str, at: Any, to: int, says: str) -> None:
    s = Step("bf16")
    getattr(s, name)[at] = to
    with pytest.raises(InvalidArgumentError, match=says):
        s.select(0.9, MOMENT)


def test_select_refuses_a_broken_index_and_bad_numbers() -> None:
    s = Step("bf16")
    with pytest.raises(InvalidArgumentError, match="p is 0"):
        s.select(0, MOMENT)
    with pytest.raises(InvalidArgumentError, match="budget is 0"):
        s.select(0.5, MOMENT, budget=0)
    with pytest.raises(InvalidArgumentError, match="estimator is 7"):
        s.select(0.5, 7)
    s.c.range[s.table[0, 2], 1, 1, 1] += 1
    with pytest.raises(InvalidArgumentError, match=r"holds rows|end at row"):
        s.select(0.9, MOMENT)


@pytest.mark.parametrize(("at", "to"), [((0, 0, 0, 0), -1), ((0, 0, 0, 1), 0), ((0, 0, 0, 1), 2**31 - 1), ((0, 0, 1, 0), 0)])
def test_sparse_attention_refuses_ranges_outside_the_sequence(at: Any, to: int) -> None:
    s = Step("bf16")
    s.select(0.3, MOMENT)
    s.ranges[at] = to
    with pytest.raises(InvalidArgumentError, match="holds rows"):
        s.attend(tail=False)


def test_uncluster_refuses_a_row_outside_the_segment() -> None:
    c = Cache(4, 2, 16, 4, "bf16")
    c.cluster([[0, 1]])
    c.order[1, 1, 63] = 128
    with pytest.raises(InvalidArgumentError, match="names row 128, the segment has 128"):
        run("uncluster", [c.k, c.v, ops.tensor(c.order, dtype=U16), np.array([0, 1], np.int32), np.array([0], np.int32)])
