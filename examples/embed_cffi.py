#!/usr/bin/env python3
"""embed.c in Python, through cffi's ABI mode: no compiler, no generated binding, only the installed header and library.

    python embed_cffi.py                       # the pyruntime package of this Python
    python embed_cffi.py /path/to/package      # a folder with include/pyruntime.h and the library

The steps are explained in embed.c; here is what differs: how the header is read, and that buffers are kept by names.
Needs cffi (pip install cffi).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import cffi

N_PROMPT, N_NEW = 70, 24


def package_folder() -> Path:
    import pyruntime

    return Path(pyruntime.get_library()).parent


def load(folder: Path) -> tuple[Any, Any, dict[str, str]]:
    """cffi's view of the header, the library, and the header's #define texts (cffi does not preprocess)."""
    text = (folder / "include" / "pyruntime.h").read_text(encoding="utf-8")
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    macros = {name: value.strip() for name, value in re.findall(r"^#define (PRT_\w+) ((?:.*\\\n)*.*)$", text, flags=re.MULTILINE)}
    text = re.sub(r"^#(?:.*\\\n)*.*$", "", text, flags=re.MULTILINE)  # what is left is plain declarations
    text = text.replace("PRT_API ", "").replace('extern "C" {', "")
    ffi = cffi.FFI()
    ffi.cdef(re.sub(r"^}\s*$", "", text, flags=re.MULTILINE))
    library = next(p for pattern in ("*.so", "*.dylib", "*.dll") for p in folder.glob(pattern) if "pyruntime" in p.name)
    return ffi, ffi.dlopen(str(library)), macros


class Runtime:
    """The library with its status codes turned into exceptions and its _INIT macros into structures."""

    def __init__(self, folder: Path) -> None:
        self.ffi, self.lib, self.macros = load(folder)
        if self.lib.prt_abi_version() != int(self.macros["PRT_ABI_VERSION"]):
            raise RuntimeError("the library and the header are of different versions")

    def __call__(self, name: str, *arguments: Any) -> None:
        """Calls prt_<name> and raises what prt_last_error says when it fails."""
        status = getattr(self.lib, f"prt_{name}")(*arguments)
        if status != self.lib.PRT_OK:
            kind = self.ffi.string(self.lib.prt_status_name(status)).decode()
            raise RuntimeError(f"{kind}: {self.ffi.string(self.lib.prt_last_error()).decode()}")

    def struct(self, name: str, **fields: Any) -> Any:
        """A prt_<name> with the values of its _INIT macro, then those given."""
        result = self.ffi.new(f"prt_{name} *")
        text = self.macros[f"PRT_{name.upper()}_INIT"].replace("\\\n", " ").strip()[1:-1]
        values = re.sub(r"\{[^}]*\}", "NULL", text).split(",")  # arrays start as zeros, which they are already
        for (field, _), value in zip(self.ffi.typeof(result).item.fields, map(str.strip, values), strict=True):
            if value.startswith("sizeof"):
                setattr(result, field, self.ffi.sizeof(f"prt_{name}"))
            elif value.startswith("PRT_"):
                setattr(result, field, getattr(self.lib, value))
            elif value != "NULL":
                setattr(result, field, int(value) if value.isdigit() else float(value.rstrip("f")))
        for field, value in fields.items():
            setattr(result, field, value)
        return result


def make_model(rt: Runtime, config: Any) -> Any:
    ffi, lib, out = rt.ffi, rt.lib, rt.ffi.new("prt_model **")
    rt("model_create", config, b"cpu", out)
    model, count, state = out[0], ffi.new("int32_t *"), 1
    rt("model_tensor_count", model, count)
    for i in range(count[0]):
        info = rt.struct("tensor_info")
        rt("model_tensor_get", model, i, info)
        n = info.shape[0] * (info.shape[1] if info.n_dim > 1 else 1)
        data = ffi.new("float[]", n)
        for k in range(n):
            if info.n_dim == 1:
                data[k] = 1.0
                continue
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            data[k] = 0.2 * ((((state >> 32) + 2**31) % 2**32 - 2**31) / 2**31)
        rt("model_load_tensor", model, info.name, data, lib.PRT_F32, info.shape, info.n_dim)
    rt("model_finalize", model)
    return ffi.gc(model, lib.prt_model_release)


def step(rt: Runtime, session: Any, sequences: list[int], tokens: list[list[int]], samplers: list[Any]) -> list[int]:
    """Appends tokens to each sequence and returns the token sampled after each."""
    ffi = rt.ffi
    sampled = ffi.new("int32_t[]", len(sequences))
    # cffi frees a buffer when its name goes, so each has one until the call is over.
    seq, lengths = ffi.new("int64_t[]", sequences), ffi.new("int32_t[]", [len(t) for t in tokens])
    flat, who = ffi.new("int32_t[]", [t for part in tokens for t in part]), ffi.new("prt_sampler *[]", samplers)
    batch = rt.struct("batch", n_seq=len(sequences), seq=seq, n_token=lengths, tokens=flat, samplers=who, sampled=sampled)
    rt("session_step", session, batch)
    return list(sampled)


def main() -> int:
    rt = Runtime(Path(sys.argv[1]) if len(sys.argv) > 1 else package_folder())
    ffi, lib = rt.ffi, rt.lib
    print("pyruntime", ffi.string(lib.prt_version()).decode())
    config = rt.struct("model_config", n_layer=2, h_q=4, h_kv=2, d_head=16, d_model=64, d_ff=160, n_vocab=300, max_position=512)
    model = make_model(rt, config)
    out = ffi.new("prt_session **")
    rt("session_create", model, rt.struct("session_config", max_context=256, n_page=8, n_threads=2), out)
    session = ffi.gc(out[0], lib.prt_session_release)

    samplers = []
    for _ in range(2):
        made = ffi.new("prt_sampler **")
        rt("sampler_create", config.n_vocab, rt.struct("sampling", temperature=0.0), made)
        samplers.append(ffi.gc(made[0], lib.prt_sampler_release))
    seq, fork = ffi.new("int64_t *"), ffi.new("int64_t *")
    rt("sequence_create", session, seq)
    [token] = step(rt, session, [seq[0]], [[(i * i + 7) % config.n_vocab for i in range(N_PROMPT)]], samplers[:1])
    rt("sequence_fork", session, seq[0], fork)
    written: list[list[int]] = []
    tokens = [token, token]
    for _ in range(N_NEW):
        written.append(tokens)
        tokens = step(rt, session, [seq[0], fork[0]], [[t] for t in tokens], samplers)
    same = all(a == b for a, b in written)
    print("tokens:", *(a for a, _ in written))
    print("both forks agree:", "yes" if same else "no")

    try:
        step(rt, session, [seq[0]], [[1_000_000]], samplers[:1])
    except RuntimeError as error:
        print("a deliberate error:", error)
    else:
        same = False
    stats = rt.struct("session_stats")
    rt("session_get_stats", session, stats)
    print(f"pages: {stats.n_page - stats.n_page_free} of {stats.n_page} in use, {stats.n_page_copy} copied on write")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
