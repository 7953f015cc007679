"""The C interface: the generated binding against what a C parser makes of the header, and calls that a careless program would make."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import abi_promises
import numpy as np
import pytest

from pyruntime import _abi, _lib, env

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "core" / "pyruntime.h"
STRUCTS = {name: kind for name, kind in vars(_abi).items() if isinstance(kind, type) and issubclass(kind, ctypes.Structure)}
CALLBACKS = ("prt_log_fn", "prt_abort_fn", "prt_progress_fn", "prt_write_fn", "prt_read_fn")


# ---------------------------------------------------------------- the binding is what the header says


@pytest.fixture(scope="module")
def ffi() -> Any:
    """The header through cffi's parser."""
    pytest.importorskip("cffi")
    return abi_promises.parse_header()


def as_ctypes(kind: Any) -> Any:
    """The ctypes type that a cffi type must have in the binding."""
    simple = {
        "int32_t": ctypes.c_int32, "uint32_t": ctypes.c_uint32, "int64_t": ctypes.c_int64, "uint64_t": ctypes.c_uint64,
        "uint8_t": ctypes.c_uint8, "float": ctypes.c_float, "double": ctypes.c_double, "char": ctypes.c_char,
    }  # fmt: skip
    if kind.kind == "void":
        return None
    if kind.kind == "primitive":
        return simple[kind.cname]
    if kind.kind == "enum":
        return ctypes.c_int32
    if kind.kind == "array":
        return as_ctypes(kind.item) * kind.length
    if kind.kind == "struct":
        return STRUCTS[kind.cname]
    if kind.kind == "function":
        return ctypes.CFUNCTYPE(as_ctypes(kind.result), *map(as_ctypes, kind.args))
    assert kind.kind == "pointer", kind
    target = kind.item
    if target.kind == "function":
        return as_ctypes(target)
    if target.kind == "void" or (target.kind == "struct" and target.fields is None):
        return ctypes.c_void_p
    if target.kind == "primitive" and target.cname == "char":
        return ctypes.c_char_p
    return ctypes.POINTER(as_ctypes(target))


def test_structures(ffi: Any) -> None:
    names = {name for name in ffi.list_types()[0] if ffi.typeof(name).kind == "struct" and ffi.typeof(name).fields is not None}
    assert names == set(STRUCTS)
    for name, kind in STRUCTS.items():
        assert ffi.sizeof(name) == ctypes.sizeof(kind), name
        fields = ffi.typeof(name).fields
        assert [f for f, _ in fields] == [f for f, _ in kind._fields_], name
        for (field, described), (_, bound) in zip(fields, kind._fields_, strict=True):
            assert described.offset == getattr(kind, field).offset, f"{name}.{field}"
            assert as_ctypes(described.type) == bound, f"{name}.{field}"


def test_enumerations_and_constants(ffi: Any) -> None:
    values: dict[str, int] = {}
    for name in ffi.list_types()[0]:
        if ffi.typeof(name).kind == "enum":
            values.update({v: k for k, v in ffi.typeof(name).elements.items()})
    assert len(values) > 20
    assert values == {k: v for k, v in vars(_abi).items() if k.startswith("PRT_")}
    text = HEADER.read_text(encoding="utf-8")
    for name in ("ABI_VERSION", "PAGE_TOKENS"):
        assert re.search(rf"#define PRT_{name} (\d+)", text)[1] == str(getattr(_abi, name))  # type: ignore[index]


def test_functions(ffi: Any) -> None:
    functions = set(re.findall(r"^PRT_API [^;]*?\b(prt_\w+)\(", HEADER.read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert functions == set(_abi.FUNCTIONS)
    library = ffi.dlopen(str(_lib.library_path()))
    for name, (result, arguments) in _abi.FUNCTIONS.items():
        described = ffi.typeof(getattr(library, name))
        assert as_ctypes(described.result) == result, name
        assert [as_ctypes(a) for a in described.args] == arguments, name
    for name in CALLBACKS:
        described, bound = ffi.typeof(name), getattr(_abi, name)
        assert as_ctypes(described.result) == bound._restype_, name
        assert tuple(map(as_ctypes, described.args)) == bound._argtypes_, name


def test_generated_binding_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, ROOT / "core" / "generate_abi.py", "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def compile_c(tmp_path: Path, source: str, *flags: str) -> None:
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    file = tmp_path / "header.c"
    file.write_text(source)
    warnings = ["-Wall", "-Wextra", "-pedantic", "-Werror", f"-I{HEADER.parent}"]
    done = subprocess.run([compiler, "-fsyntax-only", *warnings, *flags, file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


INITS = re.findall(r"#define (PRT_(\w+)_INIT)", HEADER.read_text(encoding="utf-8"))
USES = "\n".join(f"  prt_{name.lower()} s{i} = {macro}; (void)s{i};" for i, (macro, name) in enumerate(INITS))


LANGUAGES = [["-std=c99"], ["-std=c11"], ["-x", "c++", "-std=c++11", "-Wno-missing-field-initializers"]]


@pytest.mark.parametrize("flags", LANGUAGES, ids=" ".join)
def test_header_compiles(tmp_path: Path, flags: list[str]) -> None:
    """C99 and C++, with every _INIT value, and twice in one file."""
    compile_c(tmp_path, f'#include "pyruntime.h"\n#include "pyruntime.h"\nvoid use(void);\nvoid use(void) {{\n{USES}\n}}\n', *flags)


def test_layout_is_what_the_compiler_says(tmp_path: Path) -> None:
    """cffi computes offsets itself; this asks the compiler of this platform."""
    lines = ['#include "pyruntime.h"', "#include <stddef.h>"]
    for name, kind in STRUCTS.items():
        lines.append(f"typedef char size_of_{name}[sizeof({name}) == {ctypes.sizeof(kind)} ? 1 : -1];")
        for field, _ in kind._fields_:
            lines.append(f"typedef char offset_of_{name}_{field}[offsetof({name}, {field}) == {getattr(kind, field).offset} ? 1 : -1];")
    compile_c(tmp_path, "\n".join(lines) + "\n", "-std=c99")


def test_init_values_are_the_defaults_of_the_binding(tmp_path: Path) -> None:
    """Compiles a program that writes every _INIT value out as bytes."""
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    body = "".join(f"{{ prt_{n.lower()} s = {m}; fwrite(&s, sizeof s, 1, stdout); }}\n" for m, n in INITS)
    (tmp_path / "init.c").write_text(f'#include <stdio.h>\n#include "pyruntime.h"\nint main(void) {{\n{body}return 0; }}\n')
    subprocess.run([compiler, "-std=c99", f"-I{HEADER.parent}", tmp_path / "init.c", "-o", tmp_path / "init"], check=True)
    out = subprocess.run([tmp_path / "init"], capture_output=True, check=True).stdout
    for _, name in INITS:
        kind = STRUCTS[f"prt_{name.lower()}"]
        from_c, ours = kind.from_buffer_copy(out), kind()
        out = out[ctypes.sizeof(kind) :]
        for field, bound in kind._fields_:
            at = slice(getattr(kind, field).offset, getattr(kind, field).offset + ctypes.sizeof(bound))
            assert bytes(from_c)[at] == bytes(ours)[at], f"{name}.{field}"
    assert not out


@pytest.mark.skipif(ctypes.sizeof(ctypes.c_void_p) != 8, reason="the offsets are those of 64-bit machines")
def test_promises_of_released_versions(ffi: Any) -> None:
    """docs/abi.md: a program that was compiled against an older header works with this library."""
    promised, now = abi_promises.FILE.read_text().splitlines(), list(abi_promises.promises(ffi))
    assert len(promised) > 150
    assert abi_promises.FILE.stem == f"abi-{_abi.ABI_VERSION}", "a new ABI version starts a new file"
    assert abi_promises.broken(promised, now) == []
    for name, kind in STRUCTS.items():  # what is appended must change the size, and so must not fit into padding
        last, bound = kind._fields_[-1][:2]
        assert getattr(kind, last).offset + ctypes.sizeof(bound) == ctypes.sizeof(kind), f"{name} ends in padding"


PROMISED = """\
constant PRT_OK = 0
size s = 16
field s at 0: uint32_t struct_size
field s at 8: char * x
size old = 8
field old at 0: void * p
function f: int(*)(void)""".splitlines()


@pytest.mark.parametrize(
    ("without", "plus", "breaks"),
    [
        ("", "function g: int(*)(void)", 0),
        ("size s = 16", "size s = 24\nfield s at 16: int64_t y", 0),
        ("", "field s at 4: int32_t y", 1),
        ("size s = 16", "size s = 12", 1),
        ("size old = 8", "size old = 16\nfield old at 8: int64_t y", 1),
        ("field s at 8: char * x", "field s at 8: char * renamed", 2),
        ("constant PRT_OK = 0", "constant PRT_OK = 1", 1),
        ("function f: int(*)(void)", "function f: int(*)(int)", 1),
    ],
)
def test_what_breaks_a_promise(without: str, plus: str, breaks: int) -> None:
    now = [line for line in PROMISED if line != without] + plus.splitlines()
    assert len(abi_promises.broken(PROMISED, now)) == breaks


def test_library_exports_only_its_own_names() -> None:
    nm = shutil.which("nm") or pytest.skip("nm (binutils) is not installed")
    listing = subprocess.run([nm, "-D", "--defined-only", _lib.library_path()], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1].split("@")[0] for line in listing.splitlines()}
    assert names == set(_abi.FUNCTIONS)


def test_library_needs_only_the_system() -> None:
    """No CUDA, BLAS or OpenMP library has to be found at run time, nowhere but where the system looks, and no memory is both written
    and executed."""
    readelf = shutil.which("readelf") or pytest.skip("readelf (binutils) is not installed")
    listing = subprocess.run([readelf, "-dlW", _lib.library_path()], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(\w+)[\w.-]*\]", listing.replace("ld-linux", "ld_linux")))
    system = {"libc", "libm", "libstdc", "libgcc_s", "libpthread", "libdl", "librt", "ld_linux"}
    if _lib.build_info()["sanitizers"] == "ON":
        system |= {"libasan", "libubsan"}
    assert needed <= system
    assert re.search(r"\(SONAME\).*\[libpyruntime\.so\]", listing)
    assert not re.search(r"\((RPATH|RUNPATH|TEXTREL)\)", listing)
    assert not re.search(r"(LOAD|GNU_STACK) .* RWE ", listing)


def test_versions_and_names() -> None:
    lib = _lib.lib()
    assert lib.prt_abi_version() == _abi.ABI_VERSION
    assert re.fullmatch(rb"\d+\.\d+\.\d+", lib.prt_version())
    statuses = re.findall(r"PRT_\w+(?= = \d)", HEADER.read_text().split("typedef enum prt_status")[1].split("}")[0])
    assert len(statuses) == 10
    assert [lib.prt_status_name(getattr(_abi, name)).decode() for name in statuses] == statuses
    assert all(lib.prt_status_name(i) for i in (-1, 10, 2**31 - 1, -(2**31)))
    assert all(re.fullmatch(r"\w+=.*", line) for line in lib.prt_build_info().decode().splitlines())


# ---------------------------------------------------------------- careless calls

CONFIG = {"dtype": _abi.PRT_F32, "n_layer": 1, "h_q": 2, "h_kv": 1, "d_head": 8, "d_model": 16, "d_ff": 24, "n_vocab": 20}
I32, I64 = ctypes.c_int32, ctypes.c_int64


class Handles:
    """A small model with a session, a sequence and a sampler, and for every function of the header arguments that succeed."""

    def __init__(self, finalize: bool = True) -> None:
        self.lib = _lib.lib()
        self.config = _abi.prt_model_config(max_position=128, **CONFIG)
        self.model, self.loading, self.session, self.sampler, self.out = (ctypes.c_void_p() for _ in range(5))
        for handle in (self.model, self.loading):  # self.loading stays open
            _lib.check(self.lib.prt_model_create(self.config, b"cpu", handle))
        count = I32()
        _lib.check(self.lib.prt_model_tensor_count(self.model, count))
        for i in range(count.value):
            info = _abi.prt_tensor_info()
            _lib.check(self.lib.prt_model_tensor_get(self.model, i, info))
            shape = tuple(info.shape[: info.n_dim])
            data = np.random.default_rng(i).standard_normal(shape).astype(np.float32) * 0.3
            _lib.check(self.lib.prt_model_load_tensor(self.model, info.name, data.ctypes.data, _abi.PRT_F32, info.shape, info.n_dim))
        _lib.check(self.lib.prt_model_finalize(self.model))
        _lib.check(self.lib.prt_session_create(self.model, _abi.prt_session_config(n_page=8, n_threads=1), self.session))
        self.seq = I64()
        _lib.check(self.lib.prt_sequence_create(self.session, self.seq))
        _lib.check(self.lib.prt_sampler_create(20, _abi.prt_sampling(temperature=0.0), self.sampler))
        self.tokens = (I32 * 3)(1, 2, 3)
        self.filled, self.exported, self.at = I64(), bytearray(), 0
        _lib.check(self.lib.prt_sequence_create(self.session, self.filled))
        batch = _abi.prt_batch(n_seq=1, seq=(I64 * 1)(self.filled.value), n_token=(I32 * 1)(3), tokens=self.tokens)
        _lib.check(self.lib.prt_session_step(self.session, batch))
        self.write, self.read = _abi.prt_write_fn(self.take), _abi.prt_read_fn(self.give)
        _lib.check(self.lib.prt_sequence_export(self.session, self.filled, self.write, None))
        self.norm = np.ones(16, np.float32)
        self.logits = (ctypes.c_float * 20)(*range(20))
        x = _abi.prt_tensor(self.norm.ctypes.data, _abi.PRT_F32, 2, (1, 8))
        weight = _abi.prt_tensor(self.norm.ctypes.data + 32, _abi.PRT_F32, 1, (8,))
        self.operands = (ctypes.POINTER(_abi.prt_tensor) * 3)(*map(ctypes.pointer, (x, x, weight)))  # rms_norm in place

    def take(self, _user: Any, data: int, n: int) -> int:
        self.exported += ctypes.string_at(data, n)
        return 0

    def give(self, _user: Any, data: int, n: int) -> int:
        self.at %= len(self.exported)  # each import from the beginning
        ctypes.memmove(data, bytes(self.exported[self.at : self.at + n]), n)
        self.at += n
        return 0

    def batch(self) -> _abi.prt_batch:
        return _abi.prt_batch(n_seq=1, seq=(I64 * 1)(self.seq.value), n_token=(I32 * 1)(3), tokens=self.tokens)

    def calls(self, tmp_path: Path) -> dict[str, tuple[list[Any], set[int]]]:
        """name -> (arguments that succeed, positions where NULL is allowed)"""
        file = tmp_path / "norm.bin"
        file.write_bytes(self.norm.tobytes())
        shape, count, n64 = (I64 * 1)(16), I32(), I64()
        return {
            "prt_set_log": ([_lib._log, None, env.LOG_LEVELS.index(env.log_level()) + 1], {0, 1}),
            "prt_device_count": ([count], set()),
            "prt_device_get": ([0, _abi.prt_device_info()], set()),
            "prt_model_create": ([self.config, b"cpu", self.out], set()),
            "prt_model_tensor_count": ([self.model, count], set()),
            "prt_model_tensor_get": ([self.model, 0, _abi.prt_tensor_info()], set()),
            "prt_model_load_tensor": ([self.loading, b"norm.weight", self.norm.ctypes.data, _abi.PRT_F32, shape, 1], set()),
            "prt_model_load_rows": ([self.loading, b"norm.weight", 0, 16, self.norm.ctypes.data, _abi.PRT_F32], set()),
            "prt_model_load_file": ([self.loading, b"norm.weight", str(file).encode(), 0, _abi.PRT_F32, shape, 1], set()),
            "prt_model_finalize": ([self.loading], set()),
            "prt_model_weight_bytes": ([self.model, n64], set()),
            "prt_session_create": ([self.model, _abi.prt_session_config(n_threads=1), self.out], set()),
            "prt_sequence_create": ([self.session, n64], set()),
            "prt_sequence_fork": ([self.session, self.seq.value, n64], set()),
            "prt_sequence_truncate": ([self.session, self.seq.value, 0], set()),
            "prt_sequence_length": ([self.session, self.seq.value, n64], set()),
            "prt_sequence_free": ([self.session, self.seq.value], set()),
            "prt_sequence_export": ([self.session, self.filled.value, self.write, None], {3}),
            "prt_sequence_import": ([self.session, self.read, None, n64], {2}),
            "prt_sampler_create": ([20, _abi.prt_sampling(), self.out], set()),
            "prt_sampler_accept": ([self.sampler, self.tokens, 3, 1], set()),
            "prt_sampler_set_bias": ([self.sampler, self.tokens, self.logits, 3], set()),
            "prt_sampler_sample": ([self.sampler, self.logits, 20, count, ctypes.c_float()], {4}),
            "prt_session_step": ([self.session, self.batch()], set()),
            "prt_session_set_attention": ([self.session, _abi.prt_attention(policy=_abi.PRT_ATTENTION_TACTIC)], set()),
            "prt_attention_parse": ([b"recycled:k=64", _abi.prt_attention()], set()),
            "prt_attention_page_bytes": ([self.model, _abi.prt_attention(policy=_abi.PRT_ATTENTION_TACTIC), n64], set()),
            "prt_session_get_attention_stats": ([self.session, -1, -1, _abi.prt_attention_stats()], set()),
            "prt_session_get_stats": ([self.session, _abi.prt_session_stats()], set()),
            "prt_op_run": ([b"cpu", b"rms_norm", self.operands, 3, (ctypes.c_double * 1)(0), 1, 1, b"baseline"], {7}),
        }

    def release(self) -> None:
        self.lib.prt_sampler_release(self.sampler)
        self.lib.prt_session_release(self.session)
        for model in (self.model, self.loading):
            self.lib.prt_model_release(model)


@pytest.fixture
def handles() -> Iterator[Handles]:
    h = Handles()
    yield h
    h.release()


def run_careless_calls(folder: str) -> None:
    """Every function with NULL for each pointer in turn, then for all. Runs in a process of its own, so that a crash is a result."""
    h = Handles()
    lib, calls = h.lib, h.calls(Path(folder))
    without_status = {name for name, (result, _) in _abi.FUNCTIONS.items() if result is not ctypes.c_int32}
    assert set(calls) == set(_abi.FUNCTIONS) - without_status
    for name, (arguments, may_be_null) in calls.items():
        types = _abi.FUNCTIONS[name][1]
        pointers = [i for i, t in enumerate(types) if t not in (I32, I64)]
        for missing in [[i] for i in pointers] + [pointers]:
            print(name, "without argument", missing, flush=True)
            call = [a if i not in missing else types[i]() if hasattr(types[i], "_restype_") else None for i, a in enumerate(arguments)]
            status, text = getattr(lib, name)(*call), lib.prt_last_error().decode()
            if set(missing) <= may_be_null and missing != pointers:
                continue  # succeeds or fails for another reason; it came back
            if name == "prt_set_log":
                assert status == _abi.PRT_OK, text
                continue
            assert status == _abi.PRT_INVALID_ARGUMENT, f"{name} without argument {missing}: {status} {text}"
            assert "NULL" in text or "missing" in text, f"{name} without argument {missing}: {text}"
    for name in ("prt_model_release", "prt_session_release", "prt_sampler_release"):
        getattr(lib, name)(None)
    h.release()


def test_null_is_an_error_everywhere_and_never_a_crash(tmp_path: Path) -> None:
    code = f"import test_abi; test_abi.run_careless_calls({str(tmp_path)!r})"
    command = [sys.executable, "-X", "faulthandler", "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"stopped at: {done.stdout.splitlines()[-1:]}\n{done.stderr[-3000:]}"


def test_the_good_calls_are_good(handles: Handles, tmp_path: Path) -> None:
    """The arguments that the NULL test starts from do succeed, in the order in which they are listed."""
    calls = handles.calls(tmp_path)
    del calls["prt_sequence_free"]  # comes last
    for name, (arguments, _) in calls.items():
        status = getattr(handles.lib, name)(*arguments)
        text = handles.lib.prt_last_error().decode()
        if name == "prt_model_finalize":
            assert status == _abi.PRT_BAD_STATE and "embed.weight" in text
            continue
        assert status == _abi.PRT_OK, f"{name}: {text}"
        assert text == "", f"{name} leaves {text!r}"
        for release in ("model", "session", "sampler"):
            if name == f"prt_{release}_create":
                getattr(handles.lib, f"prt_{release}_release")(handles.out)
    assert handles.lib.prt_sequence_free(handles.session, handles.seq.value) == _abi.PRT_OK


# function, position of the structure, whether the library reads it
TAKES_STRUCT = [
    ("prt_device_get", 1, False), ("prt_model_create", 0, True), ("prt_model_tensor_get", 2, False), ("prt_session_create", 1, True),
    ("prt_sampler_create", 1, True), ("prt_session_step", 1, True), ("prt_session_get_stats", 1, False),
]  # fmt: skip


@pytest.mark.parametrize(("name", "position", "read"), TAKES_STRUCT)
def test_struct_size(handles: Handles, tmp_path: Path, name: str, position: int, read: bool) -> None:
    """0 and too small: refused. Larger with zeros behind: accepted. Larger with something behind: refused where the library reads it; where
    it writes, what lies behind its own fields is left alone."""
    lib = handles.lib
    arguments, _ = handles.calls(tmp_path)[name]
    good = arguments[position]
    kind, size, room = type(good), ctypes.sizeof(good), 64

    def call(struct_size: int, tail: bytes = b"") -> tuple[int, str, bytes]:
        handles.lib.prt_sequence_truncate(handles.session, handles.seq.value, 0)
        buffer = ctypes.create_string_buffer(bytes(good) + tail.ljust(room, b"\0"), size + room)
        struct = kind.from_buffer(buffer)
        struct.struct_size = struct_size
        call_arguments = [struct if i == position else a for i, a in enumerate(arguments)]
        status = getattr(lib, name)(*call_arguments)
        text = lib.prt_last_error().decode()
        if status == _abi.PRT_OK and name.endswith("_create"):
            getattr(lib, name.replace("_create", "_release"))(handles.out)
        return status, text, buffer.raw[size:]

    assert call(size)[0] == _abi.PRT_OK
    for bad in (0, 1, 3, 2**16 + 1, 2**32 - 1):
        status, text, _ = call(bad)
        assert status == _abi.PRT_INVALID_ARGUMENT, bad
        assert f"struct_size is {bad}" in text
    assert call(size + room)[0] == _abi.PRT_OK
    assert call(size + 1)[0] == _abi.PRT_OK
    for behind in (b"\1", b"\0" * (room - 1) + b"\1"):
        status, text, tail = call(size + room, behind)
        assert tail == behind.ljust(room, b"\0")
        if read:
            assert status == _abi.PRT_UNSUPPORTED
            assert f"struct_size {size + room}" in text
        else:
            assert status == _abi.PRT_OK
    if not read:  # never more than the caller has room for
        marked = b"\xee" * size
        buffer = ctypes.create_string_buffer(marked, size)
        struct = kind.from_buffer(buffer)
        struct.struct_size = 8
        assert getattr(lib, name)(*[struct if i == position else a for i, a in enumerate(arguments)]) == _abi.PRT_OK
        assert buffer.raw[8:] == marked[8:]
        assert struct.struct_size == 8


def test_wrong_order_of_calls(handles: Handles) -> None:
    lib, out = handles.lib, ctypes.c_void_p(1)
    shape = (I64 * 1)(16)
    status = lib.prt_model_load_tensor(handles.model, b"norm.weight", handles.norm.ctypes.data, _abi.PRT_F32, shape, 1)
    assert (status, lib.prt_status_name(status)) == (_abi.PRT_BAD_STATE, b"PRT_BAD_STATE")
    assert lib.prt_model_finalize(handles.model) == _abi.PRT_BAD_STATE
    assert lib.prt_session_create(handles.loading, _abi.prt_session_config(), out) == _abi.PRT_BAD_STATE
    assert b"finalize" in lib.prt_last_error()
    assert not out, "a failed create leaves NULL"
    assert lib.prt_model_finalize(handles.loading) == _abi.PRT_BAD_STATE
    assert b"embed.weight" in lib.prt_last_error()


def test_bad_ids_are_refused(handles: Handles) -> None:
    lib, s, n = handles.lib, handles.session, I64()
    _lib.check(lib.prt_sequence_free(s, handles.seq.value))
    for seq in (handles.seq.value, 0, -1, 2**63 - 1, -(2**63)):
        for call in (
            lambda seq=seq: lib.prt_sequence_fork(s, seq, n), lambda seq=seq: lib.prt_sequence_truncate(s, seq, 0),
            lambda seq=seq: lib.prt_sequence_length(s, seq, n), lambda seq=seq: lib.prt_sequence_free(s, seq),
        ):  # fmt: skip
            assert call() == _abi.PRT_INVALID_ARGUMENT
            assert f"sequence {seq} does not exist" in lib.prt_last_error().decode()
    info = _abi.prt_tensor_info()
    for i in (-1, 10**6):
        assert lib.prt_model_tensor_get(handles.model, i, info) == _abi.PRT_INVALID_ARGUMENT
        assert lib.prt_device_get(i, _abi.prt_device_info()) == _abi.PRT_INVALID_ARGUMENT
    for level in (-1, 5):
        assert lib.prt_set_log(_lib._log, None, level) == _abi.PRT_INVALID_ARGUMENT
    for device, status in ((b"gpu", _abi.PRT_INVALID_ARGUMENT), (b"", _abi.PRT_INVALID_ARGUMENT), (b"cuda:99", _abi.PRT_DEVICE_ERROR)):
        assert lib.prt_model_create(handles.config, device, handles.out) == status, device
        assert not handles.out


def test_model_outlives_its_release(handles: Handles) -> None:
    """A session keeps its model alive."""
    model = ctypes.c_void_p(handles.model.value)
    handles.model = ctypes.c_void_p()
    handles.lib.prt_model_release(model)
    _lib.check(handles.lib.prt_session_step(handles.session, handles.batch()))


def test_last_error_belongs_to_the_thread_that_failed() -> None:
    lib = _lib.lib()
    assert lib.prt_device_count(None) == _abi.PRT_INVALID_ARGUMENT
    mine = lib.prt_last_error()
    seen: list[bytes] = []

    def other() -> None:
        seen.append(lib.prt_last_error())
        lib.prt_device_get(-7, _abi.prt_device_info())
        seen.append(lib.prt_last_error())

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen[0] == b""
    assert b"-7" in seen[1]
    assert lib.prt_last_error() == mine != b""
    _lib.check(lib.prt_device_count(I32()))
    assert lib.prt_last_error() == b"", "a call that succeeds clears the text"
