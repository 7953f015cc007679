"""pyruntime.Model: a model on a device, ready to generate."""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from . import catalog, download, env, kv_file
from ._abi import PAGE_TOKENS
from ._lib import devices
from .attention import Attention
from .batch import Call, pages_for
from .chat import ChatTemplate
from .checkpoint import Checkpoint, open_checkpoint
from .config import ModelConfig
from .engine import MAX_QUEUE, Engine
from .errors import ContextLengthError, DeviceError, InvalidArgumentError, OutOfMemoryError, UnsupportedModelError
from .generate import Completion, Request, fresh_seed
from .sampling import SamplingParams
from .session import DTYPES, Entry, FloatArray, Session, Weights
from .stream import AsyncStream, Stream, finished
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .constraint import Constraint, Grammars

Prompt = str | Sequence[int]
Completions = Completion | list[Completion] | list[list[Completion]]
_KEEP_FREE = 1 << 30  # bytes of memory that sizing by default leaves to others
# Rows of prompts in steps that also decode. On a CPU 128 are read as fast as 512 (274 and 246 tok/s; 64: 183; SmolLM2-135M, 2 busy cores,
# beside 4 decoding rows), in steps of a quarter of the time. On a GPU half of a full chunk, not measured.
_MIXED_ROWS = {"cpu": 128, "cuda": 512}
_POOL_SEQUENCES = 8  # sequences of full length that the page pool holds, memory permitting


class Model:
    """A Llama-family model with its tokenizer, chat template and KV cache.

    name: catalogue name ("smollm2-135m"), hub repository ("org/name"), folder, or .gguf / .safetensors file.
    device: "auto" (a usable GPU, else the CPU), "cpu", "cuda" or "cuda:N". It never changes silently; see the `device` attribute.
    dtype: of weights and KV: "auto" (the file's own; bf16 for quantised files), "bf16", "f16" or "f32".
    max_context: most tokens of one sequence, prompt included; None: the model's own, or what fits the memory with 1 GiB left.
    attention: how decoded tokens attend (prompts are always dense): "full"; "tactic", to the clusters of keys that reach a share p of the
        softmax mass (arXiv 2502.12216); with options "tactic:p=0.75" or {"policy": "tactic", "p": 0.75, ...}. See set_attention.
    prefix_cache: tokens. While the KV cache holds no more than that, what was read and generated stays in it for later prompts that begin
        alike; then the least recently used goes. 0: nothing stays. None: two full contexts on a CPU, where memory is only taken as it is
        used, and the whole KV cache on a GPU.
    threads: CPU threads; None: PYRUNTIME_THREADS, else one per physical core. Without effect on a GPU.
    max_queue: calls that may wait to begin; one more raises QueueFullError.
    progress: show download, loading and the reading of long prompts on stderr.  offline: use only what is on disk.

    Raises ModelNotFoundError, ModelFileError, UnsupportedModelError, DeviceError, OutOfMemoryError, InvalidArgumentError.
    Use it as a context manager, or call close(), to free its memory at once. Threads and coroutines may share it: every step of the model
    serves all calls that are in progress, and where the KV cache is too small for them (8 sequences of full length fit, memory
    permitting), the youngest wait.
    """

    def __init__(
        self,
        name: str | os.PathLike[str],
        *,
        device: str = "auto",
        dtype: str = "auto",
        max_context: int | None = None,
        attention: str | Mapping[str, Any] | Attention = "full",
        threads: int | None = None,
        prefix_cache: int | None = None,
        max_queue: int = MAX_QUEUE,
        progress: bool = False,
        offline: bool = False,
    ) -> None:
        self.attention = Attention.parse(attention)
        if dtype not in ("auto", *DTYPES):
            raise InvalidArgumentError(f"dtype is {dtype!r}, expected 'auto', {', '.join(map(repr, DTYPES))}")
        many = 2**31 - 1
        for what, value, least, most in (
            ("max_context", max_context, 1, many),
            ("threads", threads, 1, 1024),
            ("prefix_cache", prefix_cache, 0, many),
            ("max_queue", max_queue, 1, many),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most):
                raise InvalidArgumentError(f"{what} is {value!r}, expected an integer from {least} to {most}")
        self.device = _pick_device(device)
        source = catalog.resolve(name if isinstance(name, (str, Path)) or not isinstance(name, os.PathLike) else os.fspath(name))
        if source.note:
            print(f"pyruntime: {source.note}", file=sys.stderr)
        self.name = source.name
        self.path = download.fetch(source, progress=progress, offline=offline)
        checkpoint = open_checkpoint(self.path)
        self.config: ModelConfig = checkpoint.config
        self.dtype = self.config.dtype if dtype == "auto" else dtype
        if max_context is not None and max_context > self.config.context_length:
            raise ContextLengthError(f"max_context is {max_context}, {self.name} is made for {self.config.context_length} tokens")
        self.generation_config: dict[str, Any] = checkpoint.generation_config
        self.tokenizer = _open_tokenizer(checkpoint)
        if self.tokenizer.n_vocab > self.config.n_vocab:
            raise UnsupportedModelError(
                f"{self.path}: the tokenizer has {self.tokenizer.n_vocab} tokens, the model's embedding {self.config.n_vocab} rows"
            )
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys((*checkpoint.eos_ids, *self.tokenizer.eos_ids)))
        self._template: ChatTemplate | None = None
        self._open_template: Callable[[], ChatTemplate] = _template_opener(checkpoint)
        threads = threads or env.threads() or 0
        self._weights = Weights(self.config, dtype=self.dtype, device=self.device)
        self._weights.load(checkpoint.tensors, threads=min(8, os.cpu_count() or 1), progress=_progress_line if progress else None)
        checkpoint.close()
        self.max_context, n_page = self._size(max_context)
        self._session = Session(self._weights, max_context=self.max_context, n_page=n_page, threads=threads, cpu_isa=env.cpu_isa())
        self._engine = Engine(
            self._session,
            mixed_rows=_MIXED_ROWS["cpu" if self.device == "cpu" else "cuda"],
            max_queue=max_queue,
            prefix_pages=self._prefix_pages(prefix_cache, n_page),
        )
        self._grammars: Grammars | None = None
        self._fingerprint: str | None = None
        try:
            self.set_attention(self.attention)
        except BaseException:
            self.close()
            raise
        if progress and sys.stderr.isatty():
            self._session.on_progress = self._engine.on_progress = _prefill_line

    def _size(self, max_context: int | None) -> tuple[int, int]:
        """(max_context, pages of the pool) that fit the free memory with 1 GiB left, the index of sparse attention included."""
        c = self.config
        page_bytes = 2 * c.n_layer * c.h_kv * c.d_head * PAGE_TOKENS * (4 if self.dtype == "f32" else 2)
        page_bytes += self._weights.attention_page_bytes(self.attention)
        free = next(d.memory_free for d in devices() if d.id.decode() == self.device)
        fit = max(0, free - _KEEP_FREE) // page_bytes
        wanted = -(-(max_context or c.context_length) // PAGE_TOKENS)
        if fit < wanted and (max_context is not None or fit == 0):
            raise OutOfMemoryError(
                f"max_context {max_context or c.context_length} needs {wanted * page_bytes >> 20} MiB of KV cache; {free >> 20} MiB are "
                f"free on {self.device}, 1024 of which are kept free: the largest max_context that fits is {fit * PAGE_TOKENS}"
            )
        context = max_context or min(c.context_length, fit * PAGE_TOKENS)
        return context, min(fit, _POOL_SEQUENCES * -(-context // PAGE_TOKENS))

    def _prefix_pages(self, prefix_cache: int | None, n_page: int) -> int:
        if prefix_cache is not None:
            return min(prefix_cache // PAGE_TOKENS, n_page)
        return n_page if self.device != "cpu" else min(n_page, 2 * pages_for(self.max_context))

    # -- text and tokens

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. add_special_tokens: with the begin token, where the model uses one."""
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def detokenize(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of token ids."""
        return self.tokenizer.decode(self._checked(ids, "ids"), skip_special=skip_special)

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **template: Any) -> str:
        """The prompt text that the model's own chat template makes of the messages. template: extra variables for the template."""
        return self._chat_template().render(messages, add_generation_prompt=add_generation_prompt, **template)

    def chat_ids(self, messages: Sequence[Mapping[str, Any]], **template: Any) -> list[int]:
        """The token ids that chat() reads. Control tokens spelled out in a message stay text. template: tools, and extra variables."""
        text = self._chat_template().render(messages, literal=self.tokenizer.special_texts, **template)
        return self.tokenizer.encode_chat(text)

    @property
    def knows_tools(self) -> bool:
        """Whether the chat template has a place for tools."""
        return "tools" in self._chat_template().source

    def _chat_template(self) -> ChatTemplate:
        if self._template is None:
            self._template = self._open_template()
        return self._template

    # -- generation

    @overload
    def generate(self, prompt: Prompt, *, stream: Literal[False] = False, n: None = None, **options: Any) -> Completion: ...
    @overload
    def generate(self, prompt: list[str] | list[list[int]], *, stream: Literal[False] = False, **options: Any) -> list[Completion]: ...
    @overload
    def generate(self, prompt: Prompt, *, stream: Literal[False] = False, n: int, **options: Any) -> list[Completion]: ...
    @overload
    def generate(self, prompt: Prompt, *, stream: Literal[True], **options: Any) -> Stream: ...

    def generate(
        self,
        prompt: Any,
        *,
        stream: bool = False,
        cancel: threading.Event | None = None,
        **options: Any,
    ) -> Completions | Stream:
        """Continues a prompt (text or token ids), or a list of prompts as one batch. From several threads at once, too.

        stream: return an iterator of text increments (see Stream) instead of a Completion.
        cancel: once this event is set, from any thread, the call returns what was made, with finish_reason "abort".
        options: the fields of SamplingParams (max_tokens, temperature, top_p, top_k, min_p, seed, stop, logprobs, n, ...), over the
            defaults of the model's generation_config. Without max_tokens it goes on until the end token or until the context is full.
            With n, there is a list of n Completions in place of each.

        Raises ContextLengthError when a prompt does not fit, QueueFullError when too many calls wait already, InvalidArgumentError for
        anything wrong with the arguments.
        """
        self._check_open()
        prompts, shape = self._requests(prompt, options, stream)
        if stream:
            return Stream(self._engine, prompts[0], cancel=cancel)
        call = Call(prompts, cancelled=cancel)
        self._engine.submit(call)
        try:
            self._engine.wait(call)
        finally:
            self._engine.cancel(call)
        return shape(prompts)

    @overload
    async def agenerate(self, prompt: Prompt, *, stream: Literal[False] = False, n: None = None, **options: Any) -> Completion: ...
    @overload
    async def agenerate(
        self, prompt: list[str] | list[list[int]], *, stream: Literal[False] = False, **options: Any
    ) -> list[Completion]: ...
    @overload
    async def agenerate(self, prompt: Prompt, *, stream: Literal[False] = False, n: int, **options: Any) -> list[Completion]: ...
    @overload
    async def agenerate(self, prompt: Prompt, *, stream: Literal[True], **options: Any) -> AsyncStream: ...

    async def agenerate(
        self, prompt: Any, *, stream: bool = False, cancel: threading.Event | None = None, **options: Any
    ) -> Completions | AsyncStream:
        """generate for asyncio: `await model.agenerate(...)`, or `async for piece in await model.agenerate(..., stream=True)`.

        Cancelling the task ends the generation.
        """
        self._check_open()
        prompts, shape = self._requests(prompt, options, stream)
        if stream:
            return AsyncStream(self._engine, prompts[0], cancel=cancel)
        await finished(self._engine, prompts, cancel=cancel)
        return shape(prompts)

    def chat(self, messages: Sequence[Mapping[str, Any]], *, stream: bool = False, **options: Any) -> Any:
        """Answers a conversation [{"role": "user", "content": "..."}] through the model's chat template; options as in generate.

        Control tokens spelled out in a message stay text: a user cannot end their turn with "<|im_end|>".
        """
        ids = self.chat_ids(messages)
        return self.generate(ids, stream=True, **options) if stream else self.generate(ids, **options)

    async def achat(self, messages: Sequence[Mapping[str, Any]], *, stream: bool = False, **options: Any) -> Any:
        """chat for asyncio, as agenerate is generate."""
        ids = self.chat_ids(messages)
        return await (self.agenerate(ids, stream=True, **options) if stream else self.agenerate(ids, **options))

    def n_cached(self, ids: Sequence[int]) -> int:
        """How many first tokens of a prompt are in the KV cache now, from earlier calls, and need not be read again."""
        return self._engine.n_cached(list(ids))

    def clear_cache(self) -> None:
        """Gives up all pages that are kept for later prompts."""
        self._engine.clear_prefixes()

    def save(self, path: str | os.PathLike[str], prompt: Prompt) -> int:
        """Writes the KV of a text (or token ids) to a file, so that load() spares reading it again; returns for how many tokens.

        What earlier calls left in the KV cache is taken from there, with the clusters of sparse attention; the rest is read first. If only
        the last token is missing, it is left out: it will be read with what follows. The file replaces an older one when it is complete.
        Other calls wait meanwhile. Its size is stats()["page_bytes"] for each 64 tokens, and docs/adr/0017 says what is in it.

        Raises ContextLengthError for a text that does not fit, InvalidArgumentError for a file that cannot be written.
        """
        self._check_open()
        ids = self._fitting(self._prompt_ids(prompt))
        return kv_file.save(self._engine, Path(path), ids, self._origin())

    def load(self, path: str | os.PathLike[str]) -> list[int]:
        """Puts the KV of a file that save() wrote into the KV cache and returns the ids of its tokens. A later prompt that begins with them
        does not read them again (usage.cached_tokens), and its answer is the one that it would have had where they were saved: to the bit
        on a machine of the same kind under the same attention policy.

        Raises InvalidArgumentError for a file of another model, dtype or version, one that is not as it was written, or one that is larger
        than the prefix_cache; OutOfPagesError where it does not fit.
        """
        self._check_open()
        return kv_file.load(self._engine, Path(path), self._origin(), n_vocab=self.config.n_vocab, max_context=self.max_context)

    # -- scoring

    def logits(self, ids: Sequence[int]) -> FloatArray:
        """Next-token logits after every token: float32 [n_tokens, n_vocab]."""
        tokens = self._fitting(self._checked(ids, "ids"))
        result: FloatArray | None = self._step(tokens, logits="all").logits
        assert result is not None
        return result

    def perplexity(self, text: str | Sequence[int], *, max_tokens: int | None = None) -> float:
        """exp of the mean negative log-likelihood of every token but the first. No begin token is added.

        A text (or token ids) longer than max_context is scored in consecutive windows of that size, the first token of each excepted.
        max_tokens: score only that many tokens from the start.
        """
        ids = self.tokenizer.encode(text, add_special_tokens=False) if isinstance(text, str) else self._checked(text, "text")
        if max_tokens is not None:
            if max_tokens < 2 or max_tokens > len(ids):
                raise InvalidArgumentError(f"max_tokens is {max_tokens}, the text has {len(ids)} tokens: expected 2 to {len(ids)}")
            ids = ids[:max_tokens]
        if len(ids) < 2:
            raise InvalidArgumentError(f"perplexity needs at least 2 tokens, the text has {len(ids)}")
        total, count = 0.0, 0
        for begin in range(0, len(ids) - 1, self.max_context):
            window = np.asarray(ids[begin : begin + self.max_context], dtype=np.int32)
            if len(window) < 2:
                break
            scores = self._step(window, targets=np.append(window[1:], np.int32(-1))).target_logprobs
            assert scores is not None
            total -= float(scores[:-1].sum(dtype=np.float64))
            count += len(window) - 1
        return math.exp(total / count)

    # -- the rest

    def set_attention(self, attention: str | Mapping[str, Any] | Attention) -> None:
        """Another attention policy for the tokens decoded from now on, by all calls on this model.

        Options of "tactic": p (share of the softmax mass to reach, 0.9), cluster (mean keys of a cluster, 16), segment (keys clustered
        together, 2048; 0: all at once, as published), iterations (of K-means, at most), estimator ("moment", or "fit" as published), tail
        (what was not selected counts by its mean), sinks and window (first and last rows that are always attended to), min_context (dense
        below), dense_layers (first layers that stay dense), seed, measure (stats() then has the true mass; as slow as dense attention),
        selected (for benchmarks: the share of the rows that each query head chooses, whatever their mass). Other policies:
        "recycled", "tactic_recycled", "streaming", "quest", "token_select", "oracle"; docs/long-context.md has their options.
        "streaming:evict=1" gives tokens up as it goes on, so that max_tokens may be more than max_context has room for.
        Raises InvalidArgumentError, UnsupportedModelError, or OutOfMemoryError where the page pool left no room for the index of "tactic"
        (a model that is opened with it does leave that room); nothing has changed then.
        """
        parsed = Attention.parse(attention)
        self._check_open()
        self._engine.set_attention(parsed)
        self.attention = parsed

    def stats(self) -> dict[str, Any]:
        """Pages, memory and token counters of this model's session; sizes in bytes, times in seconds. With a sparse policy also "sparsity":
        density after the union over query heads (all, by layer, by layer and kv head), share of rows read, estimated and true mass."""
        self._check_open()
        engine, session = self._engine.stats(), self._session.stats()
        rate = {
            f"{kind}_tok_s": session[f"n_{kind}_token"] / session[f"{kind}_seconds"] if session[f"{kind}_seconds"] else 0.0
            for kind in ("prefill", "decode")
        }
        result: dict[str, Any] = {
            "device": self.device,
            "dtype": self.dtype,
            "attention": str(self.attention),
            "weight_bytes": self._weights.nbytes,
        }
        if self.attention.policy != "full":
            from .evaluate import sparsity

            result["sparsity"] = sparsity(self._session, self.config.n_layer, self.config.h_kv)
        return {**result, **engine, **session, **rate}

    def close(self) -> None:
        """Frees weights and KV cache. Harmless when called twice."""
        self._session.close()
        self._weights.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<pyruntime.Model {self.name} on {self.device}, {self.dtype}, max_context {self.max_context}>"

    def _origin(self) -> kv_file.Origin:
        """What files with rows of this model say about it."""
        if self._fingerprint is None:
            with open_checkpoint(self.path) as checkpoint:
                self._fingerprint = kv_file.fingerprint(checkpoint)
        name = self.path.name if Path(self.name).exists() else self.name  # where it lies is nobody else's business
        return kv_file.Origin(name, self._fingerprint, self.dtype)

    def _check_open(self) -> None:
        if not self._session.handle:
            raise InvalidArgumentError(f"the model {self.name} is closed")

    def _open_session(self) -> Session:
        """The session, for sequences of one's own: what is kept for later prompts makes room for them."""
        self._check_open()
        self._engine.clear_prefixes()
        return self._session

    def _step(self, tokens: Any, **wanted: Any) -> Any:
        self._check_open()
        with self._engine.borrow(pages_for(len(tokens))) as session:
            seq = session.create_sequence()
            try:
                return session.step([Entry(seq, tokens)], **wanted)
            finally:
                session.free_sequence(seq)

    def _requests(
        self, prompt: Any, options: Mapping[str, Any], stream: bool
    ) -> tuple[list[list[Request]], Callable[[list[list[Request]]], Completions]]:
        """The requests of a call, the samples of each prompt together, and what makes its result of them."""
        is_list = isinstance(prompt, (list, tuple)) and (not prompt or not _is_id(prompt[0]))
        params = SamplingParams.from_options(self.generation_config, options)
        n_vocab = self.config.n_vocab
        for token in (*params.stop_token_ids, *params.logit_bias):
            if token >= n_vocab:
                raise InvalidArgumentError(
                    f"stop_token_ids or logit_bias names token {token}, which is outside the vocabulary of {n_vocab}"
                )
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > n_vocab:
                raise InvalidArgumentError(f"{name} is {getattr(params, name)}, more than the vocabulary of {n_vocab}")
        if is_list and stream:
            raise InvalidArgumentError("stream=True takes one prompt, not a list")
        seed = fresh_seed() if params.seed is None else params.seed
        n = params.n or 1
        prompts = []
        for p in prompt if is_list else [prompt]:
            ids = self._prompt_ids(p)
            prompts.append([self._request(ids, params, (seed + i) % 2**64) for i in range(n)])
            seed = fresh_seed() if params.seed is None else seed

        def shape(made: list[list[Request]]) -> Completions:
            done = [[r.completion() for r in samples] for samples in made]
            if params.n is None:
                return [samples[0] for samples in done] if is_list else done[0][0]
            return done if is_list else done[0]

        return prompts, shape

    def _request(self, ids: list[int], params: SamplingParams, seed: int | None = None) -> Request:
        return Request(
            ids,
            params,
            self.tokenizer,
            seed=seed,
            eos_ids=self.eos_ids,
            n_vocab=self.config.n_vocab,
            max_context=self.max_context,
            longest_context=self.config.context_length,
            endless=bool(self.attention.struct.evict),
            constraint=self._constraint(params),
        )

    def _constraint(self, params: SamplingParams) -> Constraint | None:
        if params.json_schema is None and params.regex is None and params.grammar is None:
            return None
        if self._grammars is None:
            from .constraint import Grammars

            self._grammars = Grammars(self.tokenizer, n_vocab=self.config.n_vocab, eos_ids=self.eos_ids)
        return self._grammars.constraint(params)

    def _prompt_ids(self, prompt: Any) -> list[int]:
        ids = self.tokenize(prompt) if isinstance(prompt, str) else self._checked(prompt, "prompt")
        if not ids:
            raise InvalidArgumentError("the prompt is empty: it needs at least one token")
        return ids

    def _fitting(self, ids: list[int]) -> list[int]:
        if not 1 <= len(ids) <= self.max_context:
            raise ContextLengthError(f"{len(ids)} tokens were given, expected 1 to {self.max_context} (max_context)")
        return ids

    def _checked(self, ids: Any, what: str) -> list[int]:
        if isinstance(ids, np.ndarray) and ids.ndim == 1:
            ids = ids.tolist()
        if not isinstance(ids, (list, tuple)):
            raise InvalidArgumentError(f"{what} is {type(ids).__name__}, expected text or a list of token ids")
        for i, token in enumerate(ids):
            if not _is_id(token) or not 0 <= token < self.config.n_vocab:
                raise InvalidArgumentError(f"{what}[{i}] is {token!r}, expected a token id from 0 to {self.config.n_vocab - 1}")
        return [int(t) for t in ids]


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _pick_device(wanted: str) -> str:
    found = devices()
    ids = [d.id.decode() for d in found]
    gpus = [d for d in found if d.is_cuda]
    if wanted == "auto":
        for gpu in gpus:
            if gpu.usable:
                return str(gpu.id.decode())
        if gpus:
            print(f"pyruntime: running on the CPU: {gpus[0].name.decode()} cannot be used, {gpus[0].note.decode()}", file=sys.stderr)
        return "cpu"
    if wanted == "cpu":
        return "cpu"
    if isinstance(wanted, str) and (wanted == "cuda" or wanted.startswith("cuda:")):
        device = "cuda:0" if wanted == "cuda" else wanted
        for gpu in gpus:
            if gpu.id.decode() == device and gpu.usable:
                return device
            if gpu.id.decode() == device:
                raise DeviceError(f"device {wanted!r}: {gpu.name.decode()} cannot be used, {gpu.note.decode()}")
        from ._lib import build_info

        reason = build_info().get("cuda_reason")
        why = f"this build has no CUDA ({reason})" if reason else "no NVIDIA driver or no such GPU was found"
        raise DeviceError(f"device {wanted!r}: {why}; available: {', '.join(ids)}")
    raise InvalidArgumentError(f"device is {wanted!r}, expected 'auto', 'cpu', 'cuda' or 'cuda:N'")


def _open_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    if checkpoint.kind == "gguf":
        if checkpoint.gguf_tokenizer is None:
            raise UnsupportedModelError(f"{checkpoint.path}: the file has no tokenizer")
        return Tokenizer.from_gguf(checkpoint.gguf_tokenizer, source=str(checkpoint.path))
    files = checkpoint.tokenizer_files
    if files.tokenizer is None:
        raise UnsupportedModelError(f"{checkpoint.path}: there is no tokenizer.json; other tokenizer files are not read")
    return Tokenizer.from_file(files.tokenizer, files.tokenizer_config)


def _template_opener(checkpoint: Checkpoint) -> Callable[[], ChatTemplate]:
    """Reads the chat template on first use: jinja2 is slow to import and most models are used without it."""
    if checkpoint.kind == "gguf":
        meta = checkpoint.gguf_tokenizer
        assert meta is not None
        # The template needs the names of four tokens; the rest of the vocabulary is 15 MB of strings that would live as long as the model.
        named = {meta.bos_id, meta.eos_id, meta.unk_id, meta.pad_id}
        names = [text if i in named else "" for i, text in enumerate(meta.tokens)]
        small = replace(meta, tokens=names, merges=[], token_types=[], scores=None)
        return lambda: ChatTemplate.from_gguf(small, source=str(checkpoint.path))
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    return lambda: ChatTemplate.from_folder(folder)


def _progress_line(done: int, total: int) -> None:
    if sys.stderr.isatty() or done == total:
        end = "\n" if done == total else ""
        print(f"\rloading {done}/{total} tensors", end=end, file=sys.stderr, flush=True)


def _prefill_line(done: int, total: int) -> None:
    if total > 1024:
        text = f"reading the prompt: {done}/{total} tokens" if done < total else ""
        print(f"\r{text:50}\r" if done == total else f"\r{text}", end="", file=sys.stderr, flush=True)
