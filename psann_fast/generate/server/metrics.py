"""Counters in Prometheus' text format, version 0.0.4."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

from ..async_engine import AsyncEngine

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Histogram:
    def __init__(self) -> None:
        self._counts = [0] * (len(SECONDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(SECONDS, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str, meaning: str) -> list[str]:
        found, so_far = [f"# HELP {name} {meaning}", f"# TYPE {name} histogram"], 0
        for limit, count in zip((*SECONDS, "+Inf"), self._counts):
            so_far += count
            found.append(f'{name}_bucket{{le="{limit}"}} {so_far}')
        return [*found, f"{name}_sum {self._sum:.6f}", f"{name}_count {so_far}"]


class Metrics:
    """What the server counted; the engine's own counters are read when asked."""

    def __init__(self, serving: AsyncEngine) -> None:
        self._serving = serving
        self._responses: Counter[tuple[str, int]] = Counter()
        self.first_token, self.whole = Histogram(), Histogram()

    def responded(self, path: str, status: int) -> None:
        self._responses[path, status] += 1

    def text(self) -> str:
        engine = self._serving.engine
        scheduler, counts = engine.scheduler, engine.counts
        lines = ["# HELP psann_http_responses_total Responses by path and status", "# TYPE psann_http_responses_total counter"]
        lines += [f'psann_http_responses_total{{path="{p}",status="{s}"}} {n}' for (p, s), n in sorted(self._responses.items())]
        counters = {
            "psann_steps_total": ("Steps of the engine", counts["steps"]),
            "psann_computed_tokens_total": ("Tokens that the model computed", counts["computed_tokens"]),
            "psann_drawn_tokens_total": ("Tokens that were written", counts["drawn_tokens"]),
            "psann_guessed_tokens_total": ("Tokens guessed ahead", counts["guessed_tokens"]),
            "psann_confirmed_tokens_total": ("Guesses that were right", counts["confirmed_tokens"]),
            "psann_reused_tokens_total": ("Prompt tokens found in the cache", scheduler.reused_tokens),
            "psann_preemptions_total": ("Requests set back for want of blocks", scheduler.preemptions),
        }
        gauges = {
            "psann_requests_running": ("Requests that run", len(scheduler.running)),
            "psann_requests_waiting": ("Requests that wait", max(self._serving.outstanding - len(scheduler.running), 0)),
            "psann_cache_blocks": ("Blocks of the cache", scheduler.pool.num_blocks),
            "psann_cache_blocks_used": ("Blocks that requests hold", scheduler.pool.in_use),
            "psann_cache_bytes": ("Memory of the cache", engine.cache.bytes_held),
        }
        for kind, values in (("counter", counters), ("gauge", gauges)):
            for name, (meaning, value) in values.items():
                lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}", f"{name} {value}"]
        lines += self.first_token.lines("psann_first_token_seconds", "From a request to its first piece of text")
        lines += self.whole.lines("psann_request_seconds", "From a request to its end")
        return "\n".join(lines) + "\n"
