"""pyruntime: a lightweight long-context LLM runtime without torch.

    import pyruntime
    with pyruntime.Model("smollm2-135m") as m:
        print(m.chat([{"role": "user", "content": "What is the capital of France?"}]).text)

Names are imported on first use: `import pyruntime` loads neither numpy nor the library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import (
    AbortedError,
    ContextLengthError,
    DeviceError,
    InternalError,
    InvalidArgumentError,
    ModelFileError,
    ModelNotFoundError,
    OutOfMemoryError,
    OutOfPagesError,
    PyruntimeError,
    QueueFullError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from ._lib import build_info
    from .generate import Completion, Timings, TokenLogprob, Usage
    from .model import Model
    from .paths import get_cmake_dir, get_include, get_library, get_pkgconfig_dir
    from .sampling import SamplingParams
    from .stream import AsyncStream, Stream

__version__ = "0.1.0"

_LAZY = {
    "Model": "model",
    "AsyncStream": "stream",
    "Stream": "stream",
    "Completion": "generate",
    "Timings": "generate",
    "TokenLogprob": "generate",
    "Usage": "generate",
    "SamplingParams": "sampling",
    "build_info": "_lib",
    "get_cmake_dir": "paths",
    "get_include": "paths",
    "get_library": "paths",
    "get_pkgconfig_dir": "paths",
}

__all__ = [
    "AbortedError",
    "AsyncStream",
    "Completion",
    "ContextLengthError",
    "DeviceError",
    "InternalError",
    "InvalidArgumentError",
    "Model",
    "ModelFileError",
    "ModelNotFoundError",
    "OutOfMemoryError",
    "OutOfPagesError",
    "PyruntimeError",
    "QueueFullError",
    "SamplingParams",
    "Stream",
    "Timings",
    "TokenLogprob",
    "UnsupportedModelError",
    "Usage",
    "__version__",
    "build_info",
    "get_cmake_dir",
    "get_include",
    "get_library",
    "get_pkgconfig_dir",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'pyruntime' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
