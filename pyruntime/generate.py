"""The sampling loop: requests join a batch when their pages fit, and leave it when they are done."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from . import _abi
from .errors import ContextLengthError, OutOfPagesError
from .kept import KeptSequence
from .sampling import SamplingParams
from .session import Entry, Sampler, Session, StepResult
from .stop import StopMatcher
from .tokenizer import Tokenizer


@dataclass(slots=True)
class TokenLogprob:
    """One chosen token, its log-probability under the model (before temperature and penalties) and the likeliest alternatives."""

    token_id: int
    text: str
    logprob: float
    top: list[tuple[int, str, float]] = field(default_factory=list)


@dataclass(slots=True)
class Usage:
    """Token counts of one completion. cached_tokens: those of the prompt that were in the KV cache already."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(slots=True)
class Timings:
    """Seconds and rates of one completion; a batch shares its steps, so the rates of its members do not add up.

    time_to_first_token: from the call.  prefill_tok_s: prompt tokens, without the cached ones, over that time.
    decode_tok_s: tokens after the first over the time they took; 0 with fewer than two tokens.
    """

    time_to_first_token: float = 0.0
    total: float = 0.0
    prefill_tok_s: float = 0.0
    decode_tok_s: float = 0.0


@dataclass(slots=True)
class Completion:
    """What generate returns for one prompt.

    finish_reason: "stop" (end token, stop token or stop string), "length" (max_tokens or the context is full), or "abort" (of a stream:
        Ctrl-C, an error, or nobody has read on).
    stop_reason: the stop string or the token id that ended it; None for the model's own end token.
    token_ids: all sampled tokens, the ending one included.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: str | int | None
    seed: int
    usage: Usage
    timings: Timings
    logprobs: list[TokenLogprob] | None = None

    def __str__(self) -> str:
        return self.text


class Request:
    """One prompt on its way through the loop."""

    def __init__(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        tokenizer: Tokenizer,
        *,
        eos_ids: Sequence[int],
        n_vocab: int,
        max_context: int,
        longest_context: int,
        kept: KeptSequence | None = None,
    ) -> None:
        self.prompt, self.params, self.tokenizer, self.kept = prompt, params, tokenizer, kept
        if len(prompt) >= max_context:
            larger = f", or load the model with a larger max_context (up to {longest_context})" if max_context < longest_context else ""
            raise ContextLengthError(
                f"the prompt has {len(prompt)} tokens, max_context is {max_context} and at least one new token must fit: "
                f"shorten the prompt{larger}"
            )
        room = max_context - len(prompt)
        self.max_tokens = min(params.max_tokens or room, room)
        self.seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(7), "little")
        self.sampler = Sampler(params, n_vocab, seed=self.seed)
        self.sampler.accept(prompt, is_prompt=True)
        self.eos_ids = frozenset(eos_ids)
        self.stop_ids = frozenset(params.stop_token_ids)
        if params.min_tokens:  # until then, nothing that would end it; take() lifts the ban
            banned = {t: -float("inf") for t in {*self.eos_ids, *self.stop_ids} if t < n_vocab}
            self.sampler.set_bias({**params.logit_bias, **banned})
        self.detokenizer = tokenizer.stream(continuation=True)
        self.matcher = StopMatcher(params.stop)
        self.seq = self.n_cached = 0
        self.token_ids: list[int] = []
        self.pieces: list[str] = []
        self.logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.started = time.perf_counter()
        self.first_token = self.ended = 0.0

    @property
    def pages(self) -> int:
        """KV pages that the request may come to need."""
        return -(-(len(self.prompt) + self.max_tokens) // _abi.PAGE_TOKENS)

    def take(self, token: int) -> str:
        """Accounts for a sampled token; returns the text that is now certain."""
        now = time.perf_counter()
        self.first_token = self.first_token or now
        self.ended = now
        self.token_ids.append(token)
        if len(self.token_ids) == self.params.min_tokens:
            self.sampler.set_bias(self.params.logit_bias)
        ends = (token in self.eos_ids and not self.params.ignore_eos) or token in self.stop_ids
        piece, matched = ("", None) if ends else self.matcher.push(self.detokenizer.push(token))
        if ends:
            self.finish_reason = "stop"
            self.stop_reason = token if token in self.stop_ids else None
        elif matched is not None:
            self.finish_reason, self.stop_reason = "stop", matched
        elif len(self.token_ids) >= self.max_tokens:
            self.finish_reason = "length"
        if self.finish_reason and matched is None:
            tail, matched = self.matcher.push(self.detokenizer.finish())
            piece += tail
            if matched is not None:
                self.finish_reason, self.stop_reason = "stop", matched
            else:
                piece += self.matcher.finish()
        if piece:
            self.pieces.append(piece)
        return piece

    def record(self, token: int, logprob: float, top: list[tuple[int, float]]) -> None:
        if self.logprobs is not None:
            name = self.tokenizer.id_to_text
            self.logprobs.append(TokenLogprob(token, name(token), logprob, [(i, name(i), p) for i, p in top if i >= 0]))

    def completion(self) -> Completion:
        n = len(self.token_ids)
        first, total = (self.first_token - self.started, self.ended - self.started) if n else (0.0, 0.0)
        decode = self.ended - self.first_token
        return Completion(
            text="".join(self.pieces),
            token_ids=self.token_ids,
            finish_reason=self.finish_reason or "abort",
            stop_reason=self.stop_reason,
            seed=self.seed,
            usage=Usage(len(self.prompt), n, self.n_cached),
            timings=Timings(
                first,
                total,
                (len(self.prompt) - self.n_cached) / first if first > 0 else 0.0,
                (n - 1) / decode if n > 1 and decode > 0 else 0.0,
            ),
            logprobs=self.logprobs,
        )


class PageBudget:
    """Pages of a session that no running request may come to need; shared by the calls that run at the same time."""

    def __init__(self, n_page: int) -> None:
        self.n_page = self.free = n_page
        self._lock = threading.Lock()

    def take(self, n: int) -> bool:
        with self._lock:
            if n > self.free:
                return False
            self.free -= n
            return True

    def give(self, n: int) -> None:
        with self._lock:
            self.free += n


def run(session: Session, requests: Sequence[Request], budget: PageBudget) -> Iterator[tuple[int, str]]:
    """Yields (index of the request, new text) as text becomes certain, until all requests are done.

    A request joins when the pages it may come to need are free, so a running one never fails for lack of them.
    """
    waiting = deque(range(len(requests)))
    active: list[int] = []
    try:
        while waiting or active:
            fresh: list[int] = []
            while waiting and _join(session, requests[waiting[0]], budget):
                fresh.append(waiting.popleft())
            order = active = fresh + active
            if not order:
                raise OutOfPagesError(
                    f"the request may need {requests[waiting[0]].pages} KV pages, {budget.free} of {budget.n_page} are not spoken for: "
                    "give max_tokens, or wait until other calls on this model are done"
                )
            entries = [
                Entry(r.seq, r.prompt[r.n_cached :] if i in fresh else r.token_ids[-1:], r.sampler) for i in order for r in [requests[i]]
            ]
            n_top = max((requests[i].params.logprobs or 0 for i in order), default=0)
            result = session.step(entries, logprobs=any(requests[i].logprobs is not None for i in order), n_top=n_top)
            for row, index in enumerate(order):
                request = requests[index]
                _record(request, result, row)
                piece = request.take(result.sampled[row])
                if request.finish_reason:
                    _leave(session, request, budget)
                if piece or request.finish_reason:
                    yield index, piece
            active = [i for i in order if not requests[i].finish_reason]
    finally:
        for request in requests:
            if request.seq:
                _leave(session, request, budget)


def _join(session: Session, request: Request, budget: PageBudget) -> bool:
    """Gives the request a sequence, if its pages are free; those of a kept sequence are already spoken for."""
    kept = request.kept
    if not budget.take(request.pages - (kept.pages if kept else 0)):
        return False
    try:
        request.seq, request.n_cached = kept.take(request.prompt) if kept else (session.create_sequence(), 0)
    except BaseException:
        budget.give(request.pages)
        raise
    return True


def _leave(session: Session, request: Request, budget: PageBudget) -> None:
    seq, request.seq = request.seq, 0
    if request.kept:
        request.kept.put(seq, [*request.prompt, *request.token_ids])
    else:
        session.free_sequence(seq)
    budget.give(request.pages - (request.kept.pages if request.kept else 0))


def _record(request: Request, result: StepResult, row: int) -> None:
    if request.logprobs is None or result.logprobs is None:
        return
    top: list[tuple[int, float]] = []
    if result.top_ids is not None and result.top_logprobs is not None:
        k = request.params.logprobs or 0
        top = list(zip(result.top_ids[row, :k].tolist(), result.top_logprobs[row, :k].tolist(), strict=True))
    request.record(result.sampled[row], float(result.logprobs[row]), top)
