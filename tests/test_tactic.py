"""Tactic: what it has beside the contract of all policies (test_policies.py), on a small golden model with segments of 256 rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from decoding import FULL, Open, assert_same_within_rounding, decode, filled, prompt, step
from goldens.weights import write_hf_folder
from tiny import GOLDENS, golden_weights

from pyruntime.attention import Attention, parse_list
from pyruntime.errors import InvalidArgumentError, OutOfPagesError, UnsupportedModelError
from pyruntime.session import Entry, Session


def tactic(**options: Any) -> Attention:
    return Attention("tactic", {"segment": 256, "window": 16, "min_context": 300, **options})


@pytest.mark.parametrize("estimator", ["fit", "moment"])
@pytest.mark.parametrize("segment", [256, 512, 0])
def test_long_decode_stays_near_dense(open_session: Open, estimator: str, segment: int) -> None:
    """Decoding through several segment ends; random weights attend to everything a little, so p is high."""
    dense, sparse = open_session(), open_session(tactic(p=0.98, estimator=estimator, segment=segment, measure=True))
    ids, tail = prompt(420), prompt(600, 1)
    want, got = decode(dense, filled(dense, ids), tail), decode(sparse, filled(sparse, ids), tail)
    assert np.abs(got - want).mean() < 0.05 * np.abs(want).mean() + 0.02
    stats = sparse.attention_stats()
    assert 0 < stats["n_selected"] < stats["n_context"] - stats["n_exact"]
    assert stats["n_true"] == stats["n_mass"] == sum(stats["histogram"]) > 0
    assert stats["true_mass"] / stats["n_true"] > 0.9


def test_a_head_takes_no_more_than_its_budget(open_session: Open) -> None:
    """Random weights attend to everything a little: a head would take most of the rows. All rows are all rows, whatever the budget."""
    ids, tail = prompt(1100), prompt(6, 1)
    share = {}
    for name, options in {"few": {"budget": 0.05}, "default": {}, "any": {"budget": 1}, "all": {"p": 1.0, "budget": 0.05}}.items():
        session = open_session(tactic(**{"p": 0.9, **options}))
        decode(session, filled(session, ids), tail)
        stats = session.attention_stats()
        rows = stats["n_context"] - stats["n_exact"]
        share[name] = stats["n_selected"] / rows
        group = stats["n_mass"] / stats["n_step"]
        if name == "few":  # the last cluster goes over
            assert stats["n_selected"] <= group * (0.05 * rows + 64 * stats["n_step"])
    assert 0 < share["few"] < share["default"] < share["any"] < share["all"] == 1


def test_forks_share_segments_and_truncation_takes_them_apart(open_session: Open) -> None:
    dense, session = open_session(), open_session(tactic(p=1.0))
    ids, more = prompt(800), prompt(300, 1)
    seq = filled(session, ids)
    step(session, seq, [5])
    pages = session.stats()["n_page_free"]
    clustered = session.stats()["n_clustered_token"]
    fork = session.fork(seq)
    other = filled(dense, np.append(ids, np.int32(5)))
    want = decode(dense, dense.fork(other), more[:4])
    assert_same_within_rounding(decode(session, fork, more[:4]), want)
    assert session.stats()["n_clustered_token"] == clustered  # the fork uses what is there
    session.truncate(fork, 450)  # in the middle of a segment that the first one still holds
    assert session.length(fork) == 450
    assert pages - session.stats()["n_page_free"] == 3  # rows 320 to 449: a segment runs from row 64 + 256
    dense.truncate(other, 450)
    assert_same_within_rounding(step(session, fork, more), step(dense, other, more))
    assert_same_within_rounding(decode(session, fork, more[:3]), decode(dense, other, more[:3]))
    session.free_sequence(fork)
    again = filled(dense, np.append(ids, np.int32(5)))
    assert_same_within_rounding(decode(session, seq, more[:4]), decode(dense, again, more[:4]))
    for keep in (700, 321, 320, 319, 65, 64, 10):  # now in place
        session.truncate(seq, keep)
        dense.truncate(again, keep)
        assert_same_within_rounding(step(session, seq, more), step(dense, again, more))
        assert_same_within_rounding(decode(session, seq, more[:2]), decode(dense, again, more[:2]))


def test_a_part_held_by_another_sequence_is_copied_before_clustering(open_session: Open) -> None:
    dense, session = open_session(), open_session(tactic(p=1.0))
    ids, more = prompt(200), prompt(500, 1)
    seq = filled(session, ids)
    short = session.fork(seq)
    session.step([Entry(seq, more)])
    got = decode(session, seq, more[:3])
    assert session.stats()["n_page_copy"] == 3  # the last page of 200 rows when `seq` wrote on, then pages 1 and 2 of the segment
    other = filled(dense, np.append(ids, more))
    assert_same_within_rounding(got, decode(dense, other, more[:3]))
    whole = filled(dense, ids)
    assert np.array_equal(step(session, short, more[:50]), step(dense, whole, more[:50]))


def test_without_free_pages_rows_stay_exact_and_a_cut_is_refused(open_session: Open) -> None:
    session = open_session(tactic(p=1.0), n_page=13)
    seq = filled(session, prompt(200))
    short = session.fork(seq)
    session.step([Entry(seq, prompt(500, 1))])  # 11 pages of its own and one of the fork's
    step(session, seq, [1])
    assert session.stats()["n_clustered_token"] == 0
    session.free_sequence(short)
    step(session, seq, [1])
    assert session.stats()["n_clustered_token"] == 512
    fork = session.fork(seq)
    with pytest.raises(OutOfPagesError, match="cutting a shared sequence needs 4"):
        session.truncate(fork, 64 + 250)
    assert session.length(fork) == 702
    step(session, seq, [2])


def test_policies_change_between_steps(open_session: Open) -> None:
    dense, session = open_session(), open_session()
    ids = prompt(700)
    seq, other = filled(session, ids), filled(dense, ids)
    for i, policy in enumerate((tactic(p=1.0), FULL, tactic(p=1.0, cluster=32, seed=3), tactic(p=1.0, segment=512, sinks=100), FULL)):
        session.set_attention(policy)
        assert_same_within_rounding(step(session, seq, [i]), step(dense, other, [i]))
    session.truncate(seq, 300)
    dense.truncate(other, 300)
    assert_same_within_rounding(step(session, seq, ids), step(dense, other, ids))


def test_tail_and_dense_layers(open_session: Open) -> None:
    dense = open_session()
    ids, more = prompt(900), prompt(20, 1)
    want = decode(dense, filled(dense, ids), more)
    errors = {}
    for name, options in {"tail": {"tail": True}, "none": {"tail": False}, "layer": {"tail": False, "dense_layers": 1}}.items():
        session = open_session(tactic(p=0.3, **options))
        errors[name] = np.abs(decode(session, filled(session, ids), more) - want).mean()
        if name == "layer":
            assert session.attention_stats(layer=0)["n_step"] == 0 < session.attention_stats(layer=1)["n_step"]
    assert errors["tail"] < errors["none"] and errors["layer"] < errors["none"]
    everything = open_session(tactic(p=0.3, dense_layers=2))
    assert_same_within_rounding(decode(everything, filled(everything, ids), more), want)


# ---------------------------------------------------------------- words and refusals


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("best", "policy 'best' is unknown"),
        ("tactic:p", "'p' is not of the form"),
        ("tactic:p=0.5,p=0.6", "p is given twice"),
        ("tactic:p=0", "option p is '0'"),
        ("tactic:p=nan", "option p is 'nan'"),
        ({"policy": "tactic", "p": True}, "option p is 'true'"),
        ("tactic:q=1", "no option 'q'"),
        ("tactic:cluster=x", "option cluster is 'x'"),
        ("tactic:tail=2", "option tail is '2'"),
        ("tactic:estimator=best", "option estimator is 'best'"),
        ("full:p=0.5", "'full' takes no options"),
        ({"p": 0.5}, "its 'policy' is None"),
        (3, "attention is 3"),
        ("tactic:cluster=12", "cluster is 12"),
        ("tactic:segment=100", "segment is 100"),
        ("tactic:iterations=0", "iterations is 0"),
        ("tactic:dense_layers=9", "dense_layers is 9, the model has 2"),
    ],
)
def test_bad_values_are_refused_by_name(open_session: Open, given: Any, says: str) -> None:
    session = open_session(tactic())
    with pytest.raises(InvalidArgumentError, match=says):
        session.set_attention(Attention.parse(given))


def test_a_sliding_window_is_refused(tmp_path: Any) -> None:
    with_window = golden_weights(write_hf_folder(GOLDENS / "mistral_window", tmp_path / "window", "bf16"))
    session = Session(with_window, max_context=512)
    with pytest.raises(UnsupportedModelError, match="'tactic' cannot be combined with the model's sliding window"):
        session.set_attention(tactic())
    session.close()


def test_lists_of_policies() -> None:
    texts = [str(a) for a in parse_list("full,tactic,tactic:p=0.5,tail=0,tactic:estimator=fit")]
    assert texts == ["full", "tactic", "tactic:p=0.5,tail=0", "tactic:estimator=fit"]
