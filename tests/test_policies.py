"""The contract of every attention policy, on a small golden model: dense where it says so, the same bits from the same tokens, forks,
truncation, counters, and options that are refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from decoding import FULL, GPU, H_KV, Open, assert_same_within_rounding, decode, filled, prompt, step
from goldens.weights import write_hf_folder
from tiny import GOLDENS, golden_weights

from pyruntime import _abi
from pyruntime.attention import POLICIES, Attention
from pyruntime.errors import InvalidArgumentError, UnsupportedModelError
from pyruntime.session import Entry, Session

SMALL = {"min_context": 300, "sinks": 4, "window": 16}
# Of each policy: what makes it choose little, and what makes it choose everything.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tactic": ({"segment": 256, "p": 0.5}, {"segment": 256, "p": 1}),
    "tactic_recycled": ({"segment": 256, "p": 0.5}, {"segment": 256, "p": 1}),
    "recycled": ({"stride": 7, "k": 64}, {"k": 4096}),
    "streaming": ({"window": 60}, {"window": 4096}),
    "quest": ({"k": 64, "dense_layers": 0}, {"k": 4096, "dense_layers": 0}),
    "token_select": ({"k": 64}, {"k": 4096}),
    "oracle": ({"p": 0.5}, {"p": 1}),
}
MORE = {  # other ways to choose little
    "recycled by similarity": ("recycled", {"check": 5, "k": 64, "group": "max", "pool": 7}),
    "recycled budget": ("recycled", {"budget": 0.1, "stride": 5}),
    "oracle k": ("oracle", {"k": 64}),
    "quest budget": ("quest", {"budget": 0.1, "dense_layers": 1}),
}


def little(case: str) -> Attention:
    name, options = MORE[case] if case in MORE else (case, CASES[case][0])
    return Attention(name, {**SMALL, **options})


def everything(name: str) -> Attention:
    return Attention(name, {**SMALL, **CASES[name][1]})


def on_gpu(request: pytest.FixtureRequest) -> bool:
    return bool(request.node.callspec.params["weights"][0] == GPU)


@pytest.fixture(params=[*CASES, *MORE])
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=CASES)
def policy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_places_for_kept_choices_grow(open_session: Open) -> None:
    """More sequences than there were places for, while a step's recording knows the old ones."""
    few, many = open_session(little("recycled"), n_page=256), open_session(little("recycled"), n_page=256)
    ids, tail = prompt(400), prompt(12, 1)
    want = decode(few, filled(few, ids), tail)
    seqs = [filled(many, ids) for _ in range(3)]
    first = decode(many, seqs[0], tail[:6])
    seqs += [filled(many, prompt(400, i)) for i in range(9)]
    assert np.array_equal(np.concatenate([first, decode(many, seqs[0], tail[6:])]), want)
    assert np.array_equal(decode(many, seqs[1], tail), want)


def test_every_policy_is_here() -> None:
    assert set(CASES) == {*POLICIES} - {"full"}


def test_bit_equal_below_min_context_and_within_rounding_with_everything(open_session: Open, policy: str) -> None:
    dense, sparse = open_session(), open_session(everything(policy))
    ids, tail = prompt(290), prompt(60, 1)
    a, b = filled(dense, ids), filled(sparse, ids)
    want, got = decode(dense, a, tail), decode(sparse, b, tail)
    assert np.array_equal(got[:9], want[:9])  # rows 291 to 299
    assert_same_within_rounding(got, want)
    stats = sparse.attention_stats()
    assert stats["n_step"] == 51 * 2 * H_KV and stats["n_selected"] + stats["n_exact"] == stats["n_context"]


def test_recycled_with_stride_1_is_dense(open_session: Open, request: pytest.FixtureRequest) -> None:
    dense, sparse = open_session(), open_session(little("recycled").with_options(stride=1))
    ids, tail = prompt(400), prompt(10, 1)
    got, want = decode(sparse, filled(sparse, ids), tail), decode(dense, filled(dense, ids), tail)
    assert_same_within_rounding(got, want)
    assert on_gpu(request) or np.array_equal(got, want)
    stats = sparse.attention_stats()
    assert stats["n_full"] == stats["n_step"] == 10 * 2 * H_KV and stats["n_choice"] == 11 * 2 * H_KV  # the prompt's, too


def test_little_is_chosen_and_counted(open_session: Open, case: str) -> None:
    dense, sparse = open_session(), open_session(little(case).with_options(measure=True))
    ids, tail = prompt(600), prompt(20, 1)
    want, got = decode(dense, filled(dense, ids), tail), decode(sparse, filled(sparse, ids), tail)
    assert not np.array_equal(got, want)
    all_of_it = sparse.attention_stats()
    parts = [sparse.attention_stats(layer=i, kv_head=h) for i in range(2) for h in range(H_KV)]
    for name, total in all_of_it.items():
        assert np.allclose(total, np.sum([p[name] for p in parts], axis=0)), name
    n_layer = 1 if case == "quest budget" else 2
    assert all_of_it["n_step"] == 20 * n_layer * H_KV and all_of_it["n_context"] == n_layer * H_KV * sum(range(601, 621))
    read = all_of_it["n_selected"] + all_of_it["n_exact"]
    assert all_of_it["n_exact"] <= read < all_of_it["n_context"] and (all_of_it["n_selected"] > 0) == (case != "streaming")
    partial = all_of_it["n_step"] - all_of_it["n_full"]
    assert all_of_it["n_true"] == partial * 2 == sum(all_of_it["histogram"])  # two query heads to a kv head
    share = all_of_it["true_mass"] / all_of_it["n_true"]
    assert 0.05 < share < 1
    if case.startswith(
        ("tactic", "quest", "token", "oracle")
    ):  # these look at the query: better than rows by lot, if not by much on random keys
        assert share > 1.05 * read / all_of_it["n_context"]
    if case == "oracle":
        assert all_of_it["true_mass"] / all_of_it["n_true"] > 0.5
    if case == "recycled":  # of 20 tokens the 7th and 14th after the prompt are full
        assert all_of_it["n_full"] == 2 * 2 * H_KV and 0 < all_of_it["n_overlap"] < all_of_it["n_compared"] <= 2 * 2 * H_KV * 64
    if case == "recycled by similarity":
        assert 0 <= all_of_it["n_full"] <= 4 * 2 * H_KV
    if case == "oracle k":
        assert all_of_it["n_selected"] == 64 * all_of_it["n_step"] and all_of_it["n_exact"] == 20 * all_of_it["n_step"]


def test_the_same_steps_give_the_same_bits(open_session: Open, case: str) -> None:
    """Also over other pages, and in the same batch."""
    ids, tail = prompt(777), prompt(30, 1)
    results = []
    for used in (0, 0, 300):
        session = open_session(little(case))
        seqs = [filled(session, prompt(used + 1)), *(filled(session, ids[i:]) for i in range(3))]
        session.free_sequence(seqs.pop(0))
        one = decode(session, seqs[0], tail)
        many = [session.step([Entry(s, [t]) for s in seqs], logits="last").logits for t in tail]
        results.append(np.concatenate([one, *(np.asarray(x) for x in many)]))
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])


def test_the_same_tokens_give_the_same_bits(open_session: Open, case: str, request: pytest.FixtureRequest) -> None:
    """Whatever the chunks (one of them ends with a single row), the threads, the pages, and what else is in the batch. On a GPU other
    kernels run for other numbers of rows."""
    if on_gpu(request):
        pytest.skip("not promised on a GPU")
    ids, tail = prompt(751), prompt(30, 1)
    first = open_session(little(case))
    want = decode(first, filled(first, ids), tail)
    for options in ({"threads": 1}, {"max_batch_tokens": 50}):
        session = open_session(little(case), **options)
        assert np.array_equal(decode(session, filled(session, ids), tail), want)
    session = open_session(little(case))
    others = [filled(session, prompt(n, n)) for n in (40, 600, 320)]
    seq = session.create_sequence()
    for begin in range(0, 751, 107):
        session.step([Entry(seq, ids[begin : begin + 107])])
    for i, token in enumerate(tail):
        fresh = session.create_sequence()
        entries = [Entry(others[0], [1]), Entry(fresh, prompt(9, i)), Entry(others[1], [2]), Entry(seq, [token]), Entry(others[2], [3, 4])]
        logits = session.step(entries, logits="last").logits
        assert logits is not None and np.array_equal(logits[3], want[i])


def test_a_fork_goes_on_like_its_original(open_session: Open, case: str, request: pytest.FixtureRequest) -> None:
    if on_gpu(request):
        pytest.skip("rows of one batch are other kernels than a row alone")
    session = open_session(little(case))
    seq = filled(session, prompt(500))
    decode(session, seq, prompt(10, 1))
    fork = session.fork(seq)
    tail = prompt(20, 2)
    want = decode(session, seq, tail)
    session.free_sequence(seq)
    assert np.array_equal(decode(session, fork, tail), want)


def test_truncation(open_session: Open, policy: str) -> None:
    """What is left of a sequence is as if it had never been longer."""
    dense, session = open_session(), open_session(everything(policy))
    ids, more = prompt(800), prompt(100, 1)
    seq, other = filled(session, ids), filled(dense, ids)
    for keep in (805, 700, 640, 455, 300, 64, 10):
        for s, q in ((session, seq), (dense, other)):
            decode(s, q, more[:10])
            s.truncate(q, keep)
        assert_same_within_rounding(step(session, seq, more), step(dense, other, more))
        assert_same_within_rounding(decode(session, seq, more[:3]), decode(dense, other, more[:3]))


def test_truncated_and_read_again(open_session: Open, case: str, request: pytest.FixtureRequest) -> None:
    """Prefix reuse: the first 512 rows stay, the rest is another text. Like a sequence that had always been this text."""
    session = open_session(little(case))
    seq = filled(session, prompt(700))
    decode(session, seq, prompt(5, 1))
    session.truncate(seq, 512)
    step(session, seq, prompt(90, 2))
    got = decode(session, seq, prompt(12, 3))
    fresh = open_session(little(case))
    want = decode(fresh, filled(fresh, np.append(prompt(700)[:512], prompt(90, 2))), prompt(12, 3))
    if case.startswith("tactic") or on_gpu(request):  # its segments end elsewhere; other kernels run for other numbers of rows
        assert np.abs(got - want).mean() < 0.5 * np.abs(want).mean()
    else:
        assert np.array_equal(got, want)


def test_a_prompt_that_was_stopped_leaves_nothing(open_session: Open) -> None:
    session = open_session(little("recycled"), max_batch_tokens=64)
    seq = filled(session, prompt(500))
    decode(session, seq, prompt(3, 1))
    want = decode(session, session.fork(seq), prompt(5, 2))
    session.on_progress = lambda done, total: session.abort() if done > 64 else None
    try:
        session.step([Entry(seq, prompt(600, 3))])
    except Exception as error:
        assert type(error).__name__ == "AbortedError"
    else:
        pytest.skip("the step was too fast to be stopped")
    session.on_progress = None
    assert session.length(seq) == 503
    got = decode(session, seq, prompt(5, 2))
    assert np.abs(got - want).mean() < 0.5 * np.abs(want).mean()


def test_policies_change_between_steps(open_session: Open) -> None:
    dense, session = open_session(), open_session()
    ids = prompt(700)
    seq, other = filled(session, ids), filled(dense, ids)
    tactic = everything("tactic")
    order = [tactic, FULL, tactic.with_options(cluster=32, seed=3), tactic.with_options(segment=512, sinks=100), FULL]
    for name in CASES:
        order += [everything(name), FULL, tactic]
    for i, policy in enumerate(order):
        session.set_attention(policy)
        assert_same_within_rounding(step(session, seq, [i]), step(dense, other, [i]))
    session.truncate(seq, 300)
    dense.truncate(other, 300)
    assert_same_within_rounding(step(session, seq, ids), step(dense, other, ids))


def test_rows_in_the_order_of_the_text_after_tactic(open_session: Open) -> None:
    """Tactic stores a segment cluster after cluster; whoever comes after it finds the rows where they were."""
    first, second = open_session(little("tactic")), open_session(little("streaming"))
    ids = prompt(700)
    a, b = filled(first, ids), filled(second, ids)
    step(first, first.fork(a), [1])
    first.set_attention(little("streaming"))
    assert np.array_equal(step(first, a, [5]), step(second, b, [5]))


# ---------------------------------------------------------------- StreamingLLM with eviction


def evicting(**options: Any) -> Attention:
    return Attention("streaming", {"sinks": 4, "window": 128, "min_context": 190, "evict": True, **options})


def test_eviction_goes_on_past_max_context_in_constant_memory(open_session: Open) -> None:
    session = open_session(evicting(), max_context=512, n_page=8)
    seq = filled(session, prompt(150))
    decode(session, seq, prompt(1500, 1))
    assert session.stats()["n_page_peak"] <= 6 and 128 + 64 <= session.length(seq) < 6 * 64
    assert session.attention_stats()["n_step"] == (1500 - 39) * 2 * H_KV


def test_evicting_is_reading_the_rest_at_its_new_place(open_session: Open) -> None:
    """The same rows are attended to, the window's at the same distances; only the sinks are nearer, by what is gone. Rope's theta is 1e6
    here, so that their scores hardly move."""
    ids, tail = prompt(64 * 7 + 1), prompt(20, 1)
    kept, evicted = open_session(evicting(evict=False)), open_session(evicting())
    a, b = filled(kept, ids), filled(evicted, ids)
    want, got = decode(kept, a, tail), decode(evicted, b, tail)
    assert evicted.length(b) == 64 * (1 + 2) + 1 + 20 < kept.length(a)  # the sinks' page, the window's two, and what was begun
    assert np.abs(got - want).mean() < 0.2 * np.abs(want).mean()
    # A fork of the sequence is not touched by its original's eviction.
    other = open_session(evicting())
    c = filled(other, ids)
    fork = other.fork(c)
    assert np.array_equal(decode(other, c, tail), got)
    assert other.length(fork) == len(ids) and np.array_equal(decode(other, fork, tail), got)


def test_eviction_wants_room(open_session: Open) -> None:
    session = open_session()
    with pytest.raises(InvalidArgumentError, match="lets 8384 rows gather, max_context is 2048"):
        session.set_attention(evicting(window=4096))
    with pytest.raises(InvalidArgumentError, match="leaves 192 rows, min_context is 193"):
        session.set_attention(evicting(min_context=193))


# ---------------------------------------------------------------- words and refusals


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("best", "policy 'best' is unknown, expected one of 'full', 'tactic', 'recycled'"),
        ("recycled:p=0.5", "'recycled' has no option 'p', expected some of .*stride"),
        ("recycled:k=10,budget=0.1", "k is 10 and budget 0.1: both say how many rows"),
        ("recycled:threshold=0.9", "threshold is 0.9 without check"),
        ("recycled:group=last", "option group is 'last', expected 'first' or 'max'"),
        ("recycled:pool=4", "pool is 4, expected an odd number"),
        ("recycled:pool=65", "pool is 65, expected 0..63"),
        ("recycled:stride=-1", "option stride is '-1', expected an integer from 0"),
        ("recycled:window=0", "'recycled': window is 0, expected at least 1"),
        ("streaming:k=3", "'streaming' has no option 'k'"),
        ("quest:k=x", "option k is 'x'"),
        ("token_select:threshold=1.5", "option threshold is '1.5'"),
        ("oracle:budget=0", "option budget is '0', expected a number above 0"),
        ({"policy": "quest", "k": True}, "option k is 'true'"),
        ({"policy": "quest", "k": "3,sinks=4"}, "expected one value"),
    ],
)
def test_bad_values_are_refused_by_name(given: Any, says: str) -> None:
    with pytest.raises(InvalidArgumentError, match=says):
        Attention.parse(given)


def test_defaults_are_the_authors() -> None:
    def fields(text: str, *names: str) -> list[Any]:
        return [getattr(Attention.parse(text).struct, name) for name in names]

    assert fields("streaming", "sinks", "window") == [4, 1020]
    assert fields("token_select", "sinks", "window") == [128, 512]
    assert fields("quest", "dense_layers", "sinks") == [2, 16]
    assert fields("recycled:check=5,stride=9,pool=7,group=max", "check", "stride", "pool", "group") == [5, 9, 7, _abi.PRT_GROUP_MAX]
    for name in POLICIES:
        assert str(Attention.parse(name)) == name


def test_a_field_that_the_policy_does_not_read_is_refused(open_session: Open, request: pytest.FixtureRequest) -> None:
    """Through the C interface, where every field can be set."""
    if request.node.callspec.params["weights"] != ("cpu", "f32"):
        pytest.skip("once is enough")
    session = open_session()
    attention = Attention.parse("streaming")
    attention.struct.k = 5
    with pytest.raises(InvalidArgumentError, match="'streaming' does not read k, which is set"):
        session.set_attention(attention)
    attention.struct.policy = 99
    with pytest.raises(InvalidArgumentError, match="policy is 99"):
        session.set_attention(attention)


@pytest.mark.parametrize("name", CASES)
def test_a_sliding_window_is_refused(tmp_path: Any, name: str) -> None:
    with_window = golden_weights(write_hf_folder(GOLDENS / "mistral_window", tmp_path / "window", "bf16"))
    session = Session(with_window, max_context=512)
    with pytest.raises(UnsupportedModelError, match=f"'{name}' cannot be combined with the model's sliding window"):
        session.set_attention(Attention.parse(name))
    session.close()
