"""Supervised fine-tuning: maximise log pi(answer | prompt), the loss on the answer's tokens alone.

    python recipes/sft.py --model BASE --data chats.jsonl --out SFT

    loss = -(1/N) sum over answer tokens of log pi(token)     N: answer tokens of the whole batch

An example is {"messages": [..., the assistant's answer]}, {"prompt", "completion"}, or a preference
pair, whose chosen reply is the answer. A prompt may be text or messages. The prompt is tokenized
without the answer, as it will be when the policy answers, and the answer ends with an end token.
With --lora-rank adapters alone are trained, and merged before the model is saved.
"""

import sys
from collections import Counter
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
from reinforce import device as devices
from reinforce import lora
from reinforce.data.preferences import Messages, conversation, flaw_of_reply, side
from reinforce.data.records import BadLineError, columns, must_be_unicode, read_records
from reinforce.errors import ConfigError
from reinforce.flags import flag, parse, refuse
from reinforce.guard import head_is_plain
from reinforce.logprobs import Scorer
from reinforce.policy import (
    blocks,
    context_length,
    end_tokens,
    load_policy,
    load_tokenizer,
    refuse_ids,
    refuse_targets,
    with_template,
)
from reinforce.rollout import micro_batches
from reinforce.run.exits import run
from reinforce.run.folder import new_folder
from reinforce.sampler import left_pad
from reinforce.text import encode, is_chat, render

POSITIVE = ("lr", "epochs", "batch_size", "micro_batch_tokens", "max_length", "max_examples")
# token ids of a prompt, and of its answer with the end token
Example = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Config:
    """The flags of recipes/sft.py."""

    model: str | None = flag(
        None, "model and data", "causal language model to start from: folder or hub id"
    )
    data: str | None = flag(
        None,
        "model and data",
        "training examples (chats, texts or pairs): jsonl, json, csv, parquet, folder or hub id",
    )
    val_data: str | None = flag(
        None,
        "model and data",
        "examples in any form of --data that only measure the loss before and after training",
    )
    max_length: int = flag(
        512, "model and data", "tokens of an example at most; longer examples are left out"
    )
    max_examples: int | None = flag(None, "model and data", "training examples at most")
    skip_bad_lines: bool = flag(
        False, "model and data", "leave out malformed lines and count them, instead of refusing"
    )
    out: str | None = flag(None, "model and data", "new folder for the trained model")
    lr: float = flag(2e-5, "training", "peak learning rate of AdamW")
    epochs: float = flag(1.0, "training", "times through the training examples")
    batch_size: int = flag(16, "training", "examples per optimizer step")
    micro_batch_tokens: int = flag(2048, "training", "tokens of one forward and backward pass")
    seed: int = flag(0, "training", "seed of the order of the examples")
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
        refuse(self, needed=("model", "data", "out"), positive=POSITIVE)
        lora.check_flags(self.lora_rank, self.lora_alpha, self.lora_targets)


def check_example(record: Any) -> Messages | tuple[str, str]:
    """A record as a chat, or as prompt and answer. Raises BadLineError."""
    if not isinstance(record, dict):
        raise BadLineError("not an object")
    for key in ("messages", "prompt", "completion"):
        must_be_unicode(key, record.get(key))
    if "chosen" in record:
        return side(record, "chosen")
    if "messages" in record:
        return conversation(record["messages"])
    if "prompt" not in record or "completion" not in record:
        forms = '"messages", "prompt" and "completion", or "chosen"'
        raise BadLineError(f"an example needs {forms}; {columns(record)}")
    prompt, completion = record["prompt"], record["completion"]
    if is_chat(prompt):
        said = completion if is_chat(completion) else [{"role": "assistant", "content": completion}]
        return conversation([*prompt, *said])
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise BadLineError('"prompt" and "completion" must be strings, or lists of messages')
    if not prompt.strip() or not completion.strip():
        raise BadLineError('"prompt" and "completion" must not be empty')
    return prompt, completion


def encode_example(
    tokenizer: Any, ends: Sequence[int], example: Messages | tuple[str, str]
) -> Example:
    """Token ids of the prompt, and of the answer up to its first end token. Raises ConfigError."""
    if isinstance(example, tuple):
        before, whole = example[0], example[0] + example[1]
        prompt, both = encode(tokenizer, before), encode(tokenizer, whole)
    else:
        before = render(tokenizer, example[:-1], "--data", add_generation_prompt=True)
        whole = render(tokenizer, example, "--data")
        if not whole.startswith(before):
            raise ConfigError(
                "--model: its chat template renders an answer of --data otherwise than its "
                "generation prompt begins; give a model with another template"
            )
        prompt, both = (
            list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (before, whole)
        )
    if not prompt:
        raise ConfigError(f"--model: its tokenizer makes no token of the prompt {before[:60]!r}")
    # what follows the prompt's own tokens; alone, a text may get a token of its own at its start
    ids = both[len(prompt) :]
    if both[: len(prompt)] != prompt:  # a token spans the end of the prompt
        ids = continued(tokenizer, prompt, both, whole[len(before) :])
    n = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    end = ends[0] if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    return prompt, [*ids[:n], ids[n] if n < len(ids) else end]


def continued(tokenizer: Any, prompt: list[int], both: list[int], answer: str) -> list[int]:
    """Token ids of an answer behind the prompt's own, so that they say what `both` says.

    A tokenizer may put a space before a text that begins, so it begins with one character more.
    """

    def ids_of(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    for before in ("", "\n", ":", "."):
        start, ids = ids_of(before), ids_of(before + answer)
        rest = ids[len(start) :]
        if [*start, *rest] == ids and tokenizer.decode([*prompt, *rest]) == tokenizer.decode(both):
            return rest
    return ids_of(answer)


def loss_sum(
    scorer: nn.Module, examples: Sequence[Example], pad_id: int, bf16: bool
) -> torch.Tensor:
    """Sum of -log pi over the tokens of the answers, nats."""
    device = next(scorer.parameters()).device
    prompt, prompt_mask = left_pad([p for p, _ in examples], pad_id, device)  # (B, S)
    reversed_answers = [list(answer)[::-1] for _, answer in examples]
    padded = left_pad(reversed_answers, pad_id, device)
    answer, mask = (x.flip(1) for x in padded)  # (B, T), padded right
    with devices.autocast(device, bf16):
        return cast(torch.Tensor, -scorer(prompt, prompt_mask, answer, mask).sum())


def train_sft(
    model: nn.Module, examples: Sequence[Example], pad_id: int, plan: Plan, bf16: bool = False
) -> float:
    """Train in place; return the mean loss of the last tenth of the steps, nats a token."""
    scorer = Scorer(model, head_is_plain(model)).to(next(model.parameters()).device)
    lengths, count = [(len(p), len(a)) for p, a in examples], [len(a) for _, a in examples]

    def summed(rows: list[int]) -> torch.Tensor:
        return loss_sum(scorer, [examples[i] for i in rows], pad_id, bf16)

    return fit(model, lengths, count, summed, plan)


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    examples: Sequence[Example],
    pad_id: int,
    bf16: bool = False,
    most: int = Plan.micro_batch_tokens,
) -> float:
    """Mean of -log pi over the tokens of the answers, nats a token; `most` tokens at a time."""
    scorer = Scorer(model, head_is_plain(model)).to(next(model.parameters()).device)
    left, right = zip(*((len(p), len(a)) for p, a in examples), strict=True)
    total = 0.0
    for rows in micro_batches(left, right, len(examples), most):
        total += loss_sum(scorer, [examples[i] for i in rows], pad_id, bf16).item()
    return total / sum(len(a) for _, a in examples)


def main() -> None:
    """Read the examples, train, measure the loss and save the model."""
    config = parse(Config, __doc__)
    assert config.model is not None and config.data is not None and config.out is not None
    sources = {"--data": config.data, "--val-data": config.val_data}
    chats = {}
    for name, source in sources.items():
        if source is not None:
            read, bad = read_records(source, name, check_example, config.skip_bad_lines, "examples")
            if bad:
                print(f"{name}: left out {bad} malformed lines (--skip-bad-lines)")
            flaws = [None if isinstance(chat, tuple) else flaw_of_reply(chat) for chat in read]
            for flaw, count in Counter(flaw for flaw in flaws if flaw).items():
                print(f"{name}: left out {count}, {flaw}")
            chats[name] = [chat for chat, flaw in zip(read, flaws, strict=True) if flaw is None]
            if not chats[name]:
                raise ConfigError(f"{name} {source}: no example with a reply to learn from")
    if config.lora_rank:
        refuse_targets(config.model, config.lora_targets, "--model")
    new_folder(config.out, "--out")
    tokenizer = load_tokenizer(config.model, "--model")
    longest = min(config.max_length, context_length(config.model, "--model") or config.max_length)
    if any(isinstance(chat, list) for part in chats.values() for chat in part):
        with_template(tokenizer, "--model")
    ends = end_tokens(config.model, tokenizer, "--model")
    data = {}
    for name, part in chats.items():
        encoded = [encode_example(tokenizer, ends, chat) for chat in part]
        data[name] = [e for e in encoded if len(e[0]) + len(e[1]) <= longest]
        kept, dropped = len(data[name]), len(encoded) - len(data[name])
        print(f"{name}: {kept} examples; left out {dropped} longer than {longest} tokens")
        if not data[name]:
            raise ConfigError(f"{name}: every example is longer than {longest} tokens")
    train, val = data["--data"][: config.max_examples], data.get("--val-data", [])
    device = devices.pick(config.device)
    model = load_policy(config.model, tokenizer, device, flag="--model")
    refuse_ids(model, [[*p, *a] for p, a in [*train, *val]], f"--model {config.model}")
    if config.lora_rank:
        adapted = lora.layers(blocks(model), model, config.lora_targets)
        lora.add(model, adapted, config.lora_rank, config.lora_alpha, config.seed)
        print(lora.summary(model))
    size = sum(w.numel() for w in model.parameters())
    bf16 = devices.use_bf16(config.precision, device, size)
    print(f"device {device} · {'bf16' if bf16 else 'fp32'} · {size / 1e6:.1f}M parameters")

    pad = tokenizer.pad_token_id
    most = config.micro_batch_tokens
    before = mean_loss(model, val, pad, bf16, most) if val else None
    plan = Plan(config.lr, config.batch_size, config.epochs, config.seed, config.micro_batch_tokens)
    loss = train_sft(model, train, pad, plan, bf16)
    print(f"training loss {loss:.3f} nats a token, over the last steps; {len(train)} examples")
    if before is not None:
        after = mean_loss(model, val, pad, bf16, most)
        print(f"--val-data: {before:.3f} before, {after:.3f} after, on {len(val)} examples")
    lora.merge(model)  # the folder is an ordinary one, also with LoRA
    cast(Any, model).save_pretrained(config.out)
    tokenizer.save_pretrained(config.out)
    print(f"saved {config.out}")


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    sys.exit(run(main, name="recipes/sft.py"))
