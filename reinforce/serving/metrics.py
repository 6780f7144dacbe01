"""GET /metrics, in Prometheus' text format."""

from reinforce.serving.batcher import Batcher
from reinforce.serving.server import Server


def metrics(server: Server, batcher: Batcher) -> bytes:
    """Counters since the start, gauges of this moment."""
    counts = batcher.counts
    counters = {
        "rm_forwards_total": counts.forwards,
        "rm_texts_total": counts.texts,
        "rm_tokens_total": counts.size,  # of a function: characters
        "rm_forward_seconds_total": counts.forward_seconds,
        "rm_wait_seconds_total": counts.wait_seconds,
        "rm_dropped_texts_total": counts.dropped,
        "rm_out_of_memory_total": counts.out_of_memory,
        "rm_non_finite_total": counts.non_finite,
    }
    gauges = {
        "rm_queued_texts": batcher.waiting,
        "rm_connections": len(server.connections),
        "rm_batch_texts": counts.last_batch,
    }
    lines = ["# TYPE rm_requests_total counter"]
    lines += [f'rm_requests_total{{code="{c}"}} {n}' for c, n in sorted(server.replies.items())]
    for kind, values in (("counter", counters), ("gauge", gauges)):
        for name, value in values.items():
            lines += [f"# TYPE {name} {kind}", f"{name} {value:.9g}"]
    return "\n".join([*lines, ""]).encode()
