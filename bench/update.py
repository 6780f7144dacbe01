"""The update: FLOP a second of log pi with its gradient, against the same products alone.

    python bench/update.py --policy cache/smollm2/policy
    python bench/update.py --shape 1b                       random weights, on a GPU

    FLOP = 6 W_body (S P + T B) + 6 W_head T B

W counts the weights of the linear layers, P = B / 4 prompts run once, T B response tokens go
through the head. Attention, padding and anything that is computed twice do not count. The rate
beside it is that of the forward, input gradient and weight gradient products of the same layers at
the same number of rows, without anything between them.
"""

import resource
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import machine
from reinforce import Rollout, Scorer
from reinforce import device as devices
from reinforce.run.allocator import keep_freed_memory

K = 4
UNSETTLED = 3  # calls in which the heap still grows


def responses(b: int, s: int, t: int, vocabulary: int, device: torch.device) -> Rollout:
    """B rows of random tokens, T response tokens each, to B / K prompts."""
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, vocabulary, (b // K, s), generator=draw).repeat_interleave(K, 0)
    response = torch.randint(0, vocabulary, (b, t), generator=draw)
    return Rollout(
        prompt.to(device),
        torch.ones_like(prompt, dtype=torch.bool, device=device),
        response.to(device),
        torch.ones_like(response, dtype=torch.bool, device=device),
        torch.zeros(b, t, device=device),
        torch.ones(b, dtype=torch.bool, device=device),
    )


def main() -> None:
    """Print the table, and how the time grows with B and T."""
    parser = machine.arguments(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16, 24], help="values of B")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 64, 96], help="values of T")
    parser.add_argument("--prompt", type=int, default=32, help="S, tokens of a prompt")
    args = parser.parse_args()
    keep_freed_memory()
    model, device, bf16 = machine.model_of(args)
    scorer = Scorer(model, plain=True, shares_prompt=True).to(device)
    layers = machine.linear_layers(model)
    head = model.get_output_embeddings().weight.numel()
    body = sum(layer.weight.numel() for layer in layers) - head
    vocabulary = model.config.vocab_size
    print(f"{device}, {'bf16' if bf16 else 'fp32'}, {torch.get_num_threads()} threads")
    print("   B     T   seconds   GFLOP/s   products alone   share   peak, GiB")
    times = {}
    for b in args.rows:
        for t in args.tokens:
            rows = responses(b, args.prompt, t, vocabulary, device)

            def work(rows: Rollout = rows) -> None:
                with devices.autocast(device, bf16):
                    logp: Tensor = scorer(rows.prompt, rows.prompt_mask, rows.response, rows.mask)
                logp.mean().backward()

            times[b, t] = seconds = machine.median_seconds(work, args.repeats, device, UNSETTLED)
            tokens = args.prompt * b // K + t * b
            flop = 6 * body * tokens + 6 * head * t * b
            alone = machine.product_rate(layers, tokens, bf16, device)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            if device.type == "cuda":
                peak = torch.cuda.max_memory_allocated() / 2**30
            print(
                f"{b:4} {t:5} {seconds:9.2f} {flop / seconds / 1e9:9.0f} {alone / 1e9:16.0f} "
                f"{flop / seconds / alone:7.0%} {peak:11.1f}",
                flush=True,
            )
    machine.print_growth(times)


if __name__ == "__main__":
    main()
