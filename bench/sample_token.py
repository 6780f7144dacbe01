"""Seconds of drawing one token a row: the tree of partial sums against two other ways.

    python bench/sample_token.py

The other ways are torch.multinomial and an inverted running sum. The script alternates the three on
the same probabilities and prints the median of each, and its ratio to that of the tree.
"""

import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reinforce.sampler import sample_token


def main() -> None:
    """Measure 16 rows of a vocabulary of 49152 tokens, 101 times."""
    rows, vocabulary, repeats = 16, 49152, 101
    draw = torch.Generator().manual_seed(0)
    probs = torch.randn(rows, vocabulary, generator=draw).softmax(-1)
    coins = torch.rand(rows, math.ceil(math.log2(vocabulary)), generator=draw)
    ways = {
        "tree": lambda: sample_token(probs, coins),
        "cumsum": lambda: torch.searchsorted(probs.cumsum(-1), coins[:, :1].contiguous()),
        "multinomial": lambda: torch.multinomial(probs, 1, generator=draw),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    for name, value in median.items():
        print(f"{name:>12} {value:8.2f} ms {value / median['tree']:8.1f} x the tree")
    size = {"rows": rows, "vocabulary": vocabulary}
    print(json.dumps({**size, "threads": torch.get_num_threads(), "median_ms": median}))


if __name__ == "__main__":
    main()
