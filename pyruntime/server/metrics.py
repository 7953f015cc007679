"""Counters for Prometheus, in its text format. One event loop writes them, so there is no lock."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..generate import Request

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_GAUGES = {
    "n_running": "requests that are being generated",
    "n_waiting": "requests that wait to begin or to go on",
    "n_prefix": "texts kept for later prompts that begin alike",
    "n_page": "pages of the KV cache",
    "n_page_free": "pages of the KV cache that are free",
}


class Histogram:
    def __init__(self) -> None:
        self.counts, self.sum, self.count = [0] * len(_SECONDS), 0.0, 0

    def add(self, value: float) -> None:
        self.sum += value
        self.count += 1
        for i, edge in enumerate(_SECONDS):
            self.counts[i] += value <= edge


class Metrics:
    def __init__(self) -> None:
        self.responses: dict[tuple[str, int], int] = defaultdict(int)
        self.disconnects = self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.first_token, self.whole = Histogram(), Histogram()

    def count(self, prompts: Sequence[Sequence[Request]]) -> None:
        """A request that is over, done or not."""
        for samples in prompts:
            if samples[0].token_ids:
                self.prompt_tokens += len(samples[0].prompt)
                self.cached_tokens += samples[0].n_cached
            for request in samples:
                self.generated_tokens += len(request.token_ids)
                if request.token_ids:
                    self.first_token.add(request.first_token - request.started)
                    self.whole.add(request.ended - request.started)

    def render(self, stats: Mapping[str, Any]) -> str:
        return "\n".join(self._lines(stats)) + "\n"

    def _lines(self, stats: Mapping[str, Any]) -> Iterator[str]:
        yield from _head("http_responses_total", "counter", "answers by route and status")
        for (route, status), n in sorted(self.responses.items()):
            yield f'pyruntime_http_responses_total{{route="{route}",status="{status}"}} {n}'
        for name, value, about in (
            ("disconnects_total", self.disconnects, "clients that left before the end"),
            ("prompt_tokens_total", self.prompt_tokens, "tokens of prompts"),
            ("cached_tokens_total", self.cached_tokens, "tokens of prompts that were in the KV cache"),
            ("generated_tokens_total", self.generated_tokens, "tokens generated"),
            ("preemptions_total", stats["n_preempted"], "times that a request gave up its pages"),
        ):
            yield from _head(name, "counter", about)
            yield f"pyruntime_{name} {value}"
        for key, about in _GAUGES.items():
            name = {"n_page": "kv_pages", "n_page_free": "kv_pages_free"}.get(key, key.removeprefix("n_"))
            yield from _head(name, "gauge", about)
            yield f"pyruntime_{name} {stats[key]}"
        for name, histogram, about in (
            ("time_to_first_token_seconds", self.first_token, "from the request to its first token"),
            ("generation_seconds", self.whole, "from the request to its last token"),
        ):
            yield from _head(name, "histogram", about)
            for edge, n in zip(_SECONDS, histogram.counts, strict=True):
                yield f'pyruntime_{name}_bucket{{le="{edge:g}"}} {n}'
            yield f'pyruntime_{name}_bucket{{le="+Inf"}} {histogram.count}'
            yield f"pyruntime_{name}_sum {histogram.sum:.6f}"
            yield f"pyruntime_{name}_count {histogram.count}"


def _head(name: str, kind: str, about: str) -> tuple[str, str]:
    return f"# HELP pyruntime_{name} {about}", f"# TYPE pyruntime_{name} {kind}"
