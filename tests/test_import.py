"""What is imported when: the package and its help text are there at once, the heavy libraries come with the first model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ["numpy", "tokenizers", "gguf", "jinja2", "huggingface_hub"]
# The shared library counts as loaded once it is mapped into the process.
REPORT = f"""
import json, sys
mapped = open("/proc/self/maps").read() if sys.platform.startswith("linux") else ""
print("REPORT", json.dumps([m for m in {HEAVY!r} if m in sys.modules] + ["libpyruntime"] * ("libpyruntime" in mapped)))
"""


def imported_by(code: str, cwd: Path) -> list[str]:
    """The heavy modules that are loaded after running `code` in a fresh process."""
    done = subprocess.run([sys.executable, "-c", code + REPORT], capture_output=True, text=True, cwd=cwd, timeout=60)
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout.rpartition("REPORT ")[2])
    return found


def command(*arguments: str) -> str:
    """Code that runs the command line and goes on after it."""
    return f"""
from pyruntime.cli import main
try:
    main({list(arguments)!r})
except SystemExit as end:
    assert end.code == 0, end.code
"""


def test_import(tmp_path: Path) -> None:
    assert imported_by("import pyruntime", tmp_path) == []
    assert imported_by("import pyruntime.errors, pyruntime.env, pyruntime.catalog, pyruntime.config, pyruntime.checkpoint", tmp_path) == []


@pytest.mark.parametrize(
    "arguments",
    [("--help",), ("--version",), ("run", "--help"), ("chat", "--help"), ("bench", "--help"), ("list",), ("list", "--json")],
)
def test_help_and_list(arguments: tuple[str, ...], tmp_path: Path) -> None:
    assert imported_by(command(*arguments), tmp_path) == []


def test_info_needs_the_library_alone(tmp_path: Path) -> None:
    assert imported_by(command("info"), tmp_path) in ([], ["libpyruntime"])


def test_what_a_model_needs(tmp_path: Path) -> None:
    """A folder without a network or a chat needs neither the hub's client, nor jinja2, nor gguf."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from tiny import write_tiny_model
from pathlib import Path
folder = write_tiny_model(Path("m"))
import pyruntime
with pyruntime.Model(folder, threads=1) as model:
    model.generate("abc", max_tokens=2)
"""
    assert set(imported_by(code, tmp_path)) - {"libpyruntime"} == {"numpy", "tokenizers"}


def test_public_names(tmp_path: Path) -> None:
    """Every name of __all__ can be imported, and an unknown one is an AttributeError."""
    code = """
import pyruntime
for name in pyruntime.__all__:
    getattr(pyruntime, name)
assert dir(pyruntime) == pyruntime.__all__
try:
    pyruntime.Modle
except AttributeError as error:
    assert "Modle" in str(error)
else:
    raise SystemExit("no AttributeError")
"""
    assert "numpy" in imported_by(code, tmp_path)
