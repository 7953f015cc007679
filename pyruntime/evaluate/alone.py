"""A model's session for one evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..attention import Attention
from ..engine import pages_for
from ..model import Model
from ..session import Session


@contextmanager
def alone(model: Model, n_token: int) -> Iterator[Session]:
    """The session for the caller alone, with room for so many tokens; meanwhile other calls wait. The policy is then as it was."""
    with model._engine.borrow(pages_for(n_token)) as session:
        try:
            yield session
        finally:
            session.set_attention(Attention.parse(model.attention))
