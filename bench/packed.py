"""Sampling with weights laid out for few rows, and without: what packed_weights.py buys.

    python bench/packed.py --policy cache/smollm2/policy
    python bench/packed.py --shape 1b                       random weights

Each row samples T tokens to B rows of one prompt, in bfloat16 on the CPU, one way after the other.
The laying out counts. Printed are medians, their ratio, and whether the tokens are the same.
"""

import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import machine
from reinforce import Rollout, Sampling, row_seed, sample
from reinforce import device as devices
from reinforce.packed_weights import packed_weights
from reinforce.run.allocator import keep_freed_memory


def main() -> None:
    """Print the table."""
    parser = machine.arguments(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16], help="values of B")
    parser.add_argument("--tokens", type=int, default=32, help="T")
    parser.set_defaults(precision="bf16", device="cpu", repeats=5)
    args = parser.parse_args()
    keep_freed_memory()
    model, device, bf16 = machine.model_of(args)
    prompt = [list(range(10, 42))]

    def once(b: int, packs: bool) -> tuple[float, Rollout]:
        seeds = [row_seed(0, 0, 0, k) for k in range(b)]
        start = time.perf_counter()
        pack = packed_weights(model, bf16) if packs else nullcontext()
        with devices.autocast(device, bf16), pack:
            rollout = sample(model, prompt, seeds, Sampling(args.tokens, (), 0), device)
        return time.perf_counter() - start, rollout

    print("   B   plain, s   packed, s   ratio   same tokens")
    for b in args.rows:
        taken: dict[bool, list[float]] = {False: [], True: []}
        last = {}
        for _ in range(args.repeats + 1):
            for packs in (False, True):
                seconds, last[packs] = once(b, packs)
                taken[packs].append(seconds)
        plain, packed = (statistics.median(taken[packs][1:]) for packs in (False, True))
        same = torch.equal(last[False].response, last[True].response)
        print(f"{b:4} {plain:10.2f} {packed:11.2f} {plain / packed:7.2f}   {same}", flush=True)


if __name__ == "__main__":
    main()
