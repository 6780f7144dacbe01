"""One layer's attention, forwards and backwards: PyTorch's kernel beside attention.py's products.

    python bench/attention.py

SmolLM2's heads (9 queries, 3 keys, 64 wide) on a CPU. The two alternate; printed are the medians in
milliseconds, and their ratio, for some numbers of rows, queries and keys. attention.FEW_SCORES is
the number of scores of a head, queries times keys, up to which the products are taken.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.step import matrix_rate
from reinforce.attention import FEW_SCORES, float32_attention

HEADS, KEY_HEADS, WIDTH = 9, 3, 64
CASES = [(16, 64, 104), (4, 40, 40), (8, 64, 104), (4, 32, 512), (4, 128, 168), (4, 256, 296)]
REPEATS = 15


def milliseconds(work: Callable[[], Tensor], inputs: list[Tensor], grad: Tensor) -> list[float]:
    """A forward pass, and a forward and backward pass."""
    start = time.perf_counter()
    work()
    middle = time.perf_counter()
    torch.autograd.grad(work(), inputs, grad)
    return [1000 * (middle - start), 1000 * (time.perf_counter() - middle)]


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print(matrix_rate())
    print("type      rows queries keys  kernel: forward, both   products: forward, both   ratios")
    for dtype in (torch.float32, torch.bfloat16):
        for rows, queries, keys in CASES:
            print_case(dtype, rows, queries, keys)


def print_case(dtype: torch.dtype, rows: int, queries: int, keys: int) -> None:
    """One line of the table."""
    shapes = [(HEADS, queries), (KEY_HEADS, keys), (KEY_HEADS, keys)]
    inputs = [torch.randn(rows, h, n, WIDTH, dtype=dtype, requires_grad=True) for h, n in shapes]
    query, key, value = inputs
    mask = torch.ones(rows, 1, queries, keys, dtype=torch.bool).tril(keys - queries)
    grad = torch.randn(rows, queries, HEADS, WIDTH, dtype=dtype)
    shared, scale = HEADS // KEY_HEADS, WIDTH**-0.5

    def kernel() -> Tensor:
        repeated = [x.repeat_interleave(shared, 1) for x in (key, value)]
        out = nn.functional.scaled_dot_product_attention(query, *repeated, mask, scale=scale)
        return out.transpose(1, 2).contiguous()

    def products() -> Tensor:
        return float32_attention(query, key, value, mask, scale)

    taken: dict[str, list[list[float]]] = {"kernel": [], "products": []}
    for _ in range(REPEATS):
        taken["kernel"].append(milliseconds(kernel, inputs, grad))
        taken["products"].append(milliseconds(products, inputs, grad))
    a, b = ([statistics.median(c) for c in zip(*taken[k], strict=True)] for k in taken)
    few = "" if queries * keys <= FEW_SCORES else "  (the kernel is taken)"
    name = str(dtype).removeprefix("torch.")
    print(
        f"{name:9s} {rows:4d} {queries:7d} {keys:4d}  {a[0]:9.2f} {a[1]:9.2f}  {b[0]:12.2f} "
        f"{b[1]:9.2f}   {a[0] / b[0]:5.1f} {a[1] / b[1]:5.1f}{few}",
        flush=True,
    )


if __name__ == "__main__":
    main()
