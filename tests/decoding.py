"""Sessions on a small golden model, prompts and decode steps: what the tests of attention policies share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from goldens.weights import write_hf_folder
from tiny import GOLDENS, golden_weights

from pyruntime.attention import Attention
from pyruntime.session import Entry, Session, Weights

N_VOCAB, H_KV = 96, 2
GPU = "cuda:0"
Open = Callable[..., Session]
FULL = Attention.parse("full")


def _on_gpu(dtype: str) -> Any:
    return pytest.param((GPU, dtype), marks=pytest.mark.gpu)


@pytest.fixture(scope="module", params=[("cpu", "bf16"), ("cpu", "f32"), _on_gpu("bf16"), _on_gpu("f16"), _on_gpu("f32")], ids="-".join)
def weights(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    device, dtype = request.param
    return golden_weights(write_hf_folder(GOLDENS / "qwen3", tmp_path_factory.mktemp("decoding") / "qwen3", dtype), device=device)


@pytest.fixture
def open_session(weights: Weights) -> Iterator[Open]:
    opened: list[Session] = []

    def open_one(attention: Attention = FULL, **options: Any) -> Session:
        opened.append(Session(weights, **{"threads": 2, "max_context": 2048, "n_page": 128, **options}))
        opened[-1].set_attention(attention)
        return opened[-1]

    yield open_one
    for session in opened:
        session.close()


def prompt(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, N_VOCAB, n, dtype=np.int32)


def decode(session: Session, seq: int, ids: Any) -> np.ndarray:
    return np.concatenate([step(session, seq, [t]) for t in ids])


def step(session: Session, seq: int, ids: Any) -> np.ndarray:
    logits = session.step([Entry(seq, ids)], logits="last").logits
    assert logits is not None and np.isfinite(logits).all()
    return logits


def filled(session: Session, ids: np.ndarray) -> int:
    seq = session.create_sequence()
    session.step([Entry(seq, ids)])
    return seq


def assert_same_within_rounding(got: np.ndarray, want: np.ndarray) -> None:
    """bf16 KV and AMX, or a GPU: weights of the softmax are rounded to 2^-9 in either order; two layers, logits up to 10."""
    assert np.abs(got - want).max() < 0.05 * max(1.0, np.abs(want).max() / 4)
