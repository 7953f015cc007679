"""Docstrings as this project writes them, for the API reference.

A line "name: what it is.  other: what that is." describes parameters or fields, and may go on in indented lines; they become a list.
"Raises ..." stays a sentence. Everything else is Markdown already.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_NAMES = r"[a-z_][a-z0-9_]*(?:(?:, | and )[a-z_][a-z0-9_]*)*"
_FIELD = re.compile(rf"^({_NAMES}):\s+(\S.*)$")
_NEXT = re.compile(rf"(?<=[.\]])  (?={_NAMES}: )")  # a second field in the same line


def to_markdown(text: str) -> str:
    """The docstring with its fields as a list."""
    lines: list[str] = []
    in_list = False
    for line in text.splitlines():
        if in_list and line.startswith("    "):
            lines[-1] += " " + line.strip()
            continue
        fields = [_FIELD.match(part) for part in _NEXT.split(line)]
        if not all(fields):
            if line.startswith("Raises ") or (in_list and line and not line.startswith(" ")):
                lines.append("")
            in_list = False
            lines.append(line)
            continue
        if not in_list and lines and lines[-1]:
            lines.append("")
        in_list = True
        lines += [f"* **{found[1]}**: {found[2]}" for found in fields if found]
    return "\n".join(lines)


class HouseStyle(griffe.Extension):
    """Rewrites every docstring that griffe collects."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
