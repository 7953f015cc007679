"""The operations of sparse attention against numpy in float64: clustering, selection, attention over ranges, and taking a segment apart."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import ops
import pytest
from ops import EVERY_ISA, Array, bits, nans, run, store, value

from pyruntime.errors import InvalidArgumentError

PAGE = 64
FIT, MOMENT = 0, 1
U16 = 4  # prt_dtype


class Cache:
    """Pages with random clustered keys, and an index of NaN and out-of-range numbers."""

    def __init__(self, n_page: int, h_kv: int, d: int, n_slot: int, dtype: str, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.n_page, self.h_kv, self.d, self.n_slot = n_page, h_kv, d, n_slot
        centers = rng.standard_normal((12, d)) * 1.5
        keys = centers[rng.integers(0, 12, (n_page, h_kv, PAGE))] + rng.standard_normal((n_page, h_kv, PAGE, d)) * 0.7
        self.k, self.v = store(keys, dtype), store(rng.standard_normal(keys.shape), dtype)
        self.centroid, self.variance, self.mean_value = (nans((n_page, h_kv, n_slot, d), "bf16") for _ in range(3))
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


@EVERY_ISA
@pytest.mark.parametrize("dtype", ops.DTYPES)
@pytest.mark.parametrize(("d", "n_slot", "iterations"), [(64, 4, 10), (40, 2, 3), (128, 8, 1), (10, 1, 5)])
def test_cluster(on: str, dtype: str, d: int, n_slot: int, iterations: int) -> None:
    """The clusters are Lloyd's in float64, rows have changed places accordingly and nothing else, and what is kept about them is right."""
    c = Cache(9, 2, d, n_slot, dtype)
    before = [x.copy() for x in (c.k, c.v)]
    segments = [[7, 2, 5], [0, 8, 1]]
    c.cluster(segments, iterations=iterations, seed=5, on=on)
    for pages in segments:
        for h in range(2):
            keys, values = (value(c.rows(x, pages, h)) for x in before)
            of = lloyd(keys, 3 * n_slot, iterations, 5 + 0x632BE59BD9B4E019 * h & (1 << 64) - 1)
            order = c.rows(c.order, pages, h).astype(np.int64)
            assert order.tolist() == np.lexsort((np.arange(len(of)), of)).tolist()
            for old, new in zip(before, (c.k, c.v), strict=True):
                assert (bits(c.rows(old, pages, h))[order] == bits(c.rows(new, pages, h))).all()
            ranges = c.ranges(pages, h)
            assert ranges[:, 1].tolist() == np.bincount(of, minlength=3 * n_slot).tolist()
            assert ranges[:, 0].tolist() == (np.cumsum(ranges[:, 1]) - ranges[:, 1]).tolist()
            for j, (first, n) in enumerate(ranges):
                members = order[first : first + n]
                mean = keys[members].mean(0) if n else np.zeros(d)
                wanted = (mean, ((keys[members] - mean) ** 2).mean(0) if n else mean, values[members].mean(0) if n else mean)
                # bf16 of a sum of n terms in float32, and of n squares of differences from a mean so computed
                for got, want in zip((c.centroid, c.variance, c.mean_value), wanted, strict=True):
                    error = np.abs(value(c.slots(got, pages, h)[j]) - want)
                    assert (error <= 2.0**-8 * np.abs(want) + 1e-5).all()
    for p in (3, 4, 6):  # in no segment
        assert (bits(c.k[p]) == bits(before[0][p])).all() and (c.order[p] == 0xFFFF).all() and (c.range[p] == -(2**31)).all()


@EVERY_ISA
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


@pytest.mark.parametrize("keep", [3, 2])
def test_uncluster(keep: int) -> None:
    for dtype in ops.DTYPES:
        c = Cache(8, 2, 24, 4, dtype)
        before = [x.copy() for x in (c.k, c.v)]
        c.cluster([[5, 1, 3]])
        dst = [5, 1, 3] if keep == 3 else [0, 7]
        operands = [c.k, c.v, ops.tensor(c.order, dtype=U16), np.array([5, 1, 3], np.int32), np.array(dst, np.int32)]
        clustered = [x.copy() for x in (c.k, c.v)]
        run("uncluster", operands)
        for now, first, middle in zip((c.k, c.v), before, clustered, strict=True):
            for to, of in zip(dst, [5, 1, 3], strict=False):
                assert (bits(now[to]) == bits(first[of])).all()
            for p in set(range(8)) - set(dst):
                assert (bits(now[p]) == bits(middle[p])).all()


# ---------------------------------------------------------------- selection and attention

LENGTHS = ((8 * PAGE + 37, 1, 7), (3 * PAGE, 0, 0), (6 * PAGE + 1, 0, 6), (5, 0, 0))  # kv_len, first and end of the closed pages


class Step:
    """Entries with closed segments of three pages, or fewer at the end; the rest of the cache is NaN."""

    def __init__(self, dtype: str, h_q: int = 6, h_kv: int = 2, d: int = 24, n_slot: int = 4) -> None:
        n_page = sum(-(-n // PAGE) for n, _, _ in LENGTHS)
        self.c = c = Cache(n_page + 2, h_kv, d, n_slot, dtype)
        rng = np.random.default_rng(1)
        self.q = (rng.standard_normal((len(LENGTHS), h_q * d)) * 1.5).astype(np.float32)
        self.h_q, self.scale = h_q, 1 / math.sqrt(d)
        free = rng.permutation(n_page + 2).tolist()
        self.max_pages = 10
        self.table = np.full((len(LENGTHS), self.max_pages), -7, np.int32)
        self.kv_len = np.array([n for n, _, _ in LENGTHS], np.int32)
        self.closed = np.array([x for _, *x in LENGTHS], np.int32)
        for e, (n, first, end) in enumerate(LENGTHS):
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
        self.ranges = np.full((len(LENGTHS), h_kv, self.max_range, 2), -9, np.int32)
        self.n_range = np.full((len(LENGTHS), h_kv), -9, np.int32)
        self.tail = np.full((len(LENGTHS), h_q, d + 2), np.nan, np.float32)
        self.mass, self.true_mass = (np.full((len(LENGTHS), h_q), np.nan, np.float32) for _ in range(2))

    def select(self, p: float, estimator: int, *, on: str | None = None, threads: int = 1) -> None:
        c = self.c
        operands = [self.ranges, self.n_range, self.tail, self.mass, self.true_mass, self.q, c.k, self.table, self.kv_len, self.closed]
        run("select", [*operands, c.centroid, c.variance, c.mean_value, c.range], [self.scale, p, estimator], on=on, threads=threads)

    def attend(self, *, tail: bool, on: str | None = None, threads: int = 1) -> Array:
        out = np.full_like(self.q, np.nan)
        operands = [out, self.q, self.c.k, self.c.v, self.table, self.ranges, self.n_range, self.tail if tail else None]
        run("sparse_attention", operands, [self.scale], on=on, threads=threads)
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
        spans = self.ranges[e, kv_head, : self.n_range[e, kv_head]]
        assert (spans[:, 1] > 0).all() and (spans[1:, 0] > spans[:-1].sum(-1)).all(), "ranges are neither sorted nor joined"
        return np.concatenate([np.arange(first, first + n) for first, n in spans])


def wanted_choice(s: Step, e: int, head: int, p: float, estimator: int) -> tuple[set[int], float, np.ndarray]:
    """(chosen clusters, estimated share, log mass of each cluster without its variance) of one query head, in float64"""
    c, kv_head = s.c, head // (s.h_q // s.c.h_kv)
    q = value(s.q)[e].reshape(s.h_q, -1)[head]
    y = np.exp(s.rows(c.k, e, kv_head) @ q * s.scale)
    clusters = s.clusters(e, kv_head)
    n = np.array([x[1] for x in clusters])
    mean = np.array([value(c.centroid[page, kv_head, slot]) @ q for _, _, page, slot in clusters]) * s.scale
    spread = np.array([value(c.variance[page, kv_head, slot]) @ q**2 for _, _, page, slot in clusters]) * s.scale**2 / 2
    with np.errstate(divide="ignore"):
        plain = np.log(n) + mean if clusters else np.zeros(0)
        log_mass = plain + spread if clusters else plain
    exact = np.array([y[first : first + m].sum() for first, m, _, _ in clusters])
    begin, end = s.closed[e] * PAGE
    taken = y[:begin].sum() + y[end:].sum()
    chosen: set[int] = set()
    if estimator == MOMENT:
        mass = np.exp(log_mass)
        rest = mass.sum()
        for j in np.argsort(np.where(n > 0, -mean - spread, np.inf), kind="stable"):
            if n[j] == 0 or (p < 1 and taken >= p * (taken + rest)):
                break
            rest, taken = rest - mass[j], taken + exact[j]
            chosen.add(int(j))
        return chosen, taken / (taken + rest), plain
    order = [j for j in np.argsort(-mean, kind="stable") if n[j]]
    starts, rows = np.cumsum([0, *n[order]]), n.sum()
    if not order:
        return chosen, 1.0, plain
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
        if p < 1 and taken >= p * total:
            break
        taken += part
        chosen.add(int(j))
    return chosen, taken / total, plain


@EVERY_ISA
@pytest.mark.parametrize("dtype", ops.DTYPES)
@pytest.mark.parametrize("estimator", [FIT, MOMENT])
@pytest.mark.parametrize("p", [0.3, 0.9, 1.0])
def test_select(on: str, dtype: str, estimator: int, p: float) -> None:
    s = Step(dtype)
    s.select(p, estimator, on=on)
    for e, (kv_len, first, end) in enumerate(LENGTHS):
        for kv_head in range(2):
            choices = [wanted_choice(s, e, h, p, estimator) for h in range(kv_head * 3, kv_head * 3 + 3)]
            union = set().union(*(chosen for chosen, _, _ in choices))
            clusters, open_rows = s.clusters(e, kv_head), {*range(first * PAGE), *range(end * PAGE, kv_len)}
            want = open_rows.union(*(range(clusters[j][0], sum(clusters[j][:2])) for j in union))
            rows = s.chosen_rows(e, kv_head)
            assert set(rows.tolist()) == want
            if p == 1:
                assert len(rows) == kv_len
            for g, (_, mass, plain) in enumerate(choices):
                h = kv_head * 3 + g
                # scores are sums of d products in float32 below 2^5: off by 2^-24 x 24 x 2^5 at most; so are their exponentials
                assert abs(s.mass[e, h] - mass) < 1e-4
                y = np.exp(s.rows(s.c.k, e, kv_head) @ value(s.q)[e].reshape(6, -1)[h] * s.scale)
                assert abs(s.true_mass[e, h] - y[rows].sum() / y.sum()) < 1e-4
                left = [j for j in range(len(clusters)) if j not in union and clusters[j][1]]
                got = value(s.tail[e, h])
                if not left:
                    assert got[-1] == 0
                    continue
                weight = np.exp(plain[left])
                means = np.array([value(s.c.mean_value[clusters[j][2], kv_head, clusters[j][3]]) for j in left])
                assert abs(got[-1] * np.exp(got[-2]) / weight.sum() - 1) < 1e-4
                assert (np.abs(got[:-2] / got[-1] - weight @ means / weight.sum()) < 1e-4).all()


@EVERY_ISA
@pytest.mark.parametrize("dtype", ops.DTYPES)
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("group", [1, 3])
def test_sparse_attention(on: str, dtype: str, tail: bool, group: int) -> None:
    """Against the formula in float64. On AMX queries and softmax weights are rounded to bf16, as in dense attention."""
    s = Step(dtype, h_q=2 * group, d=64)
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
                sums, shift, total = np.split(value(s.tail[e, h]), [64, 65])
                weight = np.exp(shift) if total > 0 else 0
                top, bottom = top + weight * sums, bottom + weight * total
            assert np.abs(out[e].reshape(2 * group, -1)[h] - top / bottom).max() < (2.0**-8 * 4 if amx else 2e-5)


@EVERY_ISA
@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_everything_selected_is_dense_attention(on: str, dtype: str) -> None:
    s = Step(dtype, d=64)
    s.select(1.0, MOMENT, on=on)
    dense = np.empty_like(s.q)
    begin = np.arange(len(LENGTHS) + 1, dtype=np.int32)
    run("attention_decode", [dense, s.q, s.c.k, s.c.v, begin, s.kv_len, np.maximum(s.table, 0)], [0, s.scale], on=on)
    assert np.array_equal(s.attend(tail=True, on=on), dense)  # the same rows in the same chunks


@EVERY_ISA
def test_selection_and_attention_do_not_depend_on_threads(on: str) -> None:
    s, t = Step("bf16"), Step("bf16")
    s.select(0.7, MOMENT, on=on)
    t.select(0.7, MOMENT, on=on, threads=4)
    for name in ("ranges", "n_range", "mass", "true_mass", "tail"):
        assert np.array_equal(bits(getattr(s, name)), bits(getattr(t, name))), name
    assert np.array_equal(s.attend(tail=True, on=on), t.attend(tail=True, on=on, threads=4))


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
