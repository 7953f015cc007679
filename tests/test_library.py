"""The rule of core/ops/cpu_table.h on the objects in the build folder."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Sanitizers and coverage lower the optimisation, so that std's inline functions stay functions.
SWITCHED_ON = re.compile(r"^PYRUNTIME_SANITIZE:BOOL=(ON|TRUE|1)$", re.MULTILINE)


def build_folders() -> list[Path]:
    """Release builds made from this checkout, newest first."""
    caches = [*ROOT.glob("build*/CMakeCache.txt"), *ROOT.glob("build*/*/CMakeCache.txt")]
    caches.sort(key=lambda p: p.stat().st_mtime, reverse=True)
    return [p.parent for p in caches if not SWITCHED_ON.search(p.read_text()) and next(p.parent.rglob("prt_ops_*.dir/**/*.o"), None)]


def test_objects_of_an_instruction_set_define_nothing_that_the_linker_merges() -> None:
    """A weak or unique symbol (an inline function, a template of std) exists once per instruction set, and the linker keeps any one of
    them: a baseline processor would run AVX-512 code."""
    nm = shutil.which("nm")
    if not nm:
        pytest.skip("nm (binutils) is not installed")
    folders = build_folders()
    if not folders:
        pytest.skip(f"no release build in {ROOT}/build*")
    objects = sorted(folders[0].rglob("prt_ops_*.dir/**/*.o"))
    listing = subprocess.run([nm, "-C", "-A", "--defined-only", *objects], capture_output=True, text=True, check=True).stdout
    assert "::linear(" in listing, "these are not the objects that were meant"
    merged = re.findall(r"^.*/(prt_ops_\w+)\.dir/(\S+):[0-9a-f]* [VvWwu] (.*)$", listing, re.MULTILINE)
    assert not merged
