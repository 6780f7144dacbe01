"""Sampling with one lever and without it: what packed_weights.py and kv_cache.py buy.

    python bench/sampling.py --policy cache/smollm2/policy --lever weights
    python bench/sampling.py --policy cache/smollm2/policy --lever cache --prompt 512
    python bench/sampling.py --shape 1b --lever cache                  random weights

Each row of the table samples T tokens to B responses of one prompt of S tokens, one way after the
other; the other lever is on. Laying out weights and making room count. Printed are medians, the
median of the ratios, and whether the tokens are the same. Weights are laid out in bfloat16 on a CPU
alone.
"""

import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import machine
from reinforce import Rollout, Sampling, row_seed, sample, sampler
from reinforce import device as devices
from reinforce.packed_weights import packed_weights
from reinforce.run.allocator import keep_freed_memory

give_room = sampler.give_room


def main() -> None:
    """Print the table."""
    parser = machine.arguments(__doc__)
    parser.add_argument("--lever", choices=("weights", "cache"), required=True, help="on and off")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16], help="values of B")
    parser.add_argument("--prompt", type=int, default=32, help="S, tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=32, help="T")
    parser.set_defaults(precision="bf16", repeats=5)
    args = parser.parse_args()
    keep_freed_memory()
    model, device, bf16 = machine.model_of(args)
    prompt = [[10 + i % 100 for i in range(args.prompt)]]

    def once(b: int, on: bool) -> tuple[float, Rollout]:
        seeds = [row_seed(0, 0, 0, k) for k in range(b)]
        start = time.perf_counter()
        packs = on or args.lever != "weights"
        sampler.give_room = give_room if on or args.lever != "cache" else lambda cache: None
        weights = packed_weights(model, bf16) if packs else nullcontext()
        with devices.autocast(device, bf16), weights:
            rollout = sample(model, prompt, seeds, Sampling(args.tokens, (), 0), device)
        return time.perf_counter() - start, rollout

    print("   B   without, s   with, s   ratio   same tokens")
    for b in args.rows:
        pairs = []
        for _ in range(args.repeats + 1):
            (without, one), (with_it, two) = once(b, on=False), once(b, on=True)
            pairs.append((without, with_it))
        without, with_it = (statistics.median(column) for column in zip(*pairs[1:], strict=True))
        ratio = statistics.median(a / b for a, b in pairs[1:])
        same = torch.equal(one.response, two.response)
        print(f"{b:4} {without:12.2f} {with_it:9.2f} {ratio:7.2f}   {same}", flush=True)


if __name__ == "__main__":
    main()
