"""Continuous batching: one step serves the requests of all callers, and whoever waits for text runs the steps.

There is no thread of its own unless a caller is asynchronous: of the threads that wait, one leads and runs step after step until its own
call has news, then another goes on. A request joins and leaves between any two steps; see batch.py for which, and in what order.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .batch import RUN_AHEAD, Batch, Call
from .batch import pages_for as pages_for  # for those who borrow()
from .errors import AbortedError, InvalidArgumentError, OutOfPagesError, PyruntimeError, QueueFullError
from .session import Session

if TYPE_CHECKING:
    from .attention import Attention

MAX_QUEUE = 1024  # calls that may wait for their first step


class Engine:
    """Runs requests on a session; any number of threads may use it.

    max_queue: calls that may wait to begin; one more raises QueueFullError.
    mixed_rows, prefix_pages: see Batch.
    on_progress: called with (tokens read, tokens) of a long prompt that is alone.
    """

    def __init__(self, session: Session, *, mixed_rows: int = 128, max_queue: int = MAX_QUEUE, prefix_pages: int = 0) -> None:
        self.session, self.max_queue = session, max_queue
        self.on_progress: Callable[[int, int], None] | None = None
        self._lock = threading.Lock()  # of everything below; not held while the device works
        self.batch = Batch(session, mixed_rows=mixed_rows, prefix_pages=prefix_pages)
        self._leader = 0  # thread that is in a step
        self._guests: deque[threading.Condition] = deque()  # who waits for borrow()
        self._driver: threading.Thread | None = None  # leads while only asynchronous callers wait
        self._driver_wake = threading.Condition(self._lock)

    # -- callers

    def submit(self, call: Call) -> None:
        """Puts the call into the queue. Nothing runs yet unless somebody waits."""
        with self._lock:
            self._check_open()
            waiting = sum(not (c.begun or c.cancelled.is_set()) for c in self.batch.calls)  # who was cancelled goes after this step
            if waiting >= self.max_queue:
                raise QueueFullError(f"{waiting} calls are waiting for the model, as many as may: try again later")
            for request in call.requests:
                pages = pages_for(request.longest)
                if pages > self.batch.n_page:
                    raise OutOfPagesError(f"the request may need {pages} KV pages, there are {self.batch.n_page}: give max_tokens")
            call.turn = threading.Condition(self._lock)
            if call.n_open:
                self.batch.calls.append(call)
                self._pass_on()

    def wait(self, call: Call) -> tuple[int, str] | None:
        """Until a stream has a piece of text, (index of the request, piece), or the call is done: None, or its error is raised. Meanwhile
        this thread runs the steps, unless another one does."""
        with self._lock:
            if not call.has_news:
                self._wait(call)
            return self._next(call)

    def poll(self, call: Call) -> tuple[int, str] | None | bool:
        """The same without waiting; False: nothing yet. For calls with a listener."""
        with self._lock:
            return self._next(call) if call.has_news else False

    def cancel(self, call: Call) -> None:
        """Ends the call, at once unless a step is being run; harmless when it is done."""
        call.cancelled.set()
        with self._lock:
            self._sweep()

    def drop(self, call: Call) -> None:
        """The same for __del__, which may run in the middle of anything, also of this class: if now is not possible, soon."""
        call.cancelled.set()
        if self._lock.acquire(blocking=False):
            try:
                if not self.session.is_busy:
                    self._sweep()
            finally:
                self._lock.release()

    @contextmanager
    def borrow(self, n_page: int) -> Iterator[Session]:
        """The session for the caller alone, with n_page free pages if others can give them up; meanwhile no text goes on."""
        self._check_not_leading()
        with self._lock:
            turn = threading.Condition(self._lock)
            self._guests.append(turn)
            try:
                while self._leader or self._guests[0] is not turn:
                    turn.wait()
                self._check_open()
                self.batch.make_room(n_page)
                self._leader = threading.get_ident()
            finally:
                self._guests.remove(turn)
                self._pass_on()
        try:
            yield self.session
        finally:
            with self._lock:
                self._leader = 0
                self._pass_on()

    # for those who borrow(): sequences of what is kept for later prompts

    def fork_kept(self, tokens: Sequence[int]) -> tuple[int, int]:
        """(a new sequence, how many first tokens are in it); see PrefixCache.fork."""
        with self._lock:
            return self.batch.prefixes.fork(tokens)

    def keep(self, seq: int, tokens: list[int]) -> None:
        """Takes over a sequence for later prompts; see PrefixCache.put."""
        with self._lock:
            self.batch.prefixes.put(seq, tokens)

    def make_room(self, n_page: int) -> None:
        """As borrow() does it."""
        with self._lock:
            self.batch.make_room(n_page)

    def set_attention(self, attention: Attention) -> None:
        """Another policy for all, from the next step on."""
        with self.borrow(0):
            self.session.set_attention(attention)
            self.batch.set_sparse(attention.policy != "full")

    def n_cached(self, tokens: Sequence[int]) -> int:
        """How many first tokens of a prompt would not have to be read."""
        with self._lock:
            return self.batch.prefixes.match(tokens) if self.session.handle else 0

    def clear_prefixes(self) -> None:
        with self._lock:
            self._check_open()
            self._sweep()
            self.batch.prefixes.clear()

    def stats(self) -> dict[str, int]:
        with self._lock:
            self._sweep()
            return {
                "n_running": len(self.batch.running),
                "n_waiting": sum(len(c.waiting) for c in self.batch.calls),
                "n_preempted": self.batch.n_preempted,
                "n_prefix": len(self.batch.prefixes),
            }

    # -- who leads; the lock is held in everything from here on

    def _check_open(self) -> None:
        if not self.session.handle:
            raise InvalidArgumentError("the model is closed")

    def _check_not_leading(self) -> None:
        if self._leader == threading.get_ident():
            raise InvalidArgumentError("a logits processor cannot generate or score with its own model")

    def _pass_on(self) -> None:
        """Wakes one who can lead."""
        if self._leader:
            return
        waiting = next((c for c in self.batch.calls if c.is_waited), None)
        if self._guests:
            self._guests[0].notify()
        elif waiting:
            waiting.turn.notify()
        elif self._driver:
            self._driver_wake.notify()
        elif self._must_drive():
            self._driver = threading.Thread(target=self._drive, name="pyruntime")
            self._driver.start()

    def _wait(self, call: Call) -> None:
        self._check_not_leading()
        self._check_open()
        call.is_waited = True
        try:
            while not call.has_news:
                if self._leader or self._guests:
                    self._pass_on()
                    call.turn.wait()
                else:
                    self._lead(lambda: call.has_news)
        finally:
            call.is_waited = False
            self._pass_on()

    def _next(self, call: Call) -> tuple[int, str] | None:
        if call.news:
            piece = call.news.popleft()
            if call.listener and len(call.news) == RUN_AHEAD - 1:
                self._pass_on()  # it was paused
            return piece
        if call.error is not None:
            raise call.error
        return None

    def _must_drive(self) -> bool:
        return any(c.listener and not c.is_paused for c in self.batch.calls)

    def _drive(self) -> None:
        """Leads until no asynchronous call can go on; not a daemon, which could be stopped in the middle of a step at the program's end."""
        with self._lock:
            while self._must_drive():
                if self._leader or self._guests or any(c.is_waited for c in self.batch.calls):
                    self._pass_on()
                    self._driver_wake.wait()
                    continue
                self._lead(lambda: True)
            self._driver = None
            self._pass_on()

    def _lead(self, is_enough: Callable[[], bool]) -> None:
        """Runs steps. What a signal handler raises comes out between two of them, when all is written down."""
        with self.session.deferring():
            while True:
                self._step()
                self._show_progress()
                if is_enough() or self._guests or self.session.interrupted:
                    return

    def _show_progress(self) -> None:
        if self.on_progress and len(self.batch.running) == 1:
            run = self.batch.running[0]
            if run.n_read <= len(run.request.prompt):
                self.on_progress(run.n_read, len(run.request.prompt))

    # -- a step

    def _step(self) -> None:
        """Lets go of the lock while the device works."""
        try:
            self._sweep()
            self._check_open()
            plan = self.batch.plan()
            self._leader = threading.get_ident()
            self._lock.release()
            try:
                failed = self.batch.run(plan) if plan else None
            finally:
                self._lock.acquire()
                self._leader = 0
            if failed is None:
                self.batch.account(plan)
            else:
                self.batch.recover(plan, failed)
            self._sweep()
        except PyruntimeError as error:  # around the step: the model was closed, or the device is lost
            failure = error if self.session.handle else AbortedError("the model was closed during the call")
            for call in self.batch.calls:
                self.batch.fail(call, failure)
        for call in self.batch.calls:
            if call.has_news:
                self._tell(call)

    def _tell(self, call: Call) -> None:
        call.turn.notify()
        if call.listener:
            try:
                call.listener()
            except RuntimeError:  # the event loop is closed, and nobody is there to read on
                call.cancelled.set()

    def _sweep(self) -> None:
        """Ends what was cancelled and forgets what is done; not during a step."""
        if self._leader:
            return
        self.batch.close_cancelled()
        for call in self.batch.calls:
            if call.n_open == 0:
                self._tell(call)
        self.batch.calls = [c for c in self.batch.calls if c.n_open]
