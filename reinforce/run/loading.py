"""From checked inputs to the actor: the models are loaded, inspected, wrapped."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from reinforce import adapter, guard, lora
from reinforce import device as devices
from reinforce.data.prompts import Data
from reinforce.errors import ConfigError
from reinforce.logprobs import Scorer
from reinforce.policy import blocks, checkpoint_blocks, load_policy, refuse_ids, store_frozen
from reinforce.refused import Refusals
from reinforce.run import allocator, distributed, offload, same_model, shards, tensor_parallel
from reinforce.run.actor import Actor
from reinforce.run.config import TrainConfig
from reinforce.run.setup import Inputs, begin, check
from reinforce.sampler import CPU, Sampling


def set_up(
    config: TrainConfig,
    policy_flag: str = "--policy",
    data_flag: str = "--train-data",
    date: str | None = None,
) -> tuple[Actor, Data]:
    """A checked actor and its data, for a script that keeps no run folder.

    `date` is the day that chat templates print, by default today.
    """
    config = config.filled()
    begun = begin(config)
    if date is not None:
        begun = dataclasses.replace(begun, start=dataclasses.replace(begun.start, date=date))
    inputs = check(config, begun, policy_flag, data_flag)
    return load(inputs), inputs.data


def load(inputs: Inputs) -> Actor:
    """Load the models to their devices; the policy of a run that goes on is its checkpoint.

    With LoRA the checkpoint has the adapters alone, and the reference is the policy without them.
    """
    config, device, tokenizer, ends = inputs.config, inputs.device, inputs.tokenizer, inputs.end_ids
    if device.type == "cpu":
        allocator.keep_freed_memory()
    sharded = config.parallel == "fsdp"
    team = config.tensor_model_parallel_size
    # a device that takes a shard may be too small for the whole model
    load_device = CPU if sharded or team > 1 else device
    source = inputs.policy if inputs.start.folder is None else str(inputs.start.folder)
    stored = inputs.policy if config.lora_rank else source  # where the whole weights are
    model = load_first(inputs, stored, load_device)
    prompts = [p.ids for p in [*inputs.data.prompts, *inputs.data.held_out]]
    refuse_ids(model, prompts, f"{inputs.policy_flag} {inputs.policy}")
    if config.lora_rank:
        add_adapters(inputs, model)
    size = sum(w.numel() for w in model.parameters())
    bf16 = choose_precision(inputs, size)
    verdict = distributed.together(lambda: inspect(inputs, model, source), only_first=True)
    for name, weight in model.named_parameters():
        weight.requires_grad_(weight.requires_grad and name not in verdict.unused)
    # FSDP casts by itself, and wants one type in a block; between teams a bias is not cast
    half = bf16 and not sharded and team == 1
    dtype = torch.bfloat16 if half else torch.float32
    if config.lora_rank:
        store_frozen(model, dtype)
    if config.gradient_checkpointing:
        checkpoint_blocks(model)
    tensor_parallel.shard(model, device)

    def scorer_of(model: nn.Module) -> Scorer:
        sampled = (config.temperature, ends, config.min_new_tokens)
        scorer = Scorer(model, verdict.plain, *sampled, verdict.whole is None)
        if team > 1 or not sharded:
            shards.move(scorer, device)
        return scorer

    host = offload.chosen(config, device)
    scorer = scorer_of(model)
    # wrapped before the reference is loaded: a rank then never holds two whole models
    wrapped = distributed.wrap(scorer, device, config.parallel, bf16, host.optimizer)
    shards.read(scorer, stored, CPU if host.optimizer else device)
    tensor_parallel.place_gradients(model)
    if sharded or team > 1:
        name = f"{inputs.policy_flag} {source}"
        same_model.check(wrapped, scorer, verdict, device, bf16 and sharded, name)
    reference: nn.Module | None = None
    if config.initial_policy_kl_penalty > 0 and config.lora_rank:
        reference = lora.Initial(scorer)
    elif config.initial_policy_kl_penalty > 0:
        initial = shards.build(inputs.policy) if sharded or team > 1 else None
        if initial is None:
            initial = load_policy(inputs.policy, tokenizer, load_device, frozen_dtype=dtype)
        tensor_parallel.shard(initial.requires_grad_(False), device)
        frozen = scorer_of(initial)
        reference = distributed.wrap(frozen, device, config.parallel, bf16, host.reference)
        shards.read(frozen, inputs.policy, CPU if host.reference else device)
    training, validation = samplings(config, tokenizer, ends)
    if distributed.rank() == 0:
        print_setting(inputs, source, size, bf16)
        if config.lora_rank:
            print(lora.summary(model))
    return Actor(
        config=config,
        tokenizer=tokenizer,
        model=model,
        policy=scorer,
        scorer=wrapped,
        reference=reference,
        client=inputs.client,
        training=training,
        validation=validation,
        device=device,
        bf16=bf16,
        refusals=Refusals(config.skip_refused),
        adamw=offload.adamw(device, host.optimizer and not sharded),
        idle=offload.idle(reference, device, host.reference and not sharded),
    )


def load_first(inputs: Inputs, source: str, device: torch.device) -> nn.Module:
    """The policy to inspect: whole on rank 0; of a sharded model others read their shards alone.

    Raises ConfigError on every rank.
    """
    whole = partial(load_policy, source, inputs.tokenizer, device, flag=inputs.policy_flag)
    team = inputs.config.tensor_model_parallel_size
    if inputs.config.parallel != "fsdp" and team == 1:
        return whole()
    model: nn.Module | None = None

    def load_whole() -> None:
        nonlocal model
        model = whole()

    distributed.together(load_whole, only_first=True)
    return model or shards.build(source) or whole()


def add_adapters(inputs: Inputs, model: nn.Module) -> None:
    """Give the policy its adapters, new ones or those of a checkpoint. Raises ConfigError."""
    config, folder = inputs.config, inputs.start.folder
    names = lora.layers(blocks(model), model, config.lora_targets)
    lora.add(model, names, config.lora_rank, config.lora_alpha, config.seed)
    if folder is not None:
        adapter.read(model, str(folder), "--log-dir")


def inspect(inputs: Inputs, model: nn.Module, source: str) -> guard.Verdict:
    """Inspect the policy, and print the guard's verdict.

    Raises ConfigError if the policy must not be trained.
    """
    name = f"{inputs.policy_flag} {source}"
    prompts = [p.ids for p in inputs.data.prompts[:4]]
    pad, checkpointing = inputs.tokenizer.pad_token_id, inputs.config.gradient_checkpointing
    with all_processors(inputs.device):
        verdict = guard.inspect(model, prompts, inputs.end_ids, pad, checkpointing, name)
    print(
        f"checked in {verdict.seconds:.1f} s: log pi of a token differs "
        f"by {verdict.sampling:.0e} between sampler and scorer, "
        f"by {verdict.padding:.0e} with its neighbours"
    )
    rows, tokens = model.get_input_embeddings().weight.shape[0], len(inputs.tokenizer)  # type: ignore[operator]
    if rows > tokens:
        print(f"{name}: {rows - tokens} of its {rows} tokens have no text in its tokenizer")
    if not verdict.plain:
        print(
            f"{name}: this model does more than apply its head to hidden states; "
            "scoring with whole logits"
        )
    elif verdict.whole:
        print(
            f"{name}: prompts are computed again for each response, and padding with them "
            f"({verdict.whole})"
        )
    if verdict.unused:
        shown = ", ".join(verdict.unused[:3])
        print(
            f"{name}: {len(verdict.unused)} parameters have no part in the logits "
            f"and stay as they are ({shown})"
        )
    return verdict


@contextlib.contextmanager
def all_processors(device: torch.device) -> Iterator[None]:
    """A block of work on the host: where ranks compute on GPUs, each has one thread and waits."""
    threads = torch.get_num_threads()
    if device.type == "cuda":
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def choose_precision(inputs: Inputs, size: int) -> bool:
    """Whether models of `size` parameters run in bfloat16; the same on every rank.

    Raises ConfigError if --precision differs from that of a run that goes on.
    """
    config, before = inputs.config, inputs.start.bf16
    bf16 = all(distributed.of_all(devices.use_bf16(config.precision, inputs.device, size)))
    if before is None:
        return bf16
    if config.precision == "auto":
        return before  # the run goes on as it began, also where this machine prefers the other
    if before != bf16:
        began = "bf16" if before else "fp32"
        raise ConfigError(f"--precision: this run began in {began}; give --precision {began}")
    return bf16


def samplings(
    config: TrainConfig, tokenizer: Any, end_ids: tuple[int, ...]
) -> tuple[Sampling, Sampling]:
    """How responses are sampled in training, and in validation."""
    training = Sampling(
        config.max_new_tokens,
        end_ids,
        tokenizer.pad_token_id,
        config.temperature,
        config.min_new_tokens,
        config.end_strings,
        tokenizer.decode,
    )
    validation = dataclasses.replace(
        training,
        temperature=cast(float, config.val_temperature),
        greedy=config.val_greedy,
        top_k=config.val_top_k,
        top_p=config.val_top_p,
    )
    return training, validation


def plural(n: int, noun: str) -> str:
    """The number and its noun.

    >>> plural(1, "rank"), plural(2, "rank")
    ('1 rank', '2 ranks')
    """
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def print_setting(inputs: Inputs, source: str, size: int, bf16: bool) -> None:
    """Print device, policy and the main flags; `source` is where the policy comes from."""
    config = inputs.config
    precision = "bf16" if bf16 else "fp32"
    fsdp = " (fsdp)" if config.parallel == "fsdp" else ""
    team = config.tensor_model_parallel_size
    teams = f", {team} to a model" if team > 1 else ""
    threads = plural(torch.get_num_threads(), "thread")
    ranks = plural(distributed.world_size(), "rank")
    print(f"device {inputs.device} · {precision} · {threads} · {ranks}{fsdp}{teams}")
    name = os.path.relpath(source) if Path(source).is_dir() else source
    prompts = f"{len(inputs.data.prompts)} prompts"
    print(f"{name}, {size / 1e6:.1f}M parameters · {prompts} · baseline {config.baseline}")
    print(f"lr {config.lr:g} · responses of at most {config.max_new_tokens} tokens")
