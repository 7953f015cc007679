"""The library's handles as Python objects: weights, sampler, and a session with its sequences and steps."""

from __future__ import annotations

import ctypes
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _abi
from ._lib import check, lib
from .errors import InvalidArgumentError

if TYPE_CHECKING:
    from .attention import Attention
    from .config import ModelConfig
    from .gguf import ArrayTensor
    from .safetensors import FileTensor
    from .sampling import SamplingParams

DTYPES = {"f32": _abi.PRT_F32, "f16": _abi.PRT_F16, "bf16": _abi.PRT_BF16}
_FILE_DTYPES = {"F32": _abi.PRT_F32, "F16": _abi.PRT_F16, "BF16": _abi.PRT_BF16}
_ROPE_KINDS = {
    "default": _abi.PRT_ROPE_DEFAULT,
    "linear": _abi.PRT_ROPE_LINEAR,
    "dynamic": _abi.PRT_ROPE_DYNAMIC,
    "llama3": _abi.PRT_ROPE_LLAMA3,
    "yarn": _abi.PRT_ROPE_YARN,
}
_PIECE_BYTES = 4 << 20  # dequantised rows in memory at once, per thread
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGBREAK") if hasattr(signal, name)]

Int32Array = np.ndarray[Any, np.dtype[np.int32]]
FloatArray = np.ndarray[Any, np.dtype[np.float32]]


class _Handle:
    """Owns one counted handle of the library."""

    _release = ""

    def __init__(self) -> None:
        self.handle = ctypes.c_void_p()

    def close(self) -> None:
        """Release now. Harmless when called twice; the object can't be used afterwards."""
        handle, self.handle = self.handle, ctypes.c_void_p()
        if handle:
            getattr(lib(), self._release)(handle)

    def __del__(self) -> None:
        try:
            self.close()
        except Exception:  # at interpreter exit the library may be gone already; the process frees everything anyway
            return


def core_config(config: ModelConfig, dtype: str) -> _abi.prt_model_config:
    """ModelConfig as the library's structure, with weights and KV kept in `dtype`."""
    rope = config.rope
    return _abi.prt_model_config(
        dtype=DTYPES[dtype],
        n_layer=config.n_layer,
        h_q=config.h_q,
        h_kv=config.h_kv,
        d_head=config.d_head,
        d_model=config.d_model,
        d_ff=config.d_ff,
        n_vocab=config.n_vocab,
        max_position=config.max_position,
        norm_eps=config.norm_eps,
        tied_embeddings=config.tied_embeddings,
        qkv_bias=config.qkv_bias,
        o_bias=config.o_bias,
        mlp_bias=config.mlp_bias,
        qk_norm=config.qk_norm,
        sliding_window=config.sliding_window,
        window_first_layer=config.window_first_layer,
        rope_kind=_ROPE_KINDS[rope.kind],
        rope_theta=rope.theta,
        rope_factor=rope.factor,
        rope_original_max_position=rope.original_max_position,
        rope_low_freq_factor=rope.low_freq_factor,
        rope_high_freq_factor=rope.high_freq_factor,
        rope_beta_fast=rope.beta_fast,
        rope_beta_slow=rope.beta_slow,
        rope_attention_factor=rope.attention_factor,
        rope_truncate=rope.truncate,
    )


class Weights(_Handle):
    """The tensors of a model on a device; read-only once loaded, shared by any number of sessions."""

    _release = "prt_model_release"

    def __init__(self, config: ModelConfig, *, dtype: str, device: str) -> None:
        super().__init__()
        self.n_vocab = config.n_vocab
        check(lib().prt_model_create(ctypes.byref(core_config(config, dtype)), device.encode(), ctypes.byref(self.handle)))

    def load(
        self,
        tensors: Mapping[str, FileTensor | ArrayTensor],
        *,
        threads: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Loads every tensor and finalizes. Files are read by `threads` at once, straight into place."""
        from concurrent.futures import ThreadPoolExecutor

        done = 0
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(lambda item: self._load(*item), tensors.items()):
                done += 1
                if progress:
                    progress(done, len(tensors))
        check(lib().prt_model_finalize(self.handle))

    def _load(self, name: str, tensor: FileTensor | ArrayTensor) -> None:
        shape = (ctypes.c_int64 * len(tensor.shape))(*tensor.shape)
        from .safetensors import FileTensor

        if isinstance(tensor, FileTensor):
            check(
                lib().prt_model_load_file(
                    self.handle, name.encode(), str(tensor.path).encode(), tensor.offset, _FILE_DTYPES[tensor.dtype], shape, len(shape)
                )
            )
            return
        n_row, row_bytes = tensor.shape[0], 4 * int(np.prod(tensor.shape[1:], dtype=np.int64))
        step = max(1, _PIECE_BYTES // row_bytes)
        for begin in range(0, n_row, step):
            rows = np.ascontiguousarray(tensor.read(begin, min(n_row, begin + step)), dtype=np.float32)
            check(lib().prt_model_load_rows(self.handle, name.encode(), begin, len(rows), rows.ctypes.data, _abi.PRT_F32))

    def attention_page_bytes(self, attention: Attention) -> int:
        """What a policy keeps for each KV page."""
        n = ctypes.c_int64()
        check(lib().prt_attention_page_bytes(self.handle, ctypes.byref(attention.struct), ctypes.byref(n)))
        return n.value

    @property
    def nbytes(self) -> int:
        value = ctypes.c_int64()
        check(lib().prt_model_weight_bytes(self.handle, ctypes.byref(value)))
        return value.value


class Sampler(_Handle):
    """Sampling state of one sequence: its parameters, the tokens seen (penalties) and the number of draws (seed)."""

    _release = "prt_sampler_release"

    def __init__(self, params: SamplingParams, n_vocab: int, *, seed: int) -> None:
        super().__init__()
        ids, values = list(params.logit_bias), list(params.logit_bias.values())
        settings = _abi.prt_sampling(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            n_bias=len(ids),
            bias_ids=(ctypes.c_int32 * len(ids))(*ids),
            bias_values=(ctypes.c_float * len(ids))(*values),
            seed=seed,
        )
        check(lib().prt_sampler_create(n_vocab, ctypes.byref(settings), ctypes.byref(self.handle)))

    def accept(self, tokens: Sequence[int], *, is_prompt: bool) -> None:
        check(lib().prt_sampler_accept(self.handle, (ctypes.c_int32 * len(tokens))(*tokens), len(tokens), is_prompt))

    def set_bias(self, bias: Mapping[int, float]) -> None:
        n = len(bias)
        check(lib().prt_sampler_set_bias(self.handle, (ctypes.c_int32 * n)(*bias), (ctypes.c_float * n)(*bias.values()), n))

    def sample(self, logits: FloatArray) -> int:
        """Draws from logits [n_vocab] and accepts the token."""
        row = np.ascontiguousarray(logits, dtype=np.float32)
        token = ctypes.c_int32()
        pointer = row.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        check(lib().prt_sampler_sample(self.handle, pointer, row.size, ctypes.byref(token), None))
        return token.value


@dataclass(slots=True)
class Entry:
    """What one sequence contributes to a step. sampler: draw a token after the last one. n_logits: of that many last rows the logits are
    wanted. targets: one token per row, to be scored after it; -1 for none."""

    seq: int
    tokens: Sequence[int] | Int32Array
    sampler: Sampler | None = None
    n_logits: int = 0
    targets: Sequence[int] | Int32Array | None = None


@dataclass(slots=True)
class StepResult:
    """sampled [n_seq] (-1 without a sampler) with its log-probabilities; top_* [n_seq, n_top]; logits [rows asked for, n_vocab];
    target_logprobs [n_tok]."""

    sampled: list[int] = field(default_factory=list)
    logprobs: FloatArray | None = None
    top_ids: Int32Array | None = None
    top_logprobs: FloatArray | None = None
    logits: FloatArray | None = None
    target_logprobs: FloatArray | None = None


class Session(_Handle):
    """KV pages, sequences and steps over one set of weights. One call at a time; a second thread waits."""

    _release = "prt_session_release"

    def __init__(
        self,
        weights: Weights,
        *,
        max_context: int = 0,
        n_page: int = 0,
        max_batch_tokens: int = 0,
        threads: int = 0,
        cpu_isa: str | None = None,
    ) -> None:
        super().__init__()
        self.n_vocab = weights.n_vocab
        self.on_progress: Callable[[int, int], None] | None = None
        self._lock = threading.Lock()  # held by every call: nothing runs on a session that close() has released
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._asked: Callable[[], bool] | None = None
        self._deferring = 0  # thread that is inside deferring()
        # Kept alive with the session, and not keeping it alive: a dropped session is freed at once, not when the collector runs.
        this = weakref.proxy(self)
        self._callbacks = (
            _abi.prt_abort_fn(lambda user: this._poll(user)),
            _abi.prt_progress_fn(lambda user, done, total: this._progress(user, done, total)),
        )
        config = _abi.prt_session_config(
            max_context=max_context,
            n_page=n_page,
            max_batch_tokens=max_batch_tokens,
            n_threads=threads,
            abort=self._callbacks[0],
            progress=self._callbacks[1],
            cpu_isa=cpu_isa.encode() if cpu_isa else None,
        )
        check(lib().prt_session_create(weights.handle, ctypes.byref(config), ctypes.byref(self.handle)))

    def close(self) -> None:
        """Stops the step that another thread may be in, waits for it, and releases the session. Harmless when called twice."""
        self._stop.set()
        with self._lock:
            super().close()

    @contextmanager
    def _open(self) -> Iterator[None]:
        with self._lock:
            if not self.handle:
                raise InvalidArgumentError("the session is closed")
            yield

    # -- sequences

    def create_sequence(self) -> int:
        with self._open():
            return self._number(lib().prt_sequence_create)

    def fork(self, seq: int) -> int:
        """A new sequence that shares the pages of `seq` until one of them writes."""
        with self._open():
            return self._number(lib().prt_sequence_fork, seq)

    def truncate(self, seq: int, n_token: int) -> None:
        """Forgets all tokens of `seq` after the first `n_token`."""
        with self._open():
            check(lib().prt_sequence_truncate(self.handle, seq, n_token))

    def length(self, seq: int) -> int:
        with self._open():
            return self._number(lib().prt_sequence_length, seq)

    def free_sequence(self, seq: int) -> None:
        """Gives the pages back. After close() there is nothing to free, so that a generation may be dropped after its model."""
        with self._lock:
            if self.handle:
                check(lib().prt_sequence_free(self.handle, seq))

    def export_sequence(self, seq: int, write: Callable[[memoryview], object]) -> None:
        """Hands what the sequence holds to `write`, in order and some megabytes at a time: prt_sequence_export in pyruntime.h."""
        callback = _abi.prt_write_fn(self._transfer(write))
        with self._open():
            with self._interruptible():
                status = lib().prt_sequence_export(self.handle, seq, callback, None)
            self._raise_kept()
            check(status)

    def import_sequence(self, read: Callable[[memoryview], object]) -> int:
        """A new sequence of what export_sequence() wrote; `read` fills the memory that it is given. On an error there is none."""
        callback, seq = _abi.prt_read_fn(self._transfer(read)), ctypes.c_int64()
        with self._open():
            with self._interruptible():
                status = lib().prt_sequence_import(self.handle, callback, None, ctypes.byref(seq))
            try:
                self._raise_kept()
            except BaseException:
                if status == _abi.PRT_OK:
                    check(lib().prt_sequence_free(self.handle, seq.value))
                raise
            check(status)
        return seq.value

    def _transfer(self, use: Callable[[memoryview], object]) -> Callable[[Any, int, int], int]:
        """`use` as a callback: it gets the bytes; what it raises stops the call, and is raised when that returns."""

        def call(_user: Any, address: int, n: int) -> int:
            try:
                use(memoryview((ctypes.c_char * n).from_address(address)).cast("B"))
            except BaseException as error:
                self._error = error
            return int(self._error is not None)

        return call

    def _raise_kept(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _number(self, function: Any, *arguments: int) -> int:
        value = ctypes.c_int64()
        check(function(self.handle, *arguments, ctypes.byref(value)))
        return value.value

    # -- steps

    def step(
        self,
        entries: Sequence[Entry],
        *,
        logits: str = "none",
        targets: Int32Array | None = None,
        logprobs: bool = False,
        n_top: int = 0,
        stop: Callable[[], bool] | None = None,
    ) -> StepResult:
        """One forward pass. logits: "last" (one row per entry) or "all", targets [n_tok]: instead of what the entries say.
        stop: asked every 20 ms or so, from C code; True ends the step with AbortedError, and so does abort().
        On an error no sequence has changed. Ctrl-C stops the step too, and raises KeyboardInterrupt. A sampler whose token was drawn before
        that remembers it."""
        n_seq = len(entries)
        counts = np.array([len(e.tokens) for e in entries], dtype=np.int32)
        tokens = _int32([t for e in entries for t in e.tokens] if n_seq != 1 else entries[0].tokens, "tokens")
        result = StepResult()
        batch = _abi.prt_batch(
            n_seq=n_seq, seq=(ctypes.c_int64 * n_seq)(*[e.seq for e in entries]), n_token=_pointer(counts), tokens=_pointer(tokens)
        )
        n_logits = [e.n_logits if logits == "none" else 1 if logits == "last" else len(e.tokens) for e in entries]
        if any(n_logits):
            mask = np.zeros(len(tokens), dtype=np.uint8)
            for end, n in zip(np.cumsum(counts), n_logits, strict=True):
                mask[end - n : end] = 1
            result.logits = np.empty((sum(n_logits), self.n_vocab), dtype=np.float32)
            batch.logits_mask, batch.logits = _pointer(mask), _pointer(result.logits)
        if targets is None and any(e.targets is not None for e in entries):
            none = np.full(int(counts.max()), -1, dtype=np.int32)
            targets = np.concatenate([none[:n] if e.targets is None else e.targets for e, n in zip(entries, counts, strict=True)])
        if targets is not None:
            targets = _int32(targets, "targets")
            if len(targets) != len(tokens):
                raise InvalidArgumentError(f"targets has {len(targets)} entries, expected {len(tokens)}, one per token")
            result.target_logprobs = np.zeros(len(tokens), dtype=np.float32)
            batch.targets, batch.target_logprobs = _pointer(targets), _pointer(result.target_logprobs)
        if any(e.sampler for e in entries):
            sampled = np.empty(n_seq, dtype=np.int32)
            batch.samplers = (ctypes.c_void_p * n_seq)(*[e.sampler.handle.value if e.sampler else None for e in entries])
            batch.sampled = _pointer(sampled)
            if logprobs:
                result.logprobs = np.zeros(n_seq, dtype=np.float32)
                batch.sampled_logprobs = _pointer(result.logprobs)
            if n_top:
                result.top_ids = np.empty((n_seq, n_top), dtype=np.int32)
                result.top_logprobs = np.empty((n_seq, n_top), dtype=np.float32)
                batch.n_top, batch.top_ids, batch.top_logprobs = n_top, _pointer(result.top_ids), _pointer(result.top_logprobs)
        with self._open():
            self._asked = stop
            try:
                with self._interruptible():
                    status = lib().prt_session_step(self.handle, ctypes.byref(batch))
            finally:
                self._asked = None
            error = None
            if self._deferring != threading.get_ident():
                error, self._error = self._error, None
            if error is not None:
                if status == _abi.PRT_OK:  # it came when the step was past its last poll
                    for e in entries:
                        n_before = self._number(lib().prt_sequence_length, e.seq) - len(e.tokens)
                        check(lib().prt_sequence_truncate(self.handle, e.seq, n_before))
                raise error
            check(status)
        if any(e.sampler for e in entries):
            result.sampled = sampled.tolist()
        return result

    def abort(self) -> None:
        """Stops the step that is running, or else the next one, from any thread or from on_progress; that step raises AbortedError. A step
        that takes less than 20 ms may finish instead."""
        self._stop.set()

    def stats(self) -> dict[str, int | float]:
        """Counters and sizes, see prt_session_stats in pyruntime.h."""
        stats = _abi.prt_session_stats()
        with self._open():
            check(lib().prt_session_get_stats(self.handle, ctypes.byref(stats)))
        return {name: getattr(stats, name) for name, *_ in stats._fields_ if name != "struct_size"}

    def set_attention(self, attention: Attention) -> None:
        """How later steps attend; clears attention_stats()."""
        with self._open():
            check(lib().prt_session_set_attention(self.handle, ctypes.byref(attention.struct)))

    def attention_stats(self, *, layer: int = -1, kv_head: int = -1) -> dict[str, Any]:
        """Sums over the sparse decode rows since set_attention, see prt_attention_stats in pyruntime.h; -1: all."""
        stats = _abi.prt_attention_stats()
        with self._open():
            check(lib().prt_session_get_attention_stats(self.handle, layer, kv_head, ctypes.byref(stats)))
        result = {name: getattr(stats, name) for name, *_ in stats._fields_ if name not in ("struct_size", "reserved")}
        return {**result, "histogram": list(stats.histogram)}

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """In this block Ctrl-C, and whatever else a signal handler or on_progress raises, ends the step that it comes in, if it can, and is
        raised at the end of the block: what is written down about a step in between is never cut short."""
        error: BaseException | None = None
        try:
            with self._interruptible():
                self._deferring = threading.get_ident()
                try:
                    yield
                finally:
                    self._deferring = 0
        finally:
            error, self._error = self._error, None
            if error is not None:
                raise error

    @property
    def is_busy(self) -> bool:
        """Whether a call is in progress, in whatever thread."""
        return self._lock.locked()

    @property
    def interrupted(self) -> bool:
        """Whether deferring() will raise."""
        return self._error is not None

    def _poll(self, _user: Any) -> int:
        return int(self._stop.is_set() or self._error is not None or (self._asked is not None and self._asked()))

    def _progress(self, _user: Any, done: int, total: int) -> None:
        if self.on_progress:
            try:
                self.on_progress(done, total)
            except BaseException as error:  # it can't cross the C frames below: raised again when the step returns
                self._error = error

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """While C code runs, what a signal handler raises (Ctrl-C's KeyboardInterrupt, a SystemExit) can't cross it: it is kept, stops the
        step through the abort callback, and is raised again afterwards."""
        if self._deferring == threading.get_ident():  # around several steps already
            yield
            return
        running = threading.current_thread() is threading.main_thread()
        replaced: list[tuple[signal.Signals, Any, Any]] = []

        def keep(handler: Callable[[int, Any], Any]) -> Callable[[int, Any], None]:
            def run(number: int, frame: Any) -> None:
                try:
                    handler(number, frame)
                except BaseException as error:
                    if not running:
                        raise
                    self._error = error

            return run

        try:
            for number in _SIGNALS if running else ():
                handler = signal.getsignal(number)
                if callable(handler):
                    replaced.append((number, handler, keep(handler)))
                    signal.signal(number, replaced[-1][2])
            yield
        finally:
            running = False
            for number, before, ours in replaced:
                if signal.getsignal(number) is ours:  # else the handler itself has put another one in place
                    signal.signal(number, before)
            self._stop.clear()


def _int32(values: Any, what: str) -> Int32Array:
    try:
        wide = np.asarray(values).reshape(-1)
    except ValueError:
        wide = np.empty(1, dtype=object)
    if wide.size and wide.dtype.kind not in "iu":
        raise InvalidArgumentError(f"{what} must be integers of 32 bits, got {type(values).__name__} of {wide.dtype}")
    if wide.size and (wide.min() < -1 or wide.max() > 2**31 - 1):
        raise InvalidArgumentError(f"{what} holds {wide[(wide < -1) | (wide > 2**31 - 1)][0]}, which is not a token id")
    return np.ascontiguousarray(wide, dtype=np.int32)


_POINTERS: dict[Any, Any] = {
    np.dtype(np.int32): ctypes.POINTER(ctypes.c_int32),
    np.dtype(np.float32): ctypes.POINTER(ctypes.c_float),
    np.dtype(np.uint8): ctypes.POINTER(ctypes.c_uint8),
}


def _pointer(array: np.ndarray[Any, Any]) -> Any:
    return array.ctypes.data_as(_POINTERS[array.dtype])
