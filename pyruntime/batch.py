"""The batch: which requests run, what every step reads, and what becomes of its results.

Bookkeeping without threads: the engine calls it, one call at a time.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ._abi import PAGE_TOKENS
from .errors import AbortedError, OutOfPagesError, PyruntimeError
from .generate import Request, Top
from .prefix import PrefixCache
from .session import Entry, Session, StepResult

MAX_RUNNING = 256  # sequences at a time: what a GPU's page table holds; more would not make a step more efficient
RUN_AHEAD = 64  # pieces of text that a stream may have unread before it pauses
_SCORED_ROWS = 64  # rows of a prompt at once if their logits are wanted: 64 x 128K x 4 bytes = 33 MB


class Call:
    """What one caller waits for: the requests of a prompt, of its samples, or of a list of prompts.

    streams: its text is wanted piece by piece; `news` then has (index of the request, piece).
    cancelled: set, from any thread, it ends the call at the next step; what was made stays in the requests.
    listener: called after a step that brought news, for a caller that does not wait in a thread; see Engine.poll.
    error: raised to the caller; the requests got no further.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[Request]],
        *,
        streams: bool = False,
        cancelled: threading.Event | None = None,
        listener: Callable[[], None] | None = None,
    ) -> None:
        """prompts: for each prompt its samples, of which the first reads it."""
        self.waiting: deque[Run] = deque()
        index = itertools.count()
        for samples in prompts:
            first, *others = [Run(self, next(index), request) for request in samples]
            first.followers = others
            self.waiting.append(first)
        self.requests = [request for samples in prompts for request in samples]
        self.n_open = len(self.requests)
        self.n_running = 0
        self.begun = False
        self.streams, self.listener = streams, listener
        self.cancelled = cancelled or threading.Event()
        self.news: deque[tuple[int, str]] = deque()
        self.error: BaseException | None = None
        self.is_waited = False  # a thread waits for it, or leads
        self.turn = threading.Condition(threading.Lock())  # what it waits for; of the engine's lock, from submit() on

    @property
    def has_news(self) -> bool:
        return bool(self.news) or self.n_open == 0

    @property
    def is_paused(self) -> bool:
        return self.streams and len(self.news) >= RUN_AHEAD


@dataclass(slots=True, eq=False)
class Run:
    """A request's place in the batch. n_read: tokens in its sequence.  followers: samples that fork it once its prompt is read."""

    call: Call
    index: int
    request: Request
    seq: int = 0
    n_read: int = 0
    followers: list[Run] = field(default_factory=list)

    @property
    def n_ahead(self) -> int:
        return self.request.n_token - self.n_read

    def pages_ahead(self, n_read: int) -> int:
        """Pages it takes to read what comes after n_read tokens, draw a token and fork. A page that is read in part may be shared."""
        return pages_for(self.request.n_token + 1) - n_read // PAGE_TOKENS + len(self.followers)


@dataclass(slots=True, eq=False)
class Piece:
    """The next n tokens of a run, and what was drawn after them. logits_at: its first row in the step's logits."""

    run: Run
    n: int
    draws: bool
    on_host: bool
    logits_at: int = 0
    drawn: list[tuple[Run, int, float, Top]] = field(default_factory=list)
    error: BaseException | None = None


def pages_for(n_token: int) -> int:
    return -(-n_token // PAGE_TOKENS)


class Batch:
    """The requests of all calls on one session.

    mixed_rows: rows of prompts in a step that also decodes, so that texts go on while a prompt is read.
    prefix_pages: pages in use up to which texts are kept for later prompts that begin with them; see PrefixCache.
    calls: those that are not done, in order of arrival.  running: their requests that have a sequence, the youngest last.
    """

    def __init__(self, session: Session, *, mixed_rows: int, prefix_pages: int) -> None:
        self.session = session
        stats = session.stats()
        self.n_page, self._max_rows = int(stats["n_page"]), int(stats["max_batch_tokens"])
        self._mixed_rows = min(mixed_rows, self._max_rows)
        self.prefixes = PrefixCache(session, n_page=self.n_page, max_pages=prefix_pages)
        self.calls: list[Call] = []
        self.running: list[Run] = []
        self.n_preempted = 0
        self._is_sparse = False
        self._tight = False  # pages ran out: until somebody leaves, a newcomer would only be the next to lose them

    def set_sparse(self, is_sparse: bool) -> None:
        """Under another policy. What was generated under the one before is not kept for it."""
        self._is_sparse = self.prefixes.whole = is_sparse
        self.prefixes.clear()

    # -- a step: plan, run, then account or, if it failed, recover

    def plan(self) -> list[Piece]:
        """One row for every run that decodes, then the prompts, the oldest first, as far as there are rows left."""
        self._admit()
        ready = [run for run in self.running if not run.call.is_paused]
        plan = [self._piece(run, 1) for run in ready if run.n_ahead == 1][: self._max_rows]
        room = min(self._mixed_rows, self._max_rows - len(plan)) if plan else self._max_rows
        for run in ready:
            if run.n_ahead == 1:
                continue
            if room < 3 <= self._max_rows:
                break
            plan.append(self._piece(run, room))
            room -= plan[-1].n
        return plan

    def _piece(self, run: Run, room: int) -> Piece:
        """The most that can be read in one go. No last row is left alone: a single token counts as a generated one, which may be sparse."""
        request = run.request
        n_prompt = len(request.prompt)
        end = request.n_token
        if self._is_sparse and end > n_prompt:  # what had been generated before its pages were lost: token by token, as it was
            end = n_prompt if run.n_read < n_prompt else run.n_read + 1
        if request.params.prompt_logprobs and request.wants_scores:
            room = min(room, _SCORED_ROWS)
        n = min(end - run.n_read, room)
        if end - run.n_read - n == 1 and n > 2:
            n -= 1
        draws = run.n_read + n == request.n_token
        return Piece(run, n, draws, draws and bool(request.processors or run.followers))

    def _admit(self) -> None:
        """Begins requests as long as their prompts fit beside what is running. Calls take turns: the one with least running comes first."""
        while calls := [c for c in self.calls if c.waiting and not c.is_paused]:
            run = min(calls, key=lambda c: c.n_running).waiting[0]
            if self.running and (self._tight or len(self.running) >= MAX_RUNNING or not self._fits(run)):
                paused = [r for r in self.running if r.call.is_paused]
                if not paused:
                    return
                self._preempt(paused[-1])
                continue
            run.call.waiting.popleft()
            try:
                self._begin(run)
            except PyruntimeError as error:
                self.fail(run.call, error)

    def _fits(self, run: Run) -> bool:
        n_page = run.pages_ahead(self.prefixes.match(self._reusable(run))) + sum(r.pages_ahead(r.n_read) for r in self.running)
        if n_page + max(pages_for(self.session.length(r.seq)) for r in self.running) > self.n_page:
            return False  # giving up what is kept would not be enough
        self.prefixes.make_room(n_page)
        return n_page <= self._free_pages()

    def _reusable(self, run: Run) -> list[int]:
        """The tokens that need not be read if they are kept. The last one has to be, and with sparse attention one more, since a single
        token would not count as part of a prompt."""
        request = run.request
        if request.wants_scores or (self._is_sparse and request.token_ids):
            return []
        return request.tokens(0, max(0, request.n_token - (2 if self._is_sparse else 1)))

    def _begin(self, run: Run) -> None:
        request = run.request
        run.seq, run.n_read = self.prefixes.fork(self._reusable(run))
        if not request.token_ids:
            request.n_cached = run.n_read
        run.call.begun = True
        self._enter(run)

    def _enter(self, run: Run) -> None:
        run.call.n_running += 1
        self.running.append(run)

    def run(self, plan: list[Piece]) -> BaseException | None:
        """The step, and what is drawn on the host; returns what it failed with. Takes long, and touches no other call."""
        entries, at = [], 0
        for piece in plan:
            run, request = piece.run, piece.run.request
            tokens = request.tokens(run.n_read, run.n_read + piece.n)
            entry = Entry(run.seq, tokens, request.sampler if piece.draws and not piece.on_host else None, int(piece.on_host))
            if request.wants_scores:
                if request.params.prompt_logprobs:
                    entry.n_logits = piece.n
                following = request.prompt[run.n_read + 1 : run.n_read + piece.n + 1]
                entry.targets = following + [-1] * (piece.n - len(following))
            piece.logits_at = at
            at += entry.n_logits
            entries.append(entry)
        wanted = [p.run.request.params.logprobs for p in plan if p.draws and not p.on_host and p.run.request.logprobs is not None]
        try:
            result = self.session.step(
                entries,
                logprobs=bool(wanted),
                n_top=max((k or 0 for k in wanted), default=0),
                stop=lambda: all(piece.run.call.cancelled.is_set() for piece in plan),
            )
        except BaseException as error:
            return error
        row = 0
        for i, (piece, entry) in enumerate(zip(plan, entries, strict=True)):
            try:
                self._take_out(piece, entry, i, row, result)
            except Exception as error:  # of somebody's logits processor
                piece.error = error
            row += piece.n
        return None

    def _take_out(self, piece: Piece, entry: Entry, i: int, row: int, result: StepResult) -> None:
        """What entry i of the step, whose first row was `row`, has brought."""
        run, request = piece.run, piece.run.request
        logits = None if result.logits is None else result.logits[piece.logits_at : piece.logits_at + entry.n_logits]
        if entry.targets is not None:
            assert result.target_logprobs is not None
            n = min(piece.n, len(request.prompt) - 1 - run.n_read)
            request.score(run.n_read, result.target_logprobs[row : row + n], logits if request.params.prompt_logprobs else None)
        if piece.on_host:
            assert logits is not None
            for sample in [run, *run.followers]:
                piece.drawn.append((sample, *sample.request.draw(logits[-1])))
        elif piece.draws:
            logprob, top, k = 0.0, Top(), request.params.logprobs
            if k is not None and result.logprobs is not None:
                logprob = float(result.logprobs[i])
                if k and result.top_ids is not None and result.top_logprobs is not None:
                    top = list(zip(result.top_ids[i, :k].tolist(), result.top_logprobs[i, :k].tolist(), strict=True))
            piece.drawn.append((run, result.sampled[i], logprob, top))

    def account(self, plan: list[Piece]) -> None:
        for piece in plan:
            run = piece.run
            if run.call.n_open == 0:  # has failed for the sake of another of its requests
                continue
            run.n_read += piece.n
            if piece.error:
                self.fail(run.call, piece.error)
                continue
            for follower in run.followers if piece.draws else ():
                follower.seq, follower.n_read = self.session.fork(run.seq), run.n_read
                follower.request.n_cached = len(run.request.prompt)
                follower.request.prompt_logprobs = run.request.prompt_logprobs
                self._enter(follower)
            if piece.draws and not run.request.token_ids:
                self._keep_prompt(run)
            for sample, token, logprob, top in piece.drawn:
                try:
                    text = sample.request.take(token, logprob, top)
                except PyruntimeError as error:
                    self.fail(sample.call, error)
                    break
                if text and sample.call.streams:
                    sample.call.news.append((sample.index, text))
                if sample.request.finish_reason:
                    self._leave(sample)
                    sample.call.n_open -= 1
            if piece.draws:
                run.followers = []

    def recover(self, plan: list[Piece], error: BaseException) -> None:
        """After a step that failed, and changed nothing."""
        if isinstance(error, OutOfPagesError):
            n_page = sum(pages_for(piece.n) + 1 for piece in plan)
            if self.prefixes.make_room(n_page):
                return
            if len(self.running) == 1:
                self.fail(plan[0].run.call, error)
                return
            self._preempt(self._victim())
            self.prefixes.make_room(n_page)
            self._tight = True
        elif isinstance(error, AbortedError) and (self.session.interrupted or any(p.run.call.cancelled.is_set() for p in plan)):
            return  # the leader hears of it when it leaves the step; who was cancelled is swept out
        elif not self.session.handle:
            raise error
        else:
            for piece in plan:
                self.fail(piece.run.call, error)

    # -- leaving

    def _victim(self) -> Run:
        """Who gives up its pages: a stream that nobody reads, else the youngest."""
        return next((run for run in self.running if run.call.is_paused), self.running[-1])

    def _preempt(self, run: Run) -> None:
        """Takes a run's pages away; it is the next of its call to go on, and reads again what is not kept until then."""
        self._give_back(run, keep=not self._is_sparse)
        run.call.waiting.appendleft(run)
        self.n_preempted += 1

    def _leave(self, run: Run) -> None:
        self._give_back(run, keep=run.call.error is None)
        self._tight = False

    def _give_back(self, run: Run, *, keep: bool) -> None:
        self.running.remove(run)
        run.call.n_running -= 1
        seq, n, run.seq, run.n_read = run.seq, run.n_read, 0, 0
        if keep and self.session.handle and self.session.length(seq) == n:  # else some of its tokens were evicted
            self.prefixes.put(seq, run.request.tokens(0, n))
        else:
            self.session.free_sequence(seq)

    def _keep_prompt(self, run: Run) -> None:
        """The whole pages of a prompt are of use to others as soon as they are read."""
        n = run.n_read // PAGE_TOKENS * PAGE_TOKENS
        if n <= run.request.n_cached or not self.prefixes.max_pages:
            return
        seq = self.session.fork(run.seq)
        try:
            self.session.truncate(seq, n)
        except OutOfPagesError:
            self.session.free_sequence(seq)
        else:
            self.prefixes.put(seq, run.request.prompt[:n])

    def fail(self, call: Call, error: BaseException) -> None:
        call.error = call.error or error
        self.close(call)

    def close(self, call: Call) -> None:
        for run in [r for r in self.running if r.call is call]:
            self._leave(run)
        call.waiting.clear()
        call.n_open = 0

    def close_cancelled(self) -> None:
        for call in self.calls:
            if call.cancelled.is_set() and call.n_open:
                self.close(call)

    def make_room(self, n_page: int) -> None:
        """Gives up what is kept, then preempts, until that many pages are free or nothing runs."""
        self.prefixes.make_room(n_page)
        while self.running and self._free_pages() < n_page:
            self._preempt(self._victim())
            self.prefixes.make_room(n_page)

    def _free_pages(self) -> int:
        return int(self.session.stats()["n_page_free"])
