"""What the server counts, as Prometheus reads it. The names are vLLM's, under `qrun:`."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)


class Histogram:
    """How often a figure was at most each of some bounds."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def lines(self, name: str) -> Iterable[str]:
        total = 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            total += count
            label = "+Inf" if bound == float("inf") else f"{float(bound)}"
            yield f'{name}_bucket{{le="{label}"}} {total}'
        yield f"{name}_count {total}"
        yield f"{name}_sum {self.sum:.6f}"


class Metrics:
    """Used by the event loop's thread alone."""

    def __init__(self) -> None:
        self.prompt_tokens = self.generation_tokens = 0
        self.prefix_queries = self.prefix_hits = 0
        self.finished: Counter[str] = Counter()
        self.histograms = {
            "time_to_first_token_seconds": (Histogram(_SECONDS), "From a request to its first token."),
            "inter_token_latency_seconds": (Histogram(_GAPS), "Between two tokens."),
            "e2e_request_latency_seconds": (Histogram(_SECONDS), "From a request to its last token."),
            "request_queue_time_seconds": (Histogram(_SECONDS), "From a request until its turn came."),
            "request_prefill_time_seconds": (Histogram(_SECONDS), "Reading the prompt."),
            "request_decode_time_seconds": (Histogram(_SECONDS), "From the first token to the last."),
            "request_prompt_tokens": (Histogram(_TOKENS), "Tokens of a prompt."),
            "request_generation_tokens": (Histogram(_TOKENS), "Tokens of an answer."),
        }

    def observe(self, name: str, value: float, times: int = 1) -> None:
        self.histograms[name][0].observe(value, times)

    def text(self, running: int, waiting: int, cache_usage: float, loaded: int) -> str:
        """All of it, with what is the case now."""
        lines: list[str] = []

        def add(name: str, kind: str, help: str, value: float) -> None:
            lines.extend([f"# HELP qrun:{name} {help}", f"# TYPE qrun:{name} {kind}", f"qrun:{name} {value}"])

        add("num_requests_running", "gauge", "Requests whose answers are being computed.", running)
        add("num_requests_waiting", "gauge", "Requests that wait for their turn.", waiting)
        add("kv_cache_usage_perc", "gauge", "The used part of the cache, 1 for all of it.", round(cache_usage, 6))
        add("models_loaded", "gauge", "Models in memory.", loaded)
        add("prompt_tokens_total", "counter", "Tokens of prompts, cached ones included.", self.prompt_tokens)
        add("generation_tokens_total", "counter", "Generated tokens.", self.generation_tokens)
        add("prefix_cache_queries_total", "counter", "Tokens looked for in the prefix cache.", self.prefix_queries)
        add("prefix_cache_hits_total", "counter", "Tokens found there.", self.prefix_hits)
        lines.append("# HELP qrun:request_success_total Requests that have ended, by why.")
        lines.append("# TYPE qrun:request_success_total counter")
        for reason in ("stop", "length", "tool_calls", "abort", *sorted(self.finished)):
            line = f'qrun:request_success_total{{finished_reason="{reason}"}} {self.finished[reason]}'
            if line not in lines:
                lines.append(line)
        for name, (histogram, help) in self.histograms.items():
            lines.extend([f"# HELP qrun:{name} {help}", f"# TYPE qrun:{name} histogram"])
            lines.extend(histogram.lines(f"qrun:{name}"))
        return "\n".join(lines) + "\n"
