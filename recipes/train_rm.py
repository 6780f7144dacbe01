"""Reward-model training on preference pairs, by the model of Bradley and Terry.

    python recipes/train_rm.py --model SFT --pairs PAIRS.jsonl.gz --out RM

    P(chosen > rejected) = sigmoid(r(chosen) - r(rejected))
    loss = -(1/n) sum over pairs of log sigmoid(r(chosen) - r(rejected) - margin)

Any Hugging Face backbone gets a scalar head. Pairs are split by their opening message. The report
is the share of held-out pairs that the model orders as people did, with a 95 % interval. Mean and
deviation of the model's scores are stored in its config.json, and serve_rm.py standardises rewards
by them. With --lora-rank adapters and the head are trained, and merged before the model is saved.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes.fit import Plan, fit
from recipes.intervals import wilson
from reinforce import adapter, lora
from reinforce import device as devices
from reinforce.data.preferences import Preference, read_pairs, split_by_opening
from reinforce.errors import ConfigError, FailedError
from reinforce.flags import flag, parse, refuse
from reinforce.policy import blocks, context_length, load_tokenizer, refuse_ids, with_template
from reinforce.rollout import micro_batches
from reinforce.run.exits import run
from reinforce.run.folder import new_folder
from reinforce.serving.reward_model import bradley_terry_loss, messages_ids, new_reward_model, score

POSITIVE = ("lr", "epochs", "batch_size", "micro_batch_tokens", "max_length", "max_pairs")
# the seed of the split: not that of recipes/hh.py, whose train.jsonl has none of its held-out side
SPLIT = 1
LARGEST_MARGIN = 1e6
# token ids of prompt and chosen response, and of prompt and rejected response
Pair = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Config:
    """The flags of recipes/train_rm.py."""

    model: str | None = flag(
        None, "model and data", "backbone to start from, say the SFT model: folder or hub id"
    )
    pairs: str | None = flag(
        None,
        "model and data",
        "pairs, chosen and rejected, as HH-RLHF or chat messages: jsonl, json, csv, parquet, "
        "folder or hub id",
    )
    test_pairs: str | None = flag(
        None,
        "model and data",
        "pairs that only measure accuracy (default: the share --held-out of --pairs)",
    )
    held_out: float = flag(
        0.2,
        "model and data",
        "share of --pairs that only measures accuracy; unused with --test-pairs",
    )
    max_length: int = flag(
        512, "model and data", "tokens of a conversation at most; longer pairs are left out"
    )
    max_pairs: int | None = flag(None, "model and data", "training pairs at most")
    skip_bad_lines: bool = flag(
        False, "model and data", "leave out malformed lines and count them, instead of refusing"
    )
    out: str | None = flag(None, "model and data", "new folder for the reward model")
    margin: float = flag(
        0.0, "training", "by how much the reward of the chosen reply must be higher"
    )
    lr: float = flag(2e-5, "training", "peak learning rate of AdamW")
    epochs: float = flag(1.0, "training", "times through the training pairs")
    batch_size: int = flag(16, "training", "pairs per optimizer step")
    micro_batch_tokens: int = flag(2048, "training", "tokens of one forward and backward pass")
    seed: int = flag(0, "training", "seed of the new head and of the order of the pairs")
    lora_rank: int = flag(
        0,
        "LoRA",
        "r, rank of the change that each adapted layer learns; 0: all weights are trained",
    )
    lora_alpha: float | None = flag(
        None, "LoRA", "alpha; a layer's change is alpha / r * B A x (default: 2 r)"
    )
    lora_targets: tuple[str, ...] = flag(
        (),
        "LoRA",
        "names of the adapted layers, say q_proj v_proj (default: all linear layers of the blocks)",
        nargs="+",
    )
    device: str = flag("auto", "hardware", "where to compute", choices=("auto", "cpu", "cuda"))
    precision: str = flag(
        "auto",
        "hardware",
        "bf16: bfloat16 matrix products over float32 weights; auto: bf16 where it is fast",
        choices=("auto", "fp32", "bf16"),
    )

    def check(self) -> None:
        """Raise ConfigError on the first combination that cannot work."""
        refuse(self, needed=("model", "pairs", "out"), positive=POSITIVE)
        lora.check_flags(self.lora_rank, self.lora_alpha, self.lora_targets)
        if not 0 <= self.margin <= LARGEST_MARGIN:
            raise ConfigError(f"--margin is {self.margin}; it must be from 0 to {LARGEST_MARGIN:g}")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"--held-out is {self.held_out}; it must be between 0 and 1")


def train_reward_model(
    model: nn.Module,
    pairs: Sequence[Pair],
    pad_id: int,
    plan: Plan,
    margin: float = 0.0,
    bf16: bool = False,
) -> float:
    """Train in place and return the mean loss of the last tenth of the steps, nats a pair.

    A model that knows nothing has a loss of 0.69.
    """
    device = next(model.parameters()).device

    def loss_sum(rows: list[int]) -> torch.Tensor:
        texts = [pairs[i][0] for i in rows] + [pairs[i][1] for i in rows]
        with devices.autocast(device, bf16):
            rewards = score(model, texts, pad_id)  # (2n,)
        chosen, rejected = rewards.chunk(2)  # (n,) each
        return bradley_terry_loss(chosen - margin, rejected) * len(rows)

    lengths = [(2 * max(len(chosen), len(rejected)), 0) for chosen, rejected in pairs]
    return fit(model, lengths, [1] * len(pairs), loss_sum, plan)


@torch.no_grad()
def scores(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    pad_id: int,
    bf16: bool = False,
    most: int = Plan.micro_batch_tokens,
) -> torch.Tensor:
    """Reward of each sequence, (n,) float32 on the CPU; `most` tokens at a time."""
    device = next(model.parameters()).device
    out = torch.zeros(len(sequences))
    length = [len(sequence) for sequence in sequences]
    for rows in micro_batches(length, [0] * len(length), len(length), most):
        with devices.autocast(device, bf16):
            out[rows] = score(model, [sequences[i] for i in rows], pad_id).cpu()
    return out


def pair_accuracy(
    model: nn.Module,
    pairs: Sequence[Pair],
    pad_id: int,
    bf16: bool = False,
    most: int = Plan.micro_batch_tokens,
) -> float:
    """Share of pairs whose chosen response gets the higher reward; equal rewards count half."""
    sequences = [sequence for pair in pairs for sequence in pair]
    rewards = scores(model, sequences, pad_id, bf16, most)  # (2n,)
    chosen, rejected = rewards.view(-1, 2).unbind(1)  # (n,) each
    return ((chosen > rejected).float() + 0.5 * (chosen == rejected).float()).mean().item()


def standardise(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    pad_id: int,
    bf16: bool = False,
    most: int = Plan.micro_batch_tokens,
) -> tuple[float, float]:
    """Mean and deviation of the reward on these sequences.

    Both are stored in the model's config, where serve_rm.py finds them.
    """
    rewards = scores(model, sequences, pad_id, bf16, most)
    mean, std = rewards.mean().item(), rewards.std().item()
    if not 0 < std < math.inf:
        raise FailedError(f"the scores have a deviation of {std}: nothing to tell answers apart")
    cast(Any, model).config.reward_mean, cast(Any, model).config.reward_std = mean, std
    return mean, std


def encode_pairs(tokenizer: Any, pairs: Sequence[Preference], max_length: int) -> list[Pair]:
    """Both conversations of each pair, rendered as serve_rm.py renders them.

    A pair with a conversation of more than `max_length` tokens is left out.
    """
    encoded: list[Pair] = []
    for pair in pairs:
        replies = (
            [*pair.prompt, {"role": "assistant", "content": reply}]
            for reply in (pair.chosen, pair.rejected)
        )
        both = [messages_ids(tokenizer, messages, finished=True) for messages in replies]
        if max(map(len, both)) <= max_length:
            encoded.append((both[0], both[1]))
    return encoded


def add_adapters(model: nn.Module, config: Config) -> None:
    """Train adapters of the backbone, and the new head whole. Raises ConfigError."""
    adapted = lora.layers(blocks(model), model, config.lora_targets)
    lora.add(model, adapted, config.lora_rank, config.lora_alpha, config.seed)
    backbone = cast(Any, model).base_model
    for head in model.children():
        if head is not backbone:
            head.requires_grad_(True)
    print(lora.summary(model))


def print_odd(odd: dict[str, int], flag: str) -> None:
    """Print how many pairs of a file were odd, and for what reason."""
    for reason, count in odd.items():
        print(f"{flag}: {count} {reason}")


def main() -> None:
    """Read the pairs, split them, train, measure the accuracy and save the model."""
    config = parse(Config, __doc__)
    assert config.model is not None and config.pairs is not None and config.out is not None
    found, odd = read_pairs(config.pairs, "--pairs", config.skip_bad_lines)
    print_odd(odd, "--pairs")
    if config.test_pairs is None:
        sides = split_by_opening(found, config.held_out, SPLIT)
    else:
        test, odd = read_pairs(config.test_pairs, "--test-pairs", config.skip_bad_lines)
        print_odd(odd, "--test-pairs")
        sides = found, test
    adapter.refuse(config.model, "--model")
    new_folder(config.out, "--out")
    tokenizer = with_template(load_tokenizer(config.model, "--model"), "--model")
    longest = min(config.max_length, context_length(config.model, "--model") or config.max_length)
    train, held_out = (encode_pairs(tokenizer, part, longest) for part in sides)
    long = sum(map(len, sides)) - len(train) - len(held_out)
    train = train[: config.max_pairs]
    sizes = f"{len(train)} to train on, {len(held_out)} held out"
    print(f"--pairs: {sizes}; left out {long} of more than {longest} tokens")
    if not train or not held_out:
        raise ConfigError(
            f"{'--pairs' if not train or config.test_pairs is None else '--test-pairs'}: one side "
            "of the split is empty; give more pairs, another --held-out or --max-length"
        )
    device = devices.pick(config.device)
    torch.manual_seed(config.seed)
    model = new_reward_model(config.model, tokenizer, device, "--model")
    texts = [ids for pair in [*train, *held_out] for ids in pair]
    refuse_ids(model, texts, f"--model {config.model}")
    if config.lora_rank:
        add_adapters(model, config)
    size = sum(w.numel() for w in model.parameters())
    bf16 = devices.use_bf16(config.precision, device, size)
    print(f"device {device} · {'bf16' if bf16 else 'fp32'} · {size / 1e6:.1f}M parameters")

    pad = tokenizer.pad_token_id
    plan = Plan(config.lr, config.batch_size, config.epochs, config.seed, config.micro_batch_tokens)
    loss = train_reward_model(model, train, pad, plan, config.margin, bf16)
    most = config.micro_batch_tokens
    accuracy = pair_accuracy(model, held_out, pad, bf16, most)
    low, high = wilson(accuracy * len(held_out), len(held_out))
    sequences = [sequence for pair in train[:256] for sequence in pair]
    mean, std = standardise(model, sequences, pad, bf16, most)
    lora.merge(model)  # the folder is an ordinary one, also with LoRA
    cast(Any, model).save_pretrained(config.out)
    tokenizer.save_pretrained(config.out)
    interval = f"95 % interval {low:.3f} to {high:.3f}"
    pairs = f"{len(held_out)} pairs"
    print(f"held-out accuracy {accuracy:.3f} ({interval}) on {pairs}; training loss {loss:.3f}")
    print(f"scores: mean {mean:.3f}, deviation {std:.3f}, stored in {config.out}/config.json")


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    sys.exit(run(main, name="recipes/train_rm.py"))
