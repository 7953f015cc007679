"""The reference of the C interface, from core/pyruntime.h: its sections, each declaration with the comment that explains it."""

from __future__ import annotations

import re
from pathlib import Path

_SECTION = re.compile(r"^/\* -{20,} (.*?) \*/$", re.MULTILINE)
_SYMBOL = re.compile(
    r"\b(prt_[a-z_0-9]+)\s*\(|^} (prt_[a-z_0-9]+);|\(\*(prt_[a-z_0-9]+)\)|^typedef struct (?:prt_\w+) (prt_\w+);", re.MULTILINE
)


def page(root: Path) -> str:
    """Markdown of the whole header."""
    text = (root / "core" / "pyruntime.h").read_text(encoding="utf-8")
    manual, _, rest = text.removeprefix("/*").partition("*/")
    _, *parts = _SECTION.split(rest)
    lines = [
        "# C interface",
        "",
        "Made from [core/pyruntime.h](../../core/pyruntime.h), which is the whole interface. How to build with it:",
    ]
    lines += [
        "[Embedding in C and C++](../guide/embedding.md); what later versions may change: [The C interface over time](../abi.md).",
        "",
    ]
    lines += ["```text", *(line.removeprefix(" *").removeprefix(" ") for line in manual.strip().splitlines()), "```"]
    for title, body in zip(parts[::2], parts[1::2], strict=True):
        lines += ["", f"## {title[0].upper()}{title[1:]}"]
        for block in _blocks(body.partition("#ifdef __cplusplus")[0]):
            lines += ["", *_rendered(block)]
    return "\n".join(lines) + "\n"


def _blocks(body: str) -> list[str]:
    """Declarations with the comments above them. They are separated by empty lines, and each function is one of its own."""
    blocks: list[str] = []
    for part in re.split(r"\n\s*\n", body.strip("\n")):
        start, lines, is_open = 0, part.splitlines(), False
        for i, line in enumerate(lines):
            is_open = (is_open or "{" in line) and "}" not in line
            ended = not is_open and re.search(r";\s*(/\*.*\*/)?$", line)
            comes_comment = i + 1 < len(lines) and lines[i + 1].startswith(("/*", "PRT_API"))
            if ended and comes_comment:
                blocks.append("\n".join(lines[start : i + 1]))
                start = i + 1
        blocks.append("\n".join(lines[start:]))
    return [block for block in blocks if block.strip()]


def _rendered(block: str) -> list[str]:
    """A heading for each name, the comment as text, the declaration as code."""
    lead = re.match(r"/\*(.*?)\*/\s*", block, re.DOTALL)
    names = [name for found in _SYMBOL.findall(block[lead.end() :] if lead else block) for name in found if name]
    lines = [f"### {', '.join(f'`{name}`' for name in dict.fromkeys(names))}", ""] if names else []
    code = block
    if lead and not block[lead.end() :].strip():
        return [" ".join(line.strip().removeprefix("* ") for line in lead[1].splitlines())]
    if lead:
        lines += [*(line.strip().removeprefix("* ") for line in lead[1].strip().splitlines()), ""]
        code = block[lead.end() :]
    return [*lines, "```c", code.replace("PRT_API ", "").rstrip(), "```"]
