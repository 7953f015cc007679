"""The page "Troubleshooting": the exceptions of pyruntime/errors.py with the status codes of core/pyruntime.h, common messages with their
cause and what to do (symptoms.toml), and every message there is, found in the sources."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

GAP = "…"  # a value in a message
INTRODUCTION = """\
# Troubleshooting

A message names what is wrong, where, the value that was found, and what was expected. Search this page for the part of it that holds no
values. If a program seems to do the wrong thing without an error, `pyruntime info` shows build, devices and environment, and
`PYRUNTIME_LOG=info` writes what the library says to stderr.
"""


@dataclass(frozen=True)
class Message:
    """One sentence that some line of the sources can say, with GAP for its values. error: the exception, or the status code."""

    error: str
    text: str
    file: str


def page(root: Path) -> str:
    """Markdown of the page."""
    errors = load_errors(root)
    meanings = status_meanings(root)
    lines = [INTRODUCTION, "## By message", "", "| message | why | what to do |", "|---|---|---|"]
    lines += [f"| {s['says']} | {s['why']} | {s['do']} |" for s in symptoms(root)]
    lines += [
        "",
        "## By exception",
        "",
        "All are subclasses of `pyruntime.PyruntimeError`. The command prints the message alone; its exit codes are 0 (done),",
    ]
    lines += ["1 (failed), 2 (wrong usage) and 130 (stopped with Ctrl-C).", ""]
    for kind in classes(errors):
        status, code = kind.http
        facts = [f"C: {', '.join(f'`{s}`' for s in kind.statuses)}"] if kind.statuses else []
        facts += [f"server: {status} `{code}`", f"exit code: {kind.exit_code}"]
        bases = [b.__name__ for b in kind.__bases__ if b is not errors.PyruntimeError]
        also = f" Also a `{bases[0]}`." if bases else ""
        text = " ".join(inspect.cleandoc(kind.__doc__).split())
        lines += [f"### {kind.__name__}", "", f"{text}{also} ({'; '.join(facts)})", "", f"**What to do:** {kind.remedy}", ""]
    lines += [
        "## By status code",
        "",
        "Of the C interface; `prt_last_error()` has the sentence.",
        "",
        "| code | meaning | in Python |",
        "|---|---|---|",
    ]
    owners = {status: kind.__name__ for kind in classes(errors) for status in kind.statuses}
    lines += [f"| `{name}` {number} | {text} | {_link(owners.get(name))} |" for name, (number, text) in meanings.items()]
    lines += ["", "## Every message", "", f"{GAP} stands for a value.", ""]
    known = {kind.__name__: [] for kind in classes(errors)} | {"ApiError": []}
    for message in sorted(set(messages(root)), key=lambda m: m.text.lower()):
        known[owners.get(message.error, message.error)].append(message)
    for name, found in known.items():
        title = "refused by the server alone" if name == "ApiError" else name
        lines += [f'??? note "{title} ({len(found)})"', "", "    | message | said by |", "    |---|---|"]
        lines += [f"    | {_cell(m.text)} | `{m.file}` |" for m in found] + [""]
    return "\n".join(lines) + "\n"


def load_errors(root: Path) -> ModuleType:
    """pyruntime/errors.py of the source tree, which needs nothing else of the package."""
    spec = importlib.util.spec_from_file_location("_catalogue_errors", root / "pyruntime" / "errors.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def classes(errors: ModuleType) -> list[Any]:
    """The exceptions in the order in which they are written."""
    return list(errors.PyruntimeError.__subclasses__())


def status_meanings(root: Path) -> dict[str, tuple[int, str]]:
    """Status codes of the header: number, and the comment behind it."""
    header = (root / "core" / "pyruntime.h").read_text(encoding="utf-8")
    body = re.search(r"typedef enum prt_status \{(.*?)\}", header, re.DOTALL)
    assert body
    found = re.findall(r"(PRT_\w+) = (\d+),?(?: */\* (.*?) \*/)?", body[1])
    return {name: (int(number), text or "success") for name, number, text in found}


def symptoms(root: Path) -> list[dict[str, str]]:
    """The entries of symptoms.toml."""
    table = tomllib.loads((root / "docs" / "site" / "symptoms.toml").read_text(encoding="utf-8"))
    return [dict(entry) for entry in table["symptom"]]


def messages(root: Path) -> Iterator[Message]:
    """Every message that the package and the library can raise."""
    names = {kind.__name__ for kind in classes(load_errors(root))}
    for path in sorted([*(root / "pyruntime").rglob("*.py"), *(root / "models").glob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if name in names and node.args:
                    made = [name, _python_text(node.args[0])]
                elif name == "ApiError" and len(node.args) > 1:
                    made = [name, _python_text(node.args[1])]
                elif name == "invalid" and len(node.args) > 1:
                    made = ["ApiError", f"{_python_text(node.args[0])} {_python_text(node.args[1])}"]
                else:
                    continue
                if re.search(r"[a-z]{3}", made[1]):
                    yield Message(*made, file=path.relative_to(root).as_posix())
    for path in sorted((root / "core").rglob("*.*")):
        if path.suffix in (".cc", ".cu", ".h", ".cuh") and path.name not in ("check.h", "pyruntime.h"):
            for error, text in _core_messages(path.read_text(encoding="utf-8")):
                if re.search(r"[a-z]{3}", text):
                    yield Message(error, text, path.relative_to(root).as_posix())


def _python_text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _python_text(node.left) + _python_text(node.right)
    return GAP


def _core_messages(source: str) -> Iterator[tuple[str, str]]:
    """(status, text) of every check(ok, ...) and fail(status, ...)."""
    for call in re.finditer(r"\b(check|fail)\(", source):
        arguments = _arguments(source, call.end())
        status = arguments[0] if call[1] == "fail" else "PRT_INVALID_ARGUMENT"
        if len(arguments) > 1 and status.startswith("PRT_"):
            parts = [re.findall(r'"((?:[^"\\]|\\.)*)"', a) if a.startswith('"') else [GAP] for a in arguments[1:]]
            yield status, "".join("".join(part) for part in parts).replace('\\"', '"').replace(GAP * 2, GAP)


def _arguments(source: str, begin: int) -> list[str]:
    """The arguments of a call whose parenthesis opened before `begin`."""
    depth, start, quoted, found = 1, begin, False, []
    for i in range(begin, len(source)):
        c = source[i]
        if quoted or c == '"':
            quoted = (c != '"' or source[i - 1] == "\\") if quoted else True
        elif c in "([{":
            depth += 1
        elif c in ")]}" or (c == "," and depth == 1):
            depth -= c != ","
            if depth == 0 or c == ",":
                found.append(source[start:i].strip())
                start = i + 1
            if depth == 0:
                break
    return found


def _cell(text: str) -> str:
    """As it is, in a table."""
    return (
        text.replace("\\", "\\\\")
        .replace("|", "\\|")
        .replace("<", "&lt;")
        .replace("*", "\\*")
        .replace("_", "\\_")
        .replace("`", "\\`")
        .replace("[", "\\[")
        .replace("\n", " ")
    )


def _link(name: str | None) -> str:
    return f"[{name}](#{name.lower()})" if name else ""


if __name__ == "__main__":
    print(page(Path(__file__).resolve().parents[2]))
