"""The exceptions of this package. Every message is one sentence or two: what, where, which value, what was expected.

This table is the catalogue: which status codes of the library become which exception (`_lib` reads it), what the server answers for one
(`server.errors`), what `pyruntime` exits with (`cli`), and what to do about it (the page "Troubleshooting" is made from it).
"""

from __future__ import annotations

from typing import ClassVar


class PyruntimeError(Exception):
    """Base of every error that pyruntime raises on purpose.

    remedy: what to do about errors of this class, in Markdown.
    statuses: status codes of the C interface that become this exception.
    http: status and error code with which the server answers.
    exit_code: of the command.
    """

    remedy: ClassVar[str] = "Read the message: it names the thing and the value."
    statuses: ClassVar[tuple[str, ...]] = ()
    http: ClassVar[tuple[int, str]] = (503, "unavailable")
    exit_code: ClassVar[int] = 1


class InvalidArgumentError(PyruntimeError, ValueError):
    """An argument has the wrong type, range or combination; the message names it and its value."""

    statuses = ("PRT_INVALID_ARGUMENT", "PRT_BAD_STATE")
    http = (400, "invalid_value")
    exit_code = 2
    remedy = "Change the argument that the message names. Nothing was begun, so the call can be repeated."


class ContextLengthError(PyruntimeError, ValueError):
    """The prompt, or the prompt plus the tokens asked for, does not fit the model's context."""

    http = (400, "context_length_exceeded")
    remedy = (
        "Shorten the prompt, or open the model with a larger `max_context`, up to the model's own (`pyruntime info MODEL`). In a chat, "
        "`/undo` and `/clear` make room."
    )


class ModelFileError(PyruntimeError):
    """A model file is damaged, incomplete or says something untrue; the message starts with its path."""

    statuses = ("PRT_IO_ERROR",)
    remedy = (
        "Compare the file's size with its source, and fetch it again; a download that broke off is the commonest cause. A file that is "
        "whole and refused is not what its format says: it is never repaired by guessing."
    )


class UnsupportedModelError(PyruntimeError):
    """The model, or the way of running it that was asked for, needs something that this version or build does not have: an architecture,
    a rope type, a config key, a tokenizer, a combination of options, an extra package."""

    statuses = ("PRT_UNSUPPORTED",)
    http = (400, "unsupported")
    remedy = (
        "If the message names a package, install it. Else take another model, or another file of it: the families and formats that are "
        'read are in the guide, under "Models and files".'
    )


class ModelNotFoundError(PyruntimeError):
    """No model of that name, no network, or a gated repository without a token."""

    remedy = (
        "`pyruntime list` shows the names. Without a network, `pyruntime pull` the model where there is one, or give the path of a folder "
        "or file. For a gated repository, accept its licence on the hub and set `HF_TOKEN`."
    )


class OutOfMemoryError(PyruntimeError, MemoryError):
    """Host or device memory is too small; the message says how much was needed and how much is free."""

    statuses = ("PRT_OUT_OF_MEMORY",)
    remedy = (
        "Give a `max_context` that fits (the message says which would), a smaller model, or another device. On a GPU, other programs' "
        "memory counts: see `nvidia-smi`."
    )


class OutOfPagesError(PyruntimeError):
    """The KV page pool is exhausted; the message says how many pages were needed and how many are free."""

    statuses = ("PRT_OUT_OF_PAGES",)
    http = (503, "out_of_pages")
    remedy = (
        "`Model` gives up kept prefixes and pauses the youngest calls before it raises this, so one call alone is too large: lower `n` or "
        "`max_tokens`. In C, free sequences or create the session with a larger `n_page`. Nothing has changed: the step can be repeated."
    )


class QueueFullError(PyruntimeError):
    """Too many calls are waiting for the model already; the message says how many. Nothing was begun: try again later."""

    http = (429, "queue_full")
    remedy = "Wait and try again (the server says when, in `Retry-After`), allow more with `max_queue`, or run more replicas."


class DeviceError(PyruntimeError):
    """The device asked for is missing, too old, or failed."""

    statuses = ("PRT_DEVICE_ERROR",)
    remedy = (
        "`pyruntime info` lists the devices, whether this build can use them, and why not. A build without CUDA says so there; "
        '`device="cpu"` always works.'
    )


class AbortedError(PyruntimeError):
    """The call was stopped by its abort callback; the KV cache is as it was before the call."""

    statuses = ("PRT_ABORTED",)
    remedy = "Nothing: somebody asked for it. A cancelled `generate` does not raise, its `finish_reason` is `abort`."


class InternalError(PyruntimeError):
    """A defect of pyruntime itself, or of its installation."""

    statuses = ("PRT_INTERNAL",)
    remedy = "Reinstall if the message asks for it. Else report it, with the message and what `pyruntime info` prints."
