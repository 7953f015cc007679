#!/usr/bin/env python3
"""What released versions promised to programs that are already compiled, one line each: see docs/abi.md.

cd tests && python abi_promises.py > data/abi-1.txt        # at a release: adds what is new in it
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyruntime

HEADER = Path(__file__).resolve().parent.parent / "core" / "pyruntime.h"
FILE = Path(__file__).resolve().parent / "data" / "abi-1.txt"


def parse_header() -> Any:
    """The header through cffi's parser, without the preprocessor's lines."""
    import cffi

    text = re.sub(r"^#(?:.*\\\n)*.*$", "", HEADER.read_text(encoding="utf-8"), flags=re.MULTILINE)
    text = text.replace("PRT_API ", "").replace('extern "C" {', "")
    parsed = cffi.FFI()
    parsed.cdef(re.sub(r"^}\s*$", "", text, flags=re.MULTILINE))
    return parsed


def promises(ffi: Any) -> Iterator[str]:
    """Numbers of constants, types of functions and callbacks, and where the fields of structures lie (on 64-bit machines)."""
    typedefs = [(name, ffi.typeof(name)) for name in sorted(ffi.list_types()[0])]
    for _, kind in typedefs:
        if kind.kind == "enum":
            yield from (f"constant {name} = {value}" for value, name in sorted(kind.elements.items()))
    for name, kind in typedefs:
        if kind.kind == "function" or (kind.kind == "pointer" and kind.item.kind == "function"):
            yield f"callback {name}: {kind.cname}"
        if kind.kind == "struct" and kind.fields is not None:
            yield f"size {name} = {ffi.sizeof(name)}"
            yield from (f"field {name} at {field.offset}: {field.type.cname} {field_name}" for field_name, field in kind.fields)
    library = ffi.dlopen(pyruntime.get_library())
    for name in sorted(re.findall(r"^PRT_API [^;]*?\b(prt_\w+)\(", HEADER.read_text(encoding="utf-8"), flags=re.MULTILINE)):
        yield f"function {name}: {ffi.typeof(getattr(library, name)).cname}"


def broken(promised: list[str], now: list[str]) -> list[str]:
    """The promises that do not hold any more. Appending functions, constants and fields breaks none."""
    found = [line for line in promised if not line.startswith("size ") and line not in now]
    size = {name: int(value) for name, value in re.findall(r"^size (\w+) = (\d+)$", "\n".join(promised), re.MULTILINE)}
    versioned = {name for name in size if f"field {name} at 0: uint32_t struct_size" in promised}
    for line in now:
        if line in promised:
            continue
        if match := re.match(r"size (\w+) = (\d+)", line):
            name, value = match[1], int(match[2])
            if name in size and (value < size[name] or name not in versioned):
                found.append(f"size {name} = {size[name]}")
        # A field in a gap between older ones would be read from memory that an older program never wrote.
        if (match := re.match(r"field (\w+) at (\d+)", line)) and int(match[2]) < size.get(match[1], 0):
            found.append(f"no other {line}")
    return found


if __name__ == "__main__":
    print(*promises(parse_header()), sep="\n")
