"""The documentation says what is true: every code block of README.md and docs/ runs, figures are those of the committed results, and the
pages made from sources have all that is in them.

A block says its language. Python blocks of a page run one after another in one namespace, sh blocks each in a bash, c and cmake blocks are
built; "text" is no code. `pyruntime serve` starts a server for the rest of the page. What cannot run here begins with the line
"# not run by the tests: REASON": its command lines are parsed all the same.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import pyruntime
from pyruntime import _abi, cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
MARKER = "# not run by the tests: "
PORT = "8000"  # as the pages have it; here it may be taken
sys.path.insert(0, str(ROOT / "docs" / "site"))

import catalogue  # noqa: E402
import header  # noqa: E402


@dataclass(frozen=True)
class Block:
    page: str
    line: int  # of its first line, from 1
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def reason(self) -> str | None:
        """Why it is not run."""
        return self.text.partition("\n")[0].removeprefix(MARKER) if self.text.startswith(MARKER) else None


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for match in re.finditer(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", text, re.MULTILINE):
        body = "".join(line.removeprefix(match[1]) for line in match[3].splitlines(keepends=True))
        found.append(Block(page, text.count("\n", 0, match.start(3)) + 1, match[2].strip(), body))
    return found


WITH_CODE = [page for page in PAGES if any(block.language != "text" for block in blocks(page))]


# ---------------------------------------------------------------- the code blocks


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with what the pages name of the source tree, and the commands of this package."""
    for name in ("README.md", "bench", "examples", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    commands = {
        "python": '"$@"',
        "pyruntime": "-c 'import sys; from pyruntime.cli import main; sys.exit(main())' \"$@\"",
        "prt-bench": "-c 'import sys; from pyruntime.bench import native_main; sys.exit(native_main())' \"$@\"",
    }
    (tmp_path / "bin").mkdir()
    for name, arguments in commands.items():
        script = tmp_path / "bin" / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}\n')
        script.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYRUNTIME_THREADS", "2")
    return tmp_path


def run(block: Block, *command: str | Path) -> None:
    done = subprocess.run(list(command), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{block} ends with {done.returncode}\n{done.stdout}\n{done.stderr}"
    print(done.stdout)


def run_c(block: Block, folder: Path) -> None:
    """A program; a fragment becomes the body of one."""
    text = block.text
    if "int main(" not in text:
        text = f"#include <pyruntime.h>\nint main(void) {{\n{text}\nreturn 0;\n}}\n"
    (folder / "block.c").write_text(text)
    library = Path(pyruntime.get_library())
    include, link = f"-I{pyruntime.get_include()}", [str(library), f"-Wl,-rpath,{library.parent}"]
    run(block, tool("cc"), "-std=c99", "-Wall", "-Wextra", "-Werror", include, folder / "block.c", "-o", folder / "block", *link)
    run(block, folder / "block")


def run_cmake(block: Block, folder: Path) -> None:
    """Lines of a CMakeLists.txt about a target that there is already."""
    lines = ["cmake_minimum_required(VERSION 3.22)", "project(block LANGUAGES C)"]
    lines += [f'add_executable(my_program "{ROOT / "examples" / "embed.c"}")', block.text]
    project = folder / "project"
    project.mkdir()
    (project / "CMakeLists.txt").write_text("\n".join(lines))
    run(block, tool("cmake"), "-S", project, "-B", project / "build", f"-Dpyruntime_DIR={pyruntime.get_cmake_dir()}")
    run(block, tool("cmake"), "--build", project / "build")


def tool(name: str) -> str:
    return shutil.which(name) or pytest.skip(f"{name} is not installed")


@contextmanager
def serving(block: Block, port: str) -> Iterator[None]:
    """The server of a block, until the end of the page."""
    server = subprocess.Popen(shlex.split(block.text), stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(600):
            assert server.poll() is None, f"{block}: {server.stderr and server.stderr.read()}"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.1)
        yield
    finally:
        server.terminate()
        server.communicate(timeout=60)


def test_blocks_say_what_they_are() -> None:
    for block in (block for page in PAGES for block in blocks(page)):
        assert block.language in ("python", "sh", "c", "cmake", "text"), f"{block} is {block.language!r}"
        assert block.reason is None or (len(block.reason) > 10 and block.language == "sh"), f"{block}: expected a reason"


@pytest.mark.model
@pytest.mark.parametrize("page", WITH_CODE)
def test_page(page: str, sandbox: Path) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    servers = []
    try:
        for block in blocks(page):
            block = Block(block.page, block.line, block.language, block.text.replace(PORT, port))
            if block.reason or block.language == "text":
                check_commands(block)
            elif block.language == "python":
                # Numbered as in the page, so that a traceback points into it.
                exec(compile("\n" * (block.line - 1) + block.text, str(ROOT / page), "exec"), names)
            elif block.text.startswith("pyruntime serve "):
                servers.append(serving(block, port))
                servers[-1].__enter__()
            elif block.language == "sh":
                run(block, "bash", "-euo", "pipefail", "-c", block.text)
            else:
                {"c": run_c, "cmake": run_cmake}[block.language](block, sandbox)
    finally:
        for server in servers:
            server.__exit__(None, None, None)


def check_commands(block: Block) -> None:
    """The command lines of a block that is not run: syntax, options, extras, targets of make."""
    if block.language == "sh":
        run(block, "bash", "-n", "-c", block.text)
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True) if block.language == "sh" else line.split()
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        match words:
            case ["pyruntime", *arguments] if block.language == "sh":
                cli.parse(arguments)
            case ["pyruntime" | "prt-bench" as program, command, *_]:
                known = subprocess.run([program, *([command] if program == "pyruntime" else []), "--help"], capture_output=True, text=True)
                for option in re.findall(r"(?<=\s)--?[a-z][a-z-]*", line):
                    assert option in known.stdout, f"{block}: {program} {command} has no option {option}"
            case ["python", "-m", module, *_]:
                assert importlib.util.find_spec(module), f"{block}: there is no module {module}"
            case ["python", program, *_] if program.endswith(".py"):
                known = subprocess.run([sys.executable, program, "--help"], capture_output=True, text=True, check=True)
                for option in re.findall(r"(?<=\s)--[a-z][a-z-]*", line):
                    assert option in known.stdout, f"{block}: {program} has no option {option}"
            case ["make", *targets]:
                makefile = (ROOT / "Makefile").read_text()
                assert all(re.search(rf"^{t}:", makefile, re.MULTILINE) for t in targets if not t.startswith("#") and "=" not in t), line


def test_extras_exist() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    known = re.findall(r"^(\w+) = \[", text.partition("[project.optional-dependencies]")[2].partition("\n[")[0], re.MULTILINE)
    for path in [ROOT / page for page in PAGES] + [ROOT / "docs" / "site" / "symptoms.toml"]:
        for extra in re.findall(r"pyruntime\[([\w,]+)\]", path.read_text()):
            assert set(extra.split(",")) <= set(known), f"{path.name}: the extra {extra!r} is not in pyproject.toml"


def test_links_exist() -> None:
    """Also of pages that `make docs` does not see, and without it."""
    for page in [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"]:
        text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", text):
            made = {ROOT / "docs/reference/c.md", ROOT / "docs/troubleshooting.md"}
            path = (ROOT / page).parent / target
            assert path.exists() or path.resolve() in made, f"{page}: {target} does not exist"


# ---------------------------------------------------------------- pages made from sources


def test_every_status_is_in_the_catalogue() -> None:
    owners = [status for kind in catalogue.classes(pyruntime.errors) for status in kind.statuses]
    assert sorted(owners) == sorted(set(catalogue.status_meanings(ROOT)) - {"PRT_OK"})
    public = {name for name in pyruntime.__all__ if name.endswith("Error")} - {"PyruntimeError"}
    assert {kind.__name__ for kind in catalogue.classes(pyruntime.errors)} == public
    for kind in catalogue.classes(pyruntime.errors):
        assert kind.__doc__ and "remedy" in vars(kind), kind


def test_symptoms_are_messages_of_the_sources() -> None:
    texts = [message.text for message in catalogue.messages(ROOT)]
    assert len(texts) > 400, "the sources are no longer read as they are written"
    for symptom in catalogue.symptoms(ROOT):
        assert any(symptom["says"] in text for text in texts), f"no longer said: {symptom['says']}"
        assert symptom["why"] and symptom["do"], symptom


def test_troubleshooting_is_whole() -> None:
    page = catalogue.page(ROOT)
    for name in [*pyruntime.__all__, *catalogue.status_meanings(ROOT)]:
        assert not name.endswith("Error") or name == "PyruntimeError" or f"### {name}\n" in page
        assert not name.startswith("PRT_") or f"| `{name}` " in page
    for row in re.findall(r"^ *\|.*$", page, re.MULTILINE):
        assert len(re.findall(r"(?<!\\)\|", row)) in (3, 4), f"a cell broke the table: {row}"


def test_a_message_that_was_raised_is_in_the_catalogue() -> None:
    """What tests/test_errors.py and others see at run time is found by the text of the page."""
    patterns = [re.escape(m.text).replace(catalogue.GAP, ".*") for m in catalogue.messages(ROOT)]
    calls = [lambda: pyruntime.SamplingParams(top_p=2), lambda: pyruntime.Model("./nowhere"), lambda: pyruntime.Model("x/y", dtype="f8")]
    for call in calls:
        with pytest.raises(pyruntime.PyruntimeError) as caught:
            call()
        assert any(re.fullmatch(p, str(caught.value), re.DOTALL) for p in patterns), str(caught.value)


def test_the_c_reference_has_every_name() -> None:
    page = header.page(ROOT)
    headings = " ".join(re.findall(r"^### (.*)$", page, re.MULTILINE))
    structures = {name for name in vars(_abi) if name.startswith("prt_") and isinstance(vars(_abi)[name], type)}
    for name in {*_abi.FUNCTIONS, *structures}:
        assert f"`{name}`" in headings, f"{name} has no heading"
    assert page.count("```") % 2 == 0 and "PRT_API" not in page


def test_public_names_are_documented() -> None:
    public = [getattr(pyruntime, name) for name in pyruntime.__all__ if name != "__version__"]
    members = [member for thing in public if inspect.isclass(thing) for name, member in inspect.getmembers(thing) if name[0] != "_"]
    for thing in [*public, *(m for m in members if inspect.isfunction(m) or inspect.ismethod(m) or isinstance(m, property))]:
        assert inspect.getdoc(thing), f"{thing} has no docstring"
    page = (ROOT / "docs" / "reference" / "python.md").read_text()
    for name in pyruntime.__all__:
        assert f"::: pyruntime.{name}\n" in page or name == "__version__" or name.endswith("Error"), f"{name} is not in the reference"


# ---------------------------------------------------------------- figures


def test_figures_are_those_of_the_results() -> None:
    done = subprocess.run([sys.executable, ROOT / "bench" / "figures.py", "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_of_policies_is_that_of_the_results(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "bench" / "policies.py", "page", "--page", tmp_path / "results.md"], check=True)
    assert (ROOT / "docs" / "results.md").read_text() == (tmp_path / "results.md").read_text(), "run python bench/policies.py page"


@pytest.mark.parametrize("page", ["README.md", "docs/long-context.md", *(page for page in PAGES if page.startswith("docs/guide/"))])
def test_speeds_are_quoted_from_the_results_only(page: str) -> None:
    """A figure with a unit of speed, a ± or a percentage with a decimal stands in a passage that bench/figures.py made, or in code."""
    text = re.sub(r"<!-- made by.*?<!-- end -->|^```.*?^```$", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"[\d.]+ (?:tok/s|T?FLOP/s|[GT]B/s|±)|\d+\.\d+ %|\d+(?:\.\d+)?x faster", text)
    assert not found, f"{page}: {found}"
