"""Loads libpyruntime and turns its status codes into exceptions."""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from . import _abi, env, errors

_NAME = {"win32": "pyruntime.dll", "darwin": "libpyruntime.dylib"}.get(sys.platform, "libpyruntime.so")

_ERRORS: dict[int, type[errors.PyruntimeError]] = {
    getattr(_abi, status): kind for kind in errors.PyruntimeError.__subclasses__() for status in kind.statuses
}


def library_path() -> Path:
    """The shared library of this package. Only the package's own folders are searched: an editable install has two of them."""
    from . import __path__ as folders

    for folder in folders:
        path = Path(folder) / _NAME
        if path.is_file():
            return path
    raise errors.InternalError(
        f"{_NAME} is not in {', '.join(map(str, folders))}: the package is not built; run `pip install .` in the source folder"
    )


@lru_cache(maxsize=1)
def lib() -> Any:
    """The library with its prototypes set; loaded on first use."""
    path = library_path()
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in _abi.FUNCTIONS.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    if library.prt_abi_version() != _abi.ABI_VERSION:
        raise errors.InternalError(
            f"{path} has ABI version {library.prt_abi_version()}, this package needs {_abi.ABI_VERSION}: reinstall pyruntime"
        )
    level = env.LOG_LEVELS.index(env.log_level()) + 1
    library.prt_set_log(_log, None, level)
    return library


def _print_log(_user: Any, level: int, text: bytes) -> None:
    print(f"pyruntime {env.LOG_LEVELS[level - 1]}: {text.decode('utf-8', 'replace')}", file=sys.stderr)


_log = _abi.prt_log_fn(_print_log)  # kept alive with the module


def check(status: int) -> None:
    """Raises the exception for a prt_status that is not PRT_OK."""
    if status != _abi.PRT_OK:
        text = lib().prt_last_error().decode("utf-8", "replace")
        raise _ERRORS.get(status, errors.InternalError)(text)


def build_info() -> dict[str, str]:
    """What was built: compiler, build type, CUDA version or the reason why there is none."""
    lines = lib().prt_build_info().decode().splitlines()
    return {"version": lib().prt_version().decode(), **dict(line.split("=", 1) for line in lines)}


def devices() -> list[_abi.prt_device_info]:
    """The CPU, then the CUDA devices that a driver shows."""
    count = ctypes.c_int32()
    check(lib().prt_device_count(ctypes.byref(count)))
    found = []
    for i in range(count.value):
        info = _abi.prt_device_info()
        check(lib().prt_device_get(i, ctypes.byref(info)))
        found.append(info)
    return found
