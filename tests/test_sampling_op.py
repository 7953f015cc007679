"""Sampling: the operation on given uniforms, and prt_sampler with its penalties, bias and random numbers.

How a uniform number picks a token is not part of the contract; how much of [0, 1) each token owns is. So the operation is run over a
grid of uniforms and the counts are compared with the probabilities: a token that owns an interval of length p gets p n points, +- 1.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import ops
import pytest
from numpy.typing import NDArray
from ops import run

from pyruntime import _abi, _lib
from pyruntime.errors import InvalidArgumentError

Logits = NDArray[np.float32]
Probabilities = NDArray[np.float64]
GRID = 512


def distribution(logits: Logits, temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[Probabilities, bool]:
    """Probabilities after temperature, top-k, min-p, top-p, in this order; and whether a threshold is so close that rounding decides."""
    x = logits.astype(np.float64)
    order = np.lexsort((np.arange(len(x)), -x))  # best first, equal ones by id
    scaled = (x[order] - x[order[0]]) / float(np.float32(temperature))
    p = np.exp(scaled)
    close = False
    if 0 < top_k < len(p):
        order, p = order[:top_k], p[:top_k]
    if min_p > 0:
        limit = float(np.float32(min_p))
        close |= bool((np.abs(p[1:] - limit) < 1e-5 * limit).any())
        keep = p >= limit
        keep[0] = True
        order, p = order[keep], p[keep]
    if top_p < 1:
        limit = float(np.float32(top_p)) * p.sum()
        reached = np.cumsum(p)
        close |= bool((np.abs(reached - limit) < 1e-5 * limit).any())
        n = int(np.searchsorted(reached, limit)) + 1
        order, p = order[:n], p[:n]
    result = np.zeros(len(x))
    result[order] = p / p.sum()
    return result, close


Params = tuple[float, int, float, float]  # temperature, top_k, top_p, min_p


def sample(logits: Logits, uniforms: NDArray[np.float32], params: Params, on: str | None = None) -> NDArray[np.int32]:
    rows = np.ascontiguousarray(np.broadcast_to(logits, (len(uniforms), len(logits))))
    tokens = np.full(len(uniforms), -9, np.int32)
    run("sample", [rows, tokens, uniforms], params, on=on, threads=2)
    assert (ops.bits(rows) == ops.bits(np.broadcast_to(logits, rows.shape).copy())).all(), "the logits were changed"
    return tokens


def check_distribution(logits: Logits, params: Params, on: str | None = None, n: int = GRID) -> None:
    want, close = distribution(logits, *params)
    assert not close, "this case would test rounding, choose another"
    tokens = sample(logits, ((np.arange(n) + 0.5) / n).astype(np.float32), params, on)
    counts = np.bincount(tokens, minlength=len(logits))
    # Each end of an interval is off by the rounding of the weights and of a uniform number: 2^-20 covers 16 roundings of 2^-24.
    wrong = np.abs(counts - want * n) > 1 + n * 2.0**-20
    assert not wrong.any(), f"{wrong.sum()} tokens; token {wrong.argmax()}: {counts[wrong.argmax()]} of {n}, p = {want[wrong.argmax()]}"
    assert not counts[want == 0].any(), "a token that was cut off was drawn"


def logits_of(kind: str) -> Logits:
    rng = np.random.default_rng(7)
    if kind == "random":
        x = rng.standard_normal(37) * 3
    elif kind == "50k":
        x = rng.standard_normal(50_257) * 3
    elif kind == "ties":
        x = np.repeat([1.0, 3.0, 2.0, 3.0, 0.5], 7)
    elif kind == "forbidden":
        x = np.where(np.arange(50) % 3, -np.inf, rng.standard_normal(50))
    elif kind == "huge":
        x = np.array([3.4e38, -3.4e38, 1e30, 0.0, 3.4e38])
    elif kind == "offset":  # a common offset changes nothing
        x = rng.integers(-8, 8, 40) / 4 + 4096.0
    elif kind == "equal":
        x = np.full(64, -2.5)
    elif kind == "one-hot":
        x = np.where(np.arange(300) == 123, 50.0, -50.0)
    elif kind == "one token":
        x = np.array([-4.0])
    elif kind == "steep":
        x = -np.arange(700) * 0.01
    else:
        raise AssertionError(kind)
    return x.astype(np.float32)


KINDS = ["random", "50k", "ties", "forbidden", "huge", "offset", "equal", "one-hot", "one token", "steep"]
PARAMS: list[Params] = [
    (1.0, 0, 1.0, 0.0), (0.3, 0, 1.0, 0.0), (2.5, 0, 1.0, 0.0), (1.0, 1, 1.0, 0.0), (1.0, 5, 1.0, 0.0), (0.7, 40, 1.0, 0.0),
    (1.0, 10**6, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (1.3, 0, 0.41, 0.0), (1.0, 0, 1e-6, 0.0), (1.0, 0, 0.999, 0.0), (1.0, 0, 1.0, 0.043),
    (2.0, 0, 1.0, 0.9), (1.0, 0, 1.0, 1.0), (0.8, 30, 0.87, 0.02), (1.7, 9, 0.63, 0.11), (1.1, 0, 0.33, 0.015), (100.0, 0, 0.77, 0.0),
]  # fmt: skip


# Pairs where a threshold falls on a token are left out: rounding would decide.
DECIDABLE = [(kind, params) for kind in KINDS for params in PARAMS if not distribution(logits_of(kind), *params)[1]]


CPU_AND_GPU = pytest.mark.parametrize("on", [None, *ops.ON_GPU.args[1]])


@CPU_AND_GPU
@pytest.mark.parametrize(("kind", "params"), DECIDABLE, ids=str)
def test_distribution(kind: str, params: Params, on: str | None) -> None:
    check_distribution(logits_of(kind), params, on, n=128 if kind == "50k" else GRID)


@ops.EVERY_ISA
@pytest.mark.parametrize("params", [(1.0, 0, 1.0, 0.0), (0.9, 7, 0.83, 0.01), (1.0, 0, 0.72, 0.0)], ids=str)
def test_distribution_on_every_isa(on: str, params: Params) -> None:
    check_distribution(logits_of("random"), params, on)
    check_distribution(logits_of("steep"), params, on)


@CPU_AND_GPU
def test_top_p_is_a_share_of_what_min_p_left(on: str | None) -> None:
    """Many tokens below min_p together weigh more than those above it: they must not count for top_p."""
    x = np.concatenate([np.full(300, 0.0) - np.arange(300) * 0.01, np.full(49_700, -4.7)]).astype(np.float32)
    for top_p in (0.03, 0.1, 0.5):
        check_distribution(x, (1.0, 0, top_p, 0.02), on, n=64)


@CPU_AND_GPU
def test_ties_at_the_edge_of_top_k_keep_the_lowest_ids(on: str | None) -> None:
    x = np.array([1, 5, 2, 5, 5, 5, 0], np.float32)
    tokens = sample(x, ((np.arange(64) + 0.5) / 64).astype(np.float32), (1.0, 2, 1.0, 0.0), on)
    assert set(tokens.tolist()) == {1, 3}


@ops.EVERYWHERE
def test_greedy_takes_the_lowest_id_of_ties(on: str) -> None:
    rng = np.random.default_rng(3)
    for n in (1, 2, 15, 16, 17, 63, 1000, 50_257):
        x = rng.standard_normal((4, n)).astype(np.float32)
        x[1] = 2.5
        x[2, n // 3 :: max(1, n // 5)] = 9
        x[3] = -np.inf
        tokens = np.empty(4, np.int32)
        run("sample", [x, tokens, np.full(4, 0.9, np.float32)], [0, 3, 0.5, 0.5], on=on)
        assert tokens.tolist() == [x[0].argmax(), 0, x[2].argmax(), 0]


@CPU_AND_GPU
def test_uniform_0_and_the_largest_give_tokens_that_are_possible(on: str | None) -> None:
    uniforms = np.array([0, 1 - 2**-24], np.float32)
    for kind in KINDS:
        for params in PARAMS:
            possible = distribution(logits_of(kind), *params)[0] > 0
            assert possible[sample(logits_of(kind), uniforms, params, on)].all(), (kind, params)


@CPU_AND_GPU
def test_odd_logits_give_a_token(on: str | None) -> None:
    for x in ([np.nan] * 5, [np.nan, 1, 2, np.nan], [np.inf, 1, np.inf], [-np.inf] * 3, [np.nan, -np.inf]):
        row = np.array(x, np.float32)
        for params in PARAMS:
            tokens = sample(row, np.array([0.0, 0.5, 0.99], np.float32), params, on)
            assert ((tokens >= 0) & (tokens < len(x))).all()
    assert sample(np.array([1, np.inf, np.inf], np.float32), np.array([0.99], np.float32), (1.0, 0, 1.0, 0.0), on).tolist() == [1]


@CPU_AND_GPU
def test_operands_are_checked(on: str | None) -> None:
    x, tokens, uniforms = np.zeros((3, 7), np.float32), np.zeros(3, np.int32), np.zeros(3, np.float32)
    for operands, says in (
        ([x, tokens, uniforms[:2].copy()], "uniforms"), ([x, tokens[:2].copy(), uniforms], "tokens"),
        ([x, uniforms, uniforms], "tokens .*f32"), ([x[0], tokens, uniforms], "logits|uniforms"), ([None, tokens, uniforms], "operand 0"),
    ):  # fmt: skip
        with pytest.raises(InvalidArgumentError, match=says):
            run("sample", operands, [1, 0, 1, 0], on=on)


@CPU_AND_GPU
@pytest.mark.parametrize(
    ("params", "says"),
    [
        ((math.nan, 0, 1, 0), "temperature is nan"), ((-1, 0, 1, 0), "temperature is -1"), ((1, 0, math.nan, 0), "top_p is nan"),
        ((1, 0, 0, 0), "top_p is 0"), ((1, 0, 1.5, 0), "top_p is 1.5"), ((1, 0, 1, math.nan), "min_p is nan"), ((1, 0, 1, 2), "min_p is 2"),
    ],
)  # fmt: skip
def test_parameters_are_checked(params: Params, says: str, on: str | None) -> None:
    tokens = np.full(2, -9, np.int32)
    with pytest.raises(InvalidArgumentError, match=says):
        run("sample", [np.zeros((2, 50), np.float32), tokens, np.zeros(2, np.float32)], params, on=on)
    assert tokens.tolist() == [-9, -9]


Full = tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int32], NDArray[np.float32]]  # tokens, logprobs, top_ids, top_logprobs


def sample_full(
    rows: Logits, uniforms: NDArray[np.float32], params: list[float], n_top: int, seen: Any, bias: dict[int, float], on: str | None
) -> Full:
    """Every operand of the operation; params: temperature, top_k, top_p, min_p, repetition, presence and frequency penalty."""
    n, before = len(rows), rows.copy()
    out = (np.full(n, -9, np.int32), np.zeros(n, np.float32), np.zeros((n, n_top), np.int32), np.zeros((n, n_top), np.float32))
    lists = [np.array(seen, np.int32), np.array([*bias], np.int32), np.array([*bias.values()], np.float32)] if len(seen) else [None] * 3
    run("sample", [rows, out[0], uniforms, *out[1:], *lists], params, on=on, threads=2)
    assert (ops.bits(rows) == ops.bits(before)).all(), "the logits were changed"
    return out


PARAMS_OF_ALL = [
    [0.0, 0, 1.0, 0.0, 1.2, 0.3, 0.1], [0.8, 0, 1.0, 0.0, 1.0, 0.0, 0.0], [0.8, 0, 0.9, 0.0, 1.1, 0.0, 0.0],
    [1.0, 40, 0.95, 0.0, 1.0, 0.5, 0.0], [1.5, 0, 1.0, 0.05, 1.3, 0.2, 0.2], [0.7, 3000, 0.999, 0.0, 1.0, 0.0, 0.0],
]  # fmt: skip


@ops.ON_GPU
@pytest.mark.parametrize("n_vocab", [7, 1000, 49_152, 128_256])
@pytest.mark.parametrize("params", PARAMS_OF_ALL, ids=str)
def test_a_gpu_samples_what_the_cpu_samples(n_vocab: int, params: list[float], on: str) -> None:
    """All that a row can ask for. A uniform number that falls next to the end of a token's interval, as rounded, may give its neighbour."""
    rng = np.random.default_rng(n_vocab)
    rows = (rng.standard_normal((24, n_vocab)) * 2.5).astype(np.float32)
    uniforms = (rng.integers(0, 1 << 24, 24) * 2.0**-24).astype(np.float32)
    best = np.argsort(-rows, axis=-1)[:, : min(5, n_vocab // 2)].reshape(-1)
    ids = list(dict.fromkeys(best.tolist()))[: n_vocab // 2]
    seen = [(i, k % 3) for k, i in enumerate(ids)]
    bias = {i: (-math.inf if k % 7 == 6 else float(k % 5) - 2.0) for k, i in enumerate(ids[::2])}
    for lists in ((seen, bias), ([], {})):
        cpu, gpu = (sample_full(rows, uniforms, params, min(6, n_vocab), *lists, where) for where in (None, on))
        same = cpu[0] == gpu[0]
        for r in np.nonzero(~same)[0]:
            near = np.clip(uniforms[r] + np.arange(-64, 65) * 2.0**-24, 0, 1 - 2.0**-24).astype(np.float32)
            around = sample_full(np.repeat(rows[r : r + 1], len(near), 0), near, params, 1, *lists, None)[0]
            assert gpu[0][r] in around, f"row {r}: {gpu[0][r]}, the CPU has {cpu[0][r]}"
        assert np.abs(cpu[1] - gpu[1])[same].max(initial=0) < 2e-5
        assert (cpu[2] == gpu[2]).all()
        assert np.abs(cpu[3] - gpu[3]).max() < 2e-5


def test_lists_of_the_operation_are_checked() -> None:
    x, u = np.zeros((1, 7), np.float32), np.zeros(1, np.float32)
    for seen, bias in (([(7, 0)], {1: 1.0}), ([(1, 0)], {-1: 1.0})):
        with pytest.raises(InvalidArgumentError, match=r"outside the vocabulary of 7"):
            sample_full(x, u, PARAMS_OF_ALL[0], 2, seen, bias, None)


# ---------------------------------------------------------------- prt_sampler


class Sampler:
    """prt_sampler through ctypes."""

    def __init__(self, n_vocab: int, bias: dict[int, float] | None = None, **params: Any) -> None:
        self.n_vocab = n_vocab
        self.handle = ctypes.c_void_p()
        sampling = _abi.prt_sampling(**params)
        self.bias_arrays = self._bias(bias or {})
        if bias:
            sampling.n_bias, (sampling.bias_ids, sampling.bias_values) = len(bias), self.bias_arrays
        _lib.check(_lib.lib().prt_sampler_create(n_vocab, ctypes.byref(sampling), ctypes.byref(self.handle)))

    @staticmethod
    def _bias(bias: dict[int, float]) -> tuple[Any, Any]:
        return (ctypes.c_int32 * len(bias))(*bias), (ctypes.c_float * len(bias))(*bias.values())

    def set_bias(self, bias: dict[int, float]) -> None:
        _lib.check(_lib.lib().prt_sampler_set_bias(self.handle, *self._bias(bias), len(bias)))

    def accept(self, tokens: list[int], *, prompt: bool) -> None:
        _lib.check(_lib.lib().prt_sampler_accept(self.handle, (ctypes.c_int32 * len(tokens))(*tokens), len(tokens), int(prompt)))

    def sample(self, logits: Logits) -> tuple[int, float]:
        token, logprob = ctypes.c_int32(-9), ctypes.c_float()
        row = logits.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        _lib.check(_lib.lib().prt_sampler_sample(self.handle, row, len(logits), ctypes.byref(token), ctypes.byref(logprob)))
        return token.value, logprob.value

    def release(self) -> None:
        _lib.lib().prt_sampler_release(self.handle)
        self.handle = ctypes.c_void_p()


@contextmanager
def sampler(n_vocab: int, bias: dict[int, float] | None = None, **params: Any) -> Iterator[Sampler]:
    s = Sampler(n_vocab, bias, **params)
    try:
        yield s
    finally:
        s.release()


def penalised(
    x: Logits, prompt: list[int], generated: list[int], bias: dict[int, float], rep: float, freq: float, pres: float
) -> NDArray[np.float64]:
    """Logit bias, then the repetition penalty on all tokens seen, then frequency and presence on the generated ones."""
    y = x.astype(np.float64)
    for token, b in bias.items():
        y[token] += b
    seen = sorted({*prompt, *generated})
    y[seen] = np.where(y[seen] > 0, y[seen] / rep, y[seen] * rep)
    counts = np.bincount(generated, minlength=len(x)).astype(np.float64)
    return y - counts * freq - (counts > 0) * pres


PENALTIES = [(1.3, 0.0, 0.0), (0.8, 0.0, 0.0), (1.0, 0.4, 0.0), (1.0, 0.0, 0.7), (1.2, 0.3, 0.5), (1.0, -0.2, -0.3)]


@pytest.mark.parametrize(("rep", "freq", "pres"), PENALTIES)
@pytest.mark.parametrize("bias", [{}, {3: 2.5, 11: -1.5, 0: -math.inf}], ids=["no bias", "bias"])
def test_penalties_steer_greedy_sampling(rep: float, freq: float, pres: float, bias: dict[int, float]) -> None:
    n_vocab, prompt = 23, [1, 2, 2, 7, 19]
    generated: list[int] = []
    rng = np.random.default_rng(11)
    with sampler(n_vocab, bias, temperature=0.0, repetition_penalty=rep, frequency_penalty=freq, presence_penalty=pres) as s:
        s.accept(prompt, prompt=True)
        for step in range(60):
            x = (rng.standard_normal(n_vocab) * 1.5).astype(np.float32)
            y = penalised(x, prompt, generated, bias, rep, freq, pres)
            best = np.sort(y)[::-1]
            token, logprob = s.sample(x)
            if best[0] - best[1] > 1e-5:  # else rounding decides
                assert token == y.argmax(), step
            unmodified = float(x[token]) - math.log(np.exp(x.astype(np.float64)).sum())
            assert logprob == pytest.approx(unmodified, abs=1e-5)
            generated.append(token)
            if step == 30:  # text that was generated elsewhere counts as generated, a longer prompt as prompt
                s.accept([5, 5], prompt=False)
                generated += [5, 5]
                s.accept([6], prompt=True)
                prompt = [*prompt, 6]


def test_bias_forbids_and_forces() -> None:
    x = np.zeros(10, np.float32)
    with sampler(10, {i: -math.inf for i in range(10) if i not in (4, 8)}, seed=1) as s:
        assert {s.sample(x)[0] for _ in range(100)} == {4, 8}
        s.set_bias({2: 100.0})
        assert {s.sample(x)[0] for _ in range(20)} == {2}
        s.set_bias({})
        assert len({s.sample(x)[0] for _ in range(200)}) == 10
        s.set_bias({2: 100.0})
        with pytest.raises(InvalidArgumentError, match=r"token 10 .*vocabulary of 10"):
            s.set_bias({10: 1.0})
        assert {s.sample(x)[0] for _ in range(20)} == {2}, "a refused bias leaves the old one"
    assert (x == 0).all()


def test_same_seed_same_tokens() -> None:
    rows = (np.random.default_rng(5).standard_normal((50, 100)) * 2).astype(np.float32)

    def draw(seed: int, **params: Any) -> list[int]:
        with sampler(100, seed=seed, **params) as s:
            return [s.sample(row)[0] for row in rows]

    assert draw(42) == draw(42) != draw(43)
    assert draw(2**64 - 1) == draw(2**64 - 1) != draw(2**32 - 1)  # all 64 bits count
    assert draw(1) != draw(1 + 2**32)
    # Equal parameters draw equal numbers whether or not the penalties, which need memory, are on.
    assert draw(42, presence_penalty=1e-30) == draw(42)


@pytest.mark.parametrize("params", [{}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.05, "temperature": 1.4}], ids=str)
def test_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    """Pearson's statistic over 4 fixed seeds x 5000 draws stays below its mean + 5 standard deviations (df + 5 sqrt(2 df))."""
    x = (np.random.default_rng(9).standard_normal(12) * 1.5).astype(np.float32)
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **params}
    p, _ = distribution(x, **full)
    for seed in (0, 1, 2, 12345678901234567890):
        with sampler(12, seed=seed, **params) as s:
            counts = np.bincount([s.sample(x)[0] for _ in range(5000)], minlength=12)
        assert not counts[p == 0].any()
        expected = p[p > 0] * 5000
        statistic = ((counts[p > 0] - expected) ** 2 / expected).sum()
        df = len(expected) - 1
        assert statistic < df + 5 * math.sqrt(2 * df), (seed, statistic, df)


NAN, INF = math.nan, math.inf
BAD = {
    "temperature": [-0.1, NAN, INF, 101.0], "top_k": [-1], "top_p": [0.0, -0.5, 1.01, NAN], "min_p": [-0.01, 1.5, NAN],
    "repetition_penalty": [0.0, -1.0, INF, NAN], "presence_penalty": [NAN, INF, 1e6], "frequency_penalty": [NAN, -INF],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_invalid_parameters_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{name} is"):
        Sampler(10, **{name: value})


def test_invalid_calls_are_refused() -> None:
    for n_vocab in (0, -1, 2**31 - 1):
        with pytest.raises(InvalidArgumentError, match="n_vocab"):
            Sampler(n_vocab)
    for bias, says in (({10: 1.0}, "token 10"), ({-1: 1.0}, "token -1"), ({3: NAN}, "token 3 is"), ({3: INF}, "token 3 is")):
        with pytest.raises(InvalidArgumentError, match=says):
            Sampler(10, bias)
    ids, values = (ctypes.c_int32 * 2)(4, 4), (ctypes.c_float * 2)(1, 2)
    with pytest.raises(InvalidArgumentError, match="token 4 is given twice"):
        Sampler(10, n_bias=2, bias_ids=ids, bias_values=values)
    with pytest.raises(InvalidArgumentError, match="-1 entries"):
        Sampler(10, n_bias=-1)
    with pytest.raises(InvalidArgumentError, match="NULL"):
        Sampler(10, n_bias=2)
    with sampler(10, presence_penalty=1.0) as s:
        for tokens, says in (([10], "token 10 at 0"), ([3, -1], "token -1 at 1")):
            with pytest.raises(InvalidArgumentError, match=says):
                s.accept(tokens, prompt=True)
        with pytest.raises(InvalidArgumentError, match=r"n_vocab is 9.* 10"):
            s.sample(np.zeros(9, np.float32))
        assert s.sample(np.zeros(10, np.float32))[0] in range(10)
