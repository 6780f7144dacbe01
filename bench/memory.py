"""The device's memory in a step, for each combination of the offload flags, beside the formula.

    python bench/memory.py --policy cache/smollm2/policy      one step of that policy, four times
    python bench/memory.py --table                            what fits: 1B, 3B, 8B, 14B

On a GPU the peaks are measured (PyTorch's allocator). On a CPU they are counted: every tensor that
an operation makes is added while it lives, and copies that would be the host's are left out. The
formula has weights, gradients, averages and their copies, so what is above it are activations, the
key-value cache and logits. The table is computed: parameters are counted on the meta device.
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import sys
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from reinforce import device as devices
from reinforce import load_tokenizer, optim
from reinforce.data.prompts import Data
from reinforce.loss import token_weights
from reinforce.policy import end_tokens
from reinforce.rollout import Batch
from reinforce.run.actor import Actor
from reinforce.run.config import TrainConfig
from reinforce.run.loading import load
from reinforce.run.offload import HostAdamW, Idle, Moves
from reinforce.run.resume import Start
from reinforce.run.setup import Inputs
from reinforce.run.update import Update
from reinforce.text import Prompt

FLAGS = ("--offload-reference", "--offload-optimizer")
COMBINATIONS = list(itertools.product((False, True), repeat=2))
GIB, MIB = 2**30, 2**20
# the shapes of Llama 3.2 1B and 3B, Llama 3.1 8B, Qwen2.5 14B
LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8}
SIZES = {
    "1B": LlamaConfig(
        **LLAMA,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        tie_word_embeddings=True,
    ),
    "3B": LlamaConfig(
        **LLAMA,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        tie_word_embeddings=True,
    ),
    "8B": LlamaConfig(
        **LLAMA,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
    ),
    "14B": Qwen2Config(
        vocab_size=152064,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    ),
}


def formula(model: nn.Module, bf16: bool, on_host: tuple[bool, bool]) -> dict[str, int]:
    """Bytes at each part of a step on one rank, without activations; `on_host` as FLAGS."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    sizes = [p.numel() for p in model.parameters()]
    n, half = sum(sizes), sum(w.numel() for w in linear) if bf16 else 0
    reference, copies = 4 * n - 2 * half, 2 * half
    waiting, averages = (0 if on_host[0] else reference), (0 if on_host[1] else 8 * n)
    held = 4 * n + waiting + averages
    return {
        "sampling": held + copies,
        "scoring": held - waiting + reference,
        "update": held + copies + 4 * n,
        "AdamW": held + 4 * n + (8 * max(sizes) if on_host[1] else 0),
    }


class Counter(TorchDispatchMode):
    """Bytes of all tensors that live, and their most so far."""

    def __init__(self) -> None:
        """Nothing lives yet."""
        super().__init__()
        self.now = self.peak = 0
        self._living: dict[Any, int] = {}
        self._on_host: set[Any] = set()

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's memory as long as it lives; a view has none of its own."""
        if tensor.is_mkldnn:  # weights laid out for a CPU's sampling: they have no storage
            size = tensor.numel() * tensor.element_size()
            weakref.finalize(tensor, self._less, size)
            self.now += size
            self.peak = max(self.peak, self.now)
            return
        storage = tensor.untyped_storage()
        key = weakref.ref(storage, self._gone)
        if key not in self._living and key not in self._on_host:
            self._living[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def leave_out(self, tensor: Tensor) -> None:
        """The tensor's memory is the host's."""
        key = weakref.ref(tensor.untyped_storage())
        self._gone(key)
        self._on_host.add(key)

    def _gone(self, key: Any) -> None:
        self._less(self._living.pop(key, 0))

    def _less(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return out


class StandIn(Moves):
    """Copies within the CPU: the host's are not counted."""

    def __init__(self, counter: Counter) -> None:
        """`counter` counts the device's."""
        super().__init__(torch.device("cpu"))
        self._counter = counter

    def to_device(self, host: Tensor) -> Tensor:
        """Another tensor, which is counted."""
        return host.clone()

    def new_host(self, like: Tensor) -> Tensor:
        """Memory that is not counted."""
        host = torch.empty_like(like)
        self._counter.leave_out(host)
        return host

    def wait(self) -> None:
        """A CPU's copies are done at once."""


def make_actor(policy: str, bf16: bool, on_host: tuple[bool, bool]) -> Actor:
    """The actor of train.py for four prompts, without a reward server."""
    config = TrainConfig(
        precision="bf16" if bf16 else "fp32",
        max_new_tokens=8,
        num_rollouts_per_prompt=2,
        offload_reference=on_host[0],
        offload_optimizer=on_host[1],
    ).filled()
    tokenizer = load_tokenizer(policy)
    texts = ("A ferry is", "The sea", "Why", "Describe a lighthouse")
    ids = [tuple(tokenizer(text)["input_ids"]) for text in texts]
    data = Data([Prompt(i, texts[i], ids[i]) for i in range(4)], [], 4, 0)
    ends, device = end_tokens(policy, tokenizer), devices.pick("auto")
    client: Any = None
    inputs = Inputs(config, device, Start(), policy, "--policy", tokenizer, ends, data, client)
    with contextlib.redirect_stdout(io.StringIO()):  # the lines of a run's beginning
        return load(inputs)


def step(actor: Actor, optimizer: torch.optim.Optimizer) -> Iterator[str]:
    """One step of train.py, rewards apart; yields the name of each part once it is done."""
    prompts = [Prompt(i, "", (i + 3, i + 4, i + 5)) for i in range(4)]
    rollout = actor.sample(prompts, 0)
    yield "sampling"
    actor.reference_logp(rollout)
    yield "scoring"
    rows = len(rollout.mask)
    advantage = torch.linspace(-1, 1, rows, device=actor.device)  # (B,)
    batch = Batch(rollout, advantage, token_weights(rollout.mask, "sequence"))
    train.backward(actor, batch, Update(range(len(prompts)), list(range(rows)), rows))
    optim.clip(actor.model, 1.0)
    yield "update"
    optimizer.step()
    optimizer.zero_grad()
    yield "AdamW"


def peaks(policy: str, bf16: bool, on_host: tuple[bool, bool]) -> tuple[dict[str, int], nn.Module]:
    """The most bytes in each part of a second step, and the policy; the first makes averages."""
    actor, found = make_actor(policy, bf16, on_host), dict[str, int]()
    if actor.device.type == "cuda":
        optimizer = optim.adamw(actor.model, 1e-6, (0.9, 0.95), 0.0, actor.adamw)
        for _ in range(2):
            for name in step(actor, optimizer):
                found[name] = torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()
        return found, actor.model
    with Counter() as counter:
        assert actor.reference is not None
        for model in (actor.model, actor.reference):
            for tensor in [*model.parameters(), *model.buffers()]:
                counter.add(tensor.data)
        moves = StandIn(counter)
        idle = Idle(actor.reference, moves) if on_host[0] else Idle()
        kind = partial(HostAdamW, moves=moves) if on_host[1] else torch.optim.AdamW
        actor = dataclasses.replace(actor, idle=idle)
        optimizer = optim.adamw(actor.model, 1e-6, (0.9, 0.95), 0.0, kind)
        for _ in range(2):
            for name in step(actor, optimizer):
                found[name], counter.peak = counter.peak, counter.now
    return found, actor.model


def name_of(on_host: tuple[bool, bool]) -> str:
    """The flags of a combination."""
    return " ".join(flag for flag, given in zip(FLAGS, on_host, strict=True) if given) or "-"


def print_peaks(policy: str, bf16: bool) -> None:
    """Print the peak of each part of a step beside the formula, MiB."""
    on_gpu = torch.cuda.is_available()
    kind = f"measured on {torch.cuda.get_device_name()}" if on_gpu else "counted on the CPU"
    print(f"{'bf16' if bf16 else 'fp32'}, MiB {kind} (formula); most: bytes a parameter")
    print("".join(f"{part:>15}" for part in ("sampling", "scoring", "update", "AdamW", "most")))
    for on_host in COMBINATIONS:
        found, model = peaks(policy, bf16, on_host)
        right = formula(model, bf16, on_host)
        n = sum(p.numel() for p in model.parameters())
        pairs = [f"{found[part] / MIB:.0f} ({right[part] / MIB:.0f})" for part in right]
        pairs.append(f"{max(found.values()) / n:.1f} ({max(right.values()) / n:.1f})")
        print("".join(f"{pair:>15}" for pair in pairs) + f"  {name_of(on_host)}", flush=True)


def print_table() -> None:
    """Print what each size needs on one GPU, GiB, by the formula."""
    print("computed on the meta device, without activations, caches and logits")
    print(f"{'size':<5} {'parameters':>13}  {'flags':<41} {'GiB, bf16':>9} {'GiB, fp32':>9}")
    for size, config in SIZES.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        n = sum(p.numel() for p in model.parameters())
        for on_host in COMBINATIONS:
            bf16, fp32 = (
                max(formula(model, kind, on_host).values()) / GIB for kind in (True, False)
            )
            print(f"{size:<5} {n:>13,}  {name_of(on_host):<41} {bf16:9.1f} {fp32:9.1f}")


def main() -> None:
    """Print the table, or the peaks of a policy."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--policy", help="folder of a causal language model, whose step is measured")
    what.add_argument("--table", action="store_true", help="compute what fits, 1B to 14B")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.table:
        print_table()
        return
    for bf16 in (False, True):
        print_peaks(args.policy, bf16)


if __name__ == "__main__":
    main()
