"""The exceptions of this package. Every message is one sentence or two: what, where, which value, what was expected."""

from __future__ import annotations


class PyruntimeError(Exception):
    """Base of every error that pyruntime raises on purpose."""


class InvalidArgumentError(PyruntimeError, ValueError):
    """An argument has the wrong type, range or combination; the message names it and its value."""


class ContextLengthError(PyruntimeError, ValueError):
    """The prompt, or the prompt plus the tokens asked for, does not fit the model's context."""


class ModelFileError(PyruntimeError):
    """A model file is damaged, incomplete or says something untrue; the message starts with its path."""


class UnsupportedModelError(PyruntimeError):
    """The model uses an architecture, rope type, config key or tokenizer that this version does not implement."""


class ModelNotFoundError(PyruntimeError):
    """No model of that name, no network, or a gated repository without a token."""


class OutOfMemoryError(PyruntimeError, MemoryError):
    """Host or device memory is too small; the message says how much was needed and how much is free."""


class OutOfPagesError(PyruntimeError):
    """The KV page pool is exhausted; the message says how many pages were needed and how many are free."""


class QueueFullError(PyruntimeError):
    """Too many calls are waiting for the model already; the message says how many. Nothing was begun: try again later."""


class DeviceError(PyruntimeError):
    """The device asked for is missing, too old, or failed."""


class AbortedError(PyruntimeError):
    """The call was stopped by its abort callback; the KV cache is as it was before the call."""


class InternalError(PyruntimeError):
    """A defect of pyruntime itself."""
