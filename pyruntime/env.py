"""Every environment variable of the Python side; nothing else in the package reads os.environ.

The core reads none: PYRUNTIME_THREADS, PYRUNTIME_CPU_ISA and PYRUNTIME_LOG are passed to it as parameters. Variables
that start with HF_ belong to huggingface-hub and mean what its manual says.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from .errors import InvalidArgumentError

CPU_ISAS = ("baseline", "avx2", "avx512", "avx512bf16", "amx")
LOG_LEVELS = ("error", "warn", "info", "debug")
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")

_MEANING = {
    "PYRUNTIME_CACHE": "folder for files fetched from a package index (hub models are in the Hugging Face cache)",
    "PYRUNTIME_THREADS": "CPU threads, when the call names none (default: one per physical core)",
    "PYRUNTIME_CPU_ISA": f"highest CPU instruction set to use: {', '.join(CPU_ISAS)} (default: the best there is)",
    "PYRUNTIME_LOG": f"what is written to stderr: {', '.join(LOG_LEVELS)} (default: warn)",
    "PYRUNTIME_OFFLINE": "1: use what is already on disk, never the network (default: 0)",
}


def cache_dir() -> Path:
    """PYRUNTIME_CACHE, or `pyruntime` in the platform's folder for caches. It need not exist."""
    value = os.environ.get("PYRUNTIME_CACHE")
    if value:
        return Path(value).expanduser().absolute()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "pyruntime" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "pyruntime"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyruntime"


def threads() -> int | None:
    """PYRUNTIME_THREADS, or None. Raises InvalidArgumentError for anything but a number from 1 to 1024."""
    value = os.environ.get("PYRUNTIME_THREADS", "").strip()
    if not value:
        return None
    if not value.isascii() or not value.isdigit() or not 1 <= int(value[:9]) <= 1024:
        raise InvalidArgumentError(f"PYRUNTIME_THREADS must be a number from 1 to 1024, is {value!r}")
    return int(value)


def cpu_isa() -> str | None:
    """PYRUNTIME_CPU_ISA, an upper bound, or None for the best that the machine has."""
    return _choice("PYRUNTIME_CPU_ISA", CPU_ISAS)


def log_level() -> str:
    """PYRUNTIME_LOG, "warn" if it is not set."""
    return _choice("PYRUNTIME_LOG", LOG_LEVELS) or "warn"


def offline() -> bool:
    """PYRUNTIME_OFFLINE."""
    value = os.environ.get("PYRUNTIME_OFFLINE", "").strip().lower()
    if value not in _TRUE + _FALSE:
        raise InvalidArgumentError(f"PYRUNTIME_OFFLINE must be 1 or 0, is {value!r}")
    return value in _TRUE


def describe() -> list[tuple[str, str, str]]:
    """(name, value as set or "", meaning) of every variable, for `pyruntime info`."""
    return [(name, os.environ.get(name, ""), meaning) for name, meaning in _MEANING.items()]


def _choice(name: str, choices: tuple[str, ...]) -> str | None:
    value = os.environ.get(name, "").strip().lower()
    if value and value not in choices:
        raise InvalidArgumentError(f"{name} must be one of {', '.join(choices)}, is {value!r}")
    return value or None
