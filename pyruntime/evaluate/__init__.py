"""What sparse attention costs and saves, measured against dense attention: on a text (fidelity), and on questions whose answer lies
somewhere in a long context (retrieval)."""

from .fidelity import evaluate
from .metrics import sparsity
from .report import render

__all__ = ["evaluate", "render", "sparsity"]
