"""prt_op_run on numpy arrays, and the numpy side of the storage formats.

A numpy type stands for a prt_dtype: float32, float16, int32 and int64 for themselves; uint16 for bf16 and uint8 for e4m3, which it has not.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pyruntime import _abi, _lib
from pyruntime.errors import PyruntimeError

Array = NDArray[np.generic]

DTYPES = ("bf16", "f16", "f32")
ISAS = ("baseline", "avx2", "avx512", "avx512bf16", "amx")
GPU = "cuda:0"
WIDTH = {"baseline": 4, "avx2": 8, "avx512": 16, "avx512bf16": 16, "amx": 16}  # floats in a vector register
_NUMPY = {"bf16": np.uint16, "f16": np.float16, "f32": np.float32}
_PRT = {
    "float32": _abi.PRT_F32, "float16": _abi.PRT_F16, "uint16": _abi.PRT_BF16, "uint8": _abi.PRT_F8,
    "int32": _abi.PRT_I32, "int64": _abi.PRT_I64,
}  # fmt: skip
F8 = np.array([(-1) ** (b >> 7) * (b & 7 | 8 * (b & 120 > 0)) * 2.0 ** (max(b >> 3 & 15, 1) - 10) for b in range(256)])  # e4m3
F8[[127, 255]] = np.nan
ROUNDOFF = {"bf16": 2.0**-8, "f16": 2.0**-11, "f32": 2.0**-24}  # largest relative error of rounding to nearest, p bits: 2^-p
TINY = {"bf16": 2.0**-134, "f16": 2.0**-25, "f32": 2.0**-150}  # half the smallest subnormal: the error where relative error has no meaning


def tensor(array: Array, *, dtype: int | None = None, shape: Sequence[int] | None = None) -> _abi.prt_tensor:
    """Describes an array; dtype and shape override what it says of itself, for hostile calls. Keeps a reference to the array."""
    assert array.flags.c_contiguous
    dims = tuple(array.shape if shape is None else shape)
    t = _abi.prt_tensor()
    t.data = array.ctypes.data
    t.dtype = _PRT[array.dtype.name] if dtype is None else dtype
    t.n_dim = len(dims)
    for i, n in enumerate(dims[:4]):
        t.shape[i] = n
    t.array = array
    return t


def run(
    op: str, operands: Sequence[Array | _abi.prt_tensor | None], params: Sequence[float] = (), *, on: str | None = None, threads: int = 1
) -> None:
    """Runs one operation; outputs are written in place. Operands of each op: top of core/ops/<op>.cc; None is a missing one.

    `on` is an instruction set of the CPU (default: the best) or a GPU."""
    made = [x if x is None or isinstance(x, _abi.prt_tensor) else tensor(x) for x in operands]
    pointers = (ctypes.POINTER(_abi.prt_tensor) * len(made))(*(ctypes.pointer(t) if t else None for t in made))
    values = (ctypes.c_double * len(params))(*params)
    device, isa = ("cpu", on) if on != GPU else (on, None)
    name = isa.encode() if isa else None
    _lib.check(_lib.lib().prt_op_run(device.encode(), op.encode(), pointers, len(made), values, len(values), threads, name))


def activation(dtype: str, on: str | None) -> str:
    """What activations are kept in, next to weights or KV of type dtype."""
    return dtype if on == GPU else "f32"


@cache
def missing(on: str) -> str:
    """Why this machine cannot run an instruction set or a GPU; "" if it can."""
    x = np.ones((1, 1), np.float32)
    try:
        run("rms_norm", [np.empty_like(x), x, x[0]], [0.0], on=on)
    except PyruntimeError as error:
        return str(error)
    return ""


def _target(on: str) -> Any:
    marks = [pytest.mark.gpu] if on == GPU else []
    return pytest.param(on, marks=[*marks, pytest.mark.skip(reason=f"{on}: {missing(on)}")] if missing(on) else marks)


SUPPORTED = tuple(isa for isa in ISAS if not missing(isa))
EVERY_ISA = pytest.mark.parametrize("on", [_target(isa) for isa in ISAS])
EVERYWHERE = pytest.mark.parametrize("on", [_target(on) for on in (*ISAS, GPU)])
CPU_AND_GPU = pytest.mark.parametrize("on", ["baseline", _target(GPU)])
ON_GPU = pytest.mark.parametrize("on", [_target(GPU)])


def store(x: Array, dtype: str) -> Array:
    """float -> storage format, rounded to nearest, ties to even; NaN stays NaN."""
    if dtype != "bf16":
        with np.errstate(over="ignore"):
            return x.astype(_NUMPY[dtype])
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((u.astype(np.uint64) + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where((u & 0x7FFFFFFF) > 0x7F800000, ((u >> 16) | 0x40).astype(np.uint16), rounded)


def value(x: Array) -> NDArray[np.float64]:
    """Storage format -> float64, exactly."""
    if x.dtype == np.uint8:
        return F8[x]
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.astype(np.float64)


def bits(x: Array) -> Array:
    """The same memory as integers: equal NaNs compare equal, 0 and -0 do not."""
    return x.view(f"u{x.dtype.itemsize}")


def nans(shape: Sequence[int], dtype: str = "f32") -> Array:
    """Memory that must not be read."""
    return np.full(tuple(shape), 0x7FC0, np.uint16) if dtype == "bf16" else np.full(tuple(shape), np.nan, _NUMPY[dtype])


def guarded(array: Array, side: str) -> Array:
    """A copy that touches, "before" its first byte or "after" its last, a page that cannot be accessed (Linux)."""
    page = mmap.PAGESIZE
    n = -(-max(array.nbytes, 1) // page) * page
    memory = mmap.mmap(-1, n + 2 * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for wall in (base, base + page + n):
        if libc.mprotect(ctypes.c_void_p(wall), ctypes.c_size_t(page), 0):  # PROT_NONE
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = page if side == "before" else page + n - array.nbytes
    copy = np.frombuffer(memory, array.dtype, array.size, offset).reshape(array.shape)
    copy[...] = array
    return copy
