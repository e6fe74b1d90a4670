"""The server's metrics, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

__all__ = ["Metrics"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Metrics of one server. Safe to share between threads."""

    def __init__(self, model: str, provider: str, version: str) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        ProcessCollector(registry=self._registry)
        about = Gauge("bonnx_build_info", "What is served", ["model", "provider", "version"], registry=registry)
        about.labels(model, provider, version).set(1)
        self._requests = Counter("bonnx_requests", "Requests answered", ["endpoint", "status"], registry=registry)
        self._seconds = Histogram(
            "bonnx_request_seconds",
            "From the request's headers to its answer",
            ["endpoint"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._waiting = Gauge(
            "bonnx_waiting_requests", "Requests that wait for the model", ["batcher"], registry=registry
        )
        self._batch_sizes = Histogram(
            "bonnx_run_requests", "Requests that ran together", ["batcher"], buckets=_COUNTS, registry=registry
        )
        self._runs = Histogram(
            "bonnx_run_seconds", "One run of the model", ["batcher"], buckets=_SECONDS, registry=registry
        )
        self._real = Counter(
            "bonnx_tokens", "Tokens to compute; for a generation the maximum", ["batcher"], registry=registry
        )
        self._padded = Counter("bonnx_padded_tokens", "The same, padding included", ["batcher"], registry=registry)

        self._completions = Counter(
            "bonnx_completions", "Completions sampled to choose from", ["method"], registry=registry
        )
        self._saved = Counter(
            "bonnx_saved_completions", "Completions that an early end has saved", ["method"], registry=registry
        )
        self._saved_tokens = Counter(
            "bonnx_estimated_saved_tokens",
            "Tokens that an early end has saved, if those completions were as long as the others",
            ["method"],
            registry=registry,
        )

    def answered(self, endpoint: str, status: int, seconds: float) -> None:
        """Count an answer."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def waiting(self, batcher: str, count: int) -> None:
        """Set how many requests are waiting."""
        self._waiting.labels(batcher).set(count)

    def ran(self, batcher: str, requests: int, real: int, padded: int, seconds: float) -> None:
        """Count a run."""
        self._batch_sizes.labels(batcher).observe(requests)
        self._runs.labels(batcher).observe(seconds)
        self._real.labels(batcher).inc(real)
        self._padded.labels(batcher).inc(padded)

    def sampled(self, method: str, completions: int, saved: int, tokens: int | None) -> None:
        """Count completions and, by the mean length of these, what an early end has saved."""
        self._completions.labels(method).inc(completions)
        self._saved.labels(method).inc(saved)
        if tokens is not None and completions:
            self._saved_tokens.labels(method).inc(saved * tokens / completions)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
