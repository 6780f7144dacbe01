"""What this machine can do at most, and the model that is measured: for decode.py and update.py."""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from reinforce import device as devices
from reinforce import load_policy, load_tokenizer

SHAPES = {  # LLaMA with random weights: hidden size, MLP, layers, query heads, KV heads, vocabulary
    "tiny": (256, 768, 4, 8, 4, 8192),
    "135m": (576, 1536, 30, 9, 3, 49152),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "8b": (4096, 14336, 32, 32, 8, 128256),
}


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The flags that both scripts have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", help="folder of a causal language model")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="instead: random weights")
    parser.add_argument(
        "--precision", choices=("auto", "bf16", "fp32"), default="auto", help="of the products"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where")
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the median is taken")
    return parser


def model_of(args: argparse.Namespace) -> tuple[Any, torch.device, bool]:
    """The model in float32, the device, and whether products are in bfloat16."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = devices.pick(args.device)
    if args.policy:
        model: Any = load_policy(args.policy, load_tokenizer(args.policy), device)
    else:
        model = random_llama(args.shape or "tiny").to(device)
    size = sum(w.numel() for w in model.parameters())
    return model, device, devices.use_bf16(args.precision, device, size)


def random_llama(shape: str) -> Any:
    """A LLaMA of one of the shapes, its output head as `load_policy` makes it."""
    from reinforce import attention
    from reinforce.head import give_float32_logits

    attention.use_for_models()
    hidden, mlp, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
    )
    return give_float32_logits(transformers.LlamaForCausalLM(config).eval())


def linear_layers(model: Any) -> list[nn.Linear]:
    """Every linear layer, the output head included: what the products of a token go through."""
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


def median_seconds(
    work: Callable[[], Any], repeats: int, device: torch.device, unsettled: int = 1
) -> float:
    """Median seconds of a call, after so many `unsettled` ones that do not count."""
    taken = []
    for _ in range(unsettled + repeats):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[unsettled:])


def read_rate(device: torch.device) -> float:
    """Bytes a second that a sum over 1 GiB reads."""
    data = torch.ones(2**28, device=device)
    return 2**30 / median_seconds(data.sum, 5, device)


def product_rate(layers: list[nn.Linear], rows: int, bf16: bool, device: torch.device) -> float:
    """FLOP/s of forward, input and weight gradient of the layers alone, at so many rows."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    shapes = [tuple(layer.weight.shape) for layer in layers]
    weights = {shape: torch.randn(shape, dtype=dtype, device=device) for shape in set(shapes)}
    inputs = {i: torch.randn(rows, i, dtype=dtype, device=device) for _, i in shapes}
    outputs = {o: torch.randn(rows, o, dtype=dtype, device=device) for o, _ in shapes}

    def products() -> Tensor | None:
        last = None
        for out_size, in_size in shapes:
            weight, grad = weights[out_size, in_size], outputs[out_size]
            nn.functional.linear(inputs[in_size], weight)
            grad @ weight
            last = grad.t() @ inputs[in_size]
        return last

    flop = sum(6 * rows * o * i for o, i in shapes)
    return flop / median_seconds(products, 3, device)


def line_fit(x: Sequence[float], y: Sequence[float]) -> str:
    """The least squares line of y over x, and its largest residual, in words."""
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum(
        (a - mean_x) ** 2 for a in x
    )
    base = mean_y - slope * mean_x
    worst = max(abs(b - base - slope * a) / b for a, b in zip(x, y, strict=True))
    return f"{base:.3f} s + {1000 * slope:.3f} ms each, at most {worst:.0%} off"


def print_growth(times: dict[tuple[int, int], float]) -> None:
    """How seconds grow with B at the largest T, and with T at the largest B, from three on."""
    b, t = max(times)[0], max(t for _, t in times)
    rows, tokens = sorted({b for b, _ in times}), sorted({t for _, t in times})
    if len(rows) > 2:
        print(f"over B at T = {t}: {line_fit(rows, [times[row, t] for row in rows])}")
    if len(tokens) > 2:
        print(f"over T at B = {b}: {line_fit(tokens, [times[b, token] for token in tokens])}")
