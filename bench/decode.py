"""Sampling: tokens a second, against what reading the weights and their products would take.

    python bench/decode.py --policy cache/smollm2/policy
    python bench/decode.py --shape 1b                       random weights, on a GPU

The floor of a decoding step of n rows is the larger of

    weight bytes / measured read rate        every weight is read once
    2 n W / measured matrix rate             W weights of linear layers, the head among them

The matrix rate is that of the same layers at 1,024 rows. Bytes are 2 a weight in bfloat16, else 4.
Each row of the table samples T tokens to B rows, of B / 4 prompts of S tokens; the prompts' own
pass is taken out by sampling one token as well.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import machine
from reinforce import Sampling, row_seed, sample
from reinforce import device as devices
from reinforce.packed_weights import packed_weights

K = 4
PEAK_ROWS = 1024  # enough for a product to reach its best rate


def main() -> None:
    """Print the machine's rates, the table, and how the time grows with B and T."""
    parser = machine.arguments(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16, 32], help="values of B")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 64, 128], help="values of T")
    parser.add_argument("--prompt", type=int, default=32, help="S, tokens of a prompt")
    args = parser.parse_args()
    model, device, bf16 = machine.model_of(args)
    layers = machine.linear_layers(model)
    weights = sum(layer.weight.numel() for layer in layers)
    read = machine.read_rate(device)
    print(f"{device}, {'bf16' if bf16 else 'fp32'}, {torch.get_num_threads()} threads")
    rate = machine.product_rate(layers, PEAK_ROWS, bf16, device)
    print(
        f"{weights / 1e6:.0f}M weights of linear layers · read {read / 1e9:.0f} GB/s · "
        f"products {rate / 1e9:.0f} GFLOP/s"
    )

    def seconds(b: int, t: int) -> float:
        prompts = [[(7 * i + j) % 1000 + 10 for j in range(args.prompt)] for i in range(b // K)]
        seeds = [row_seed(0, 0, i, k) for i in range(b // K) for k in range(K)]
        sampling = Sampling(t, (), 0)

        def work() -> None:
            with devices.autocast(device, bf16), packed_weights(model, bf16):
                sample(model, prompts, seeds, sampling, device)

        return machine.median_seconds(work, args.repeats, device)

    print("   B     T   tokens/s   ms a step    floor   ratio   weights read, GB/s")
    times = {}
    for b in args.rows:
        size = weights * (2 if bf16 else 4)
        floor = max(size / read, 2 * b * weights / rate)
        first = seconds(b, 1)
        for t in args.tokens:
            times[b, t] = whole = seconds(b, t)
            step = (whole - first) / (t - 1)
            print(
                f"{b:4} {t:5} {b * t / whole:10.0f} {1000 * step:11.1f} {1000 * floor:8.1f} "
                f"{step / floor:7.1f} {size / step / 1e9:20.1f}",
                flush=True,
            )
    machine.print_growth(times)


if __name__ == "__main__":
    main()
