"""The example programs: built against the installed header and library, as a user would, and run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pyruntime import _lib

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PACKAGE = _lib.library_path().parent


def run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(list(command), cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def tokens_of(output: str) -> str:
    """Checks what an example prints; returns its tokens."""
    assert "both forks agree: yes" in output
    assert re.search(r"a deliberate error: PRT_INVALID_ARGUMENT: batch: token 1000000 .* vocabulary of 300", output)
    assert "pages: 3 of 8 in use, 1 copied on write" in output
    [line] = re.findall(r"^tokens: (.*)$", output, re.MULTILINE)
    tokens = line.split()
    assert len(tokens) == 24
    assert len(set(tokens)) > 3, "a model that repeats one token would hide mistakes"
    return line


def test_installed_header_is_the_source_one() -> None:
    assert (PACKAGE / "include" / "pyruntime.h").read_text() == (EXAMPLES.parent / "core" / "pyruntime.h").read_text()


def test_embed_c_and_embed_cffi(tmp_path: Path) -> None:
    """Both write the same text: they make the same model."""
    pytest.importorskip("cffi")
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    flags = ["-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror", f"-I{PACKAGE / 'include'}"]
    library = _lib.library_path()
    run(compiler, *flags, EXAMPLES / "embed.c", "-o", tmp_path / "embed", library, f"-Wl,-rpath,{PACKAGE}")
    from_c = tokens_of(run(tmp_path / "embed").stdout)
    from_python = tokens_of(run(sys.executable, EXAMPLES / "embed_cffi.py", cwd=tmp_path).stdout)
    assert from_c == from_python


def test_cmake_builds_embed_against_the_package(tmp_path: Path) -> None:
    cmake = shutil.which("cmake") or pytest.skip("cmake is not installed")
    run(cmake, "-S", EXAMPLES, "-B", tmp_path, f"-DPYRUNTIME_DIR={PACKAGE}", "-DCMAKE_BUILD_TYPE=Release")
    run(cmake, "--build", tmp_path)
    tokens_of(run(tmp_path / "embed").stdout)
