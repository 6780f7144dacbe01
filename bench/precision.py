"""What precision costs and gives: matrix rates in two precisions, and a float32 output head.

    python bench/precision.py --policy cache/smollm2/policy

First come the rates of products of 512 rows with weights of the model's shapes, in float32 and
bfloat16, medians of alternated repetitions, and what --precision auto takes on this machine. Then
follow, in bfloat16, two output heads: with the product in float32 (as train.py has it) and in
bfloat16. Printed for each are the seconds of one scoring pass with gradient, and the gap between
the scorer's log pi and the sampler's: the standard deviation over tokens, and the share of tokens
whose ratio is outside [0.9, 1.1].
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reinforce import Sampling, Scorer, load_policy, load_tokenizer, row_seed, sample
from reinforce import device as devices

ROWS = 512


def seconds(works: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each function. The calls alternate, and the first of each is left out."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if turn:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def rates(shapes: list[tuple[int, int]], device: torch.device, repeats: int) -> None:
    """Print the rates in both precisions, one line for each shape."""
    print(f"products of {ROWS} rows, GFLOP/s      float32  bfloat16")
    for h, v in shapes:
        works: dict[str, Callable[[], Tensor]] = {}
        for kind in (torch.float32, torch.bfloat16):
            states = torch.randn(ROWS, h, device=device, dtype=kind)
            weight = torch.randn(v, h, device=device, dtype=kind)
            works[str(kind)] = partial(nn.functional.linear, states, weight)
        times = seconds(works, repeats).values()
        columns = "".join(f"{2 * ROWS * h * v / t / 1e9:9.0f}" for t in times)
        print(f"  {h:>5} -> {v:<6}{'':18}{columns}")


def main() -> None:
    """Print the rates, then the two heads."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", required=True, help="folder of a causal language model")
    parser.add_argument("--repeats", type=int, default=7, help="calls of which the median is taken")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = devices.pick("auto")
    tokenizer = load_tokenizer(args.policy)
    model = load_policy(args.policy, tokenizer, device)
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    h, m, v = config.hidden_size, config.intermediate_size, config.vocab_size
    rates([(h, h), (h, m), (m, h), (h, v)], device, args.repeats)
    size = sum(w.numel() for w in model.parameters())
    print(f"--precision auto: {'bf16' if devices.use_bf16('auto', device, size) else 'fp32'}\n")

    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    forwards = {"float32 head": head.forward, "bfloat16 head": type(head).forward.__get__(head)}
    scorer = Scorer(model, plain=False)
    texts = ("A ferry is", "Describe a lighthouse in one sentence.", "The sea", "Why")
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    seeds = [row_seed(0, 0, i, k) for i in range(4) for k in range(4)]
    sampling = Sampling(48, (), tokenizer.pad_token_id)
    works, gaps = {}, {}
    for name, forward in forwards.items():
        head.forward = forward
        with devices.autocast(device, True):
            out = sample(model, prompts, seeds, sampling, device)

        def score(forward: Any = forward, out: Any = out) -> Tensor:
            head.forward = forward
            with devices.autocast(device, True):
                logp: Tensor = scorer(out.prompt, out.prompt_mask, out.response, out.mask)
            logp.sum().backward()
            return logp.detach()

        works[name], gaps[name] = score, score() - out.logp
    times = seconds(works, args.repeats)
    print(f"{'':<14} scoring pass, s   gap a token, sd   outside [0.9, 1.1]")
    for name, gap in gaps.items():
        outside = ((gap.exp() - 1).abs() > 0.1).float().mean()
        print(f"{name:<14} {times[name]:15.2f} {gap.std():17.3f} {outside:20.1%}")


if __name__ == "__main__":
    main()
