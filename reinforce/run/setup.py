"""From a command line to the actor: what can be wrong is checked, cheapest first, then loaded.

The order: flags, run folder, prompt files, the reward server, the tokenizer, one reward, and only
then a model.
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from reinforce import adapter, guard, lora, own_baseline
from reinforce import device as devices
from reinforce.data.prompts import Data, check_record, tokenize
from reinforce.data.records import read_records
from reinforce.errors import ConfigError
from reinforce.hub import refuse_missing_path
from reinforce.logprobs import Scorer
from reinforce.policy import (
    blocks,
    checkpoint_blocks,
    context_length,
    end_tokens,
    load_policy,
    load_tokenizer,
    read_config,
    refuse_targets,
    store_frozen,
)
from reinforce.refused import Refusals
from reinforce.rm_client import RewardClient
from reinforce.rm_connection import read_token
from reinforce.run import (
    allocator,
    checkpoint,
    distributed,
    first_reward,
    offload,
    resume,
    shards,
    tensor_parallel,
)
from reinforce.run.actor import Actor
from reinforce.run.config import TrainConfig
from reinforce.run.folder import new_run_folder, point_latest
from reinforce.sampler import Sampling
from reinforce.text import Prompt


@dataclass(frozen=True)
class Inputs:
    """A command line that has been checked, and what its flags name."""

    config: TrainConfig
    device: torch.device
    start: resume.Start
    policy: str  # folder or hub id of the initial policy
    policy_flag: str  # the flag by which errors name the policy
    tokenizer: Any
    end_ids: tuple[int, ...]
    data: Data
    client: RewardClient


def load_prompts(
    config: TrainConfig,
    tokenizer: Any,
    records: dict[str, list[dict[str, Any]]],
    policy: str,
    data_flag: str,
    date: str | None,
) -> dict[str, list[Prompt]]:
    """Tokenized prompts of each file; prints how many were too long.

    Raises ConfigError where the prompts do not fit the model's context or the ranks.
    """
    context = context_length(policy)
    longest = config.max_prompt_length
    if context is not None:
        if context <= config.max_new_tokens:
            raise ConfigError(
                f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt "
                f"in this model's {context} positions; give fewer"
            )
        longest = min(longest, context - config.max_new_tokens)
    prompts = {}
    for name, lines in records.items():
        prompts[name], dropped = tokenize(lines, tokenizer, longest, name, date)
        if dropped and distributed.rank() == 0:
            too_long = f"{dropped} prompts longer than {longest} tokens"
            print(f"{name}: left out {too_long} (--max-prompt-length)")
    refuse_short_last_step(config, len(prompts[data_flag]))
    return prompts


def refuse_short_last_step(config: TrainConfig, count: int) -> None:
    """Raise ConfigError if the last step of an epoch of `count` prompts has fewer than ranks."""
    world, per_step = distributed.teams(), config.num_rollout_samples
    full_steps, left = divmod(count, per_step)
    reached = config.max_steps is None or config.max_steps > full_steps
    if 0 < left < world and reached:
        raise ConfigError(
            f"--num-rollout-samples {per_step} leaves {left} of {count} prompts for an epoch's "
            f"last step, too few for {world} ranks: give another number, or drop {left} prompts"
        )


@dataclass(frozen=True)
class Begun:
    """The device and the start of a run, known before any input is read."""

    device: torch.device
    start: resume.Start


def begin(config: TrainConfig) -> Begun:
    """Join the other ranks, and find where the run starts.

    Raises ConfigError where the flags do not fit the number of ranks.
    """
    device = devices.pick(config.device, int(os.environ.get("LOCAL_RANK", "0")))
    if config.policy is None and os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        raise ConfigError(
            "on several nodes give --policy, --train-data and --rm-host/--rm-port: "
            "the toy's server is local"
        )
    team = config.tensor_model_parallel_size
    tensor_parallel.refuse_ranks(team, distributed.world_size())
    world = distributed.world_size() // team
    if config.num_rollout_samples < world:
        raise ConfigError(
            f"--num-rollout-samples {config.num_rollout_samples} is fewer prompts than the "
            f"{world} ranks: give at least {world}"
        )
    if config.deterministic:
        devices.only_deterministic()
    distributed.start(device, alone=config.parallel == "fsdp", tensor_parallel=team)
    k = config.num_rollouts_per_prompt
    distributed.together(lambda: own_baseline.check(config.baseline, k))
    run = None if config.log_dir is None else Path(config.log_dir)
    start = distributed.together(lambda: resume.find_start(run, config.resume), only_first=True)
    return Begun(device, start)


def check(
    config: TrainConfig,
    begun: Begun,
    policy_flag: str = "--policy",
    data_flag: str = "--train-data",
) -> Inputs:
    """Check and read everything but the models. Raises ConfigError.

    `config` must name policy, prompts and server. Errors name the policy by `policy_flag`, the
    prompts by `data_flag`.
    """
    policy, host, port = config.policy, config.rm_host, config.rm_port
    assert policy is not None and config.train_data is not None
    assert host is not None and port is not None
    refuse_missing_path(policy, policy_flag)
    adapter.refuse(policy, policy_flag)
    check_line = partial(check_record, prompt_key=config.prompt_key, label_key=config.label_key)
    records = {}
    for name, source in ((data_flag, config.train_data), ("--val-data", config.val_data)):
        if source is not None:
            records[name], bad = read_records(source, name, check_line, config.skip_bad_lines)
            if bad and distributed.rank() == 0:
                print(f"{name}: left out {bad} malformed lines (--skip-bad-lines)")
    client = RewardClient(host, port, token=read_token(), fingerprint=config.rm_fingerprint)
    client.connect(config.rm_wait)

    team = config.tensor_model_parallel_size
    tensor_parallel.refuse_policy(read_config(policy, policy_flag), team, f"{policy_flag} {policy}")
    if config.lora_rank:
        refuse_targets(policy, config.lora_targets, policy_flag)
    tokenizer = load_tokenizer(policy, policy_flag)
    ends = end_tokens(policy, tokenizer, policy_flag)
    prompts = load_prompts(config, tokenizer, records, policy, data_flag, begun.start.date)
    data = Data(
        prompts[data_flag], prompts.get("--val-data", []), config.num_rollout_samples, config.seed
    )

    def ask_first_reward() -> None:
        first_reward.ask(client, config, data.prompts[0], tokenizer, ends, data_flag)

    distributed.together(ask_first_reward, only_first=True)
    return Inputs(
        config, begun.device, begun.start, policy, policy_flag, tokenizer, ends, data, client
    )


def inspect(inputs: Inputs, model: nn.Module, source: str) -> guard.Verdict:
    """Inspect the policy, and print the guard's verdict.

    Raises ConfigError if the policy must not be trained.
    """
    name = f"{inputs.policy_flag} {source}"
    prompts = [p.ids for p in inputs.data.prompts[:4]]
    pad, checkpointing = inputs.tokenizer.pad_token_id, inputs.config.gradient_checkpointing
    verdict = guard.inspect(model, prompts, inputs.end_ids, pad, checkpointing, name)
    print(
        f"checked in {verdict.seconds:.1f} s: log pi of a token differs "
        f"by {verdict.sampling:.0e} between sampler and scorer, "
        f"by {verdict.padding:.0e} with its neighbours"
    )
    if not verdict.plain:
        print(
            f"{name}: this model does more than apply its head to hidden states; "
            "scoring with whole logits"
        )
    if verdict.unused:
        shown = ", ".join(verdict.unused[:3])
        print(
            f"{name}: {len(verdict.unused)} parameters have no part in the logits "
            f"and stay as they are ({shown})"
        )
    return verdict


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


def load_first(inputs: Inputs, source: str, device: torch.device) -> nn.Module:
    """The policy to inspect: whole on rank 0; under FSDP other ranks read their shards alone.

    Raises ConfigError on every rank.
    """
    whole = partial(load_policy, source, inputs.tokenizer, device, flag=inputs.policy_flag)
    team = inputs.config.tensor_model_parallel_size
    if inputs.config.parallel != "fsdp" or team > 1:
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


def load(inputs: Inputs) -> Actor:
    """Load the models to their devices; the policy of a run that goes on is its checkpoint.

    With LoRA the checkpoint has the adapters alone, and the reference is the policy without them.
    """
    config, device, tokenizer, ends = inputs.config, inputs.device, inputs.tokenizer, inputs.end_ids
    allocator.keep_freed_memory()
    sharded = config.parallel == "fsdp"
    team = config.tensor_model_parallel_size
    # a device that takes a shard may be too small for the whole model
    load_device = torch.device("cpu") if sharded or team > 1 else device
    source = inputs.policy if inputs.start.folder is None else str(inputs.start.folder)
    stored = inputs.policy if config.lora_rank else source  # where the whole weights are
    model = load_first(inputs, stored, load_device)
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
        scorer = Scorer(model, verdict.plain, *sampled, verdict.shares_prompt)
        return scorer.to(device) if team > 1 or not sharded else scorer

    host = offload.chosen(config, device)
    scorer = scorer_of(model)
    # wrapped before the reference is loaded: a rank then never holds two whole models
    wrapped = distributed.wrap(scorer, device, config.parallel, bf16, host.optimizer)
    shards.read(scorer, stored)
    reference: nn.Module | None = None
    if config.initial_policy_kl_penalty > 0 and config.lora_rank:
        reference = lora.Initial(scorer)
    elif config.initial_policy_kl_penalty > 0:
        initial = shards.build(inputs.policy) if sharded and team == 1 else None
        if initial is None:
            initial = load_policy(inputs.policy, tokenizer, load_device, frozen_dtype=dtype)
        tensor_parallel.shard(initial.requires_grad_(False), device)
        frozen = scorer_of(initial)
        reference = distributed.wrap(frozen, device, config.parallel, bf16, host.reference)
        shards.read(frozen, inputs.policy)
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
        temperature=config.val_temperature,
        greedy=config.val_greedy,
        top_k=config.val_top_k,
        top_p=config.val_top_p,
    )
    return training, validation


def print_setting(inputs: Inputs, source: str, size: int, bf16: bool) -> None:
    """Print device, policy and the main flags; `source` is where the policy comes from."""
    config = inputs.config
    precision = "bf16" if bf16 else "fp32"
    fsdp = " (fsdp)" if config.parallel == "fsdp" else ""
    team = config.tensor_model_parallel_size
    teams = f", {team} to a model" if team > 1 else ""
    ranks = f"{distributed.world_size()} ranks{fsdp}{teams}"
    print(f"device {inputs.device} · {precision} · {torch.get_num_threads()} threads · {ranks}")
    name = os.path.relpath(source) if Path(source).is_dir() else source
    prompts = f"{len(inputs.data.prompts)} prompts"
    print(f"{name}, {size / 1e6:.1f}M parameters · {prompts} · baseline {config.baseline}")
    print(f"lr {config.lr:g} · responses of at most {config.max_new_tokens} tokens")


def set_up(
    config: TrainConfig,
    policy_flag: str = "--policy",
    data_flag: str = "--train-data",
    date: str | None = None,
) -> tuple[Actor, Data]:
    """All of the above, for a script that keeps no run folder.

    `date` is the day that chat templates print, by default today.
    """
    config = config.filled()
    begun = begin(config)
    if date is not None:
        begun = dataclasses.replace(begun, start=dataclasses.replace(begun.start, date=date))
    inputs = check(config, begun, policy_flag, data_flag)
    return load(inputs), inputs.data


def open_run_folder(inputs: Inputs, name: str) -> tuple[Path, dict[str, Any]]:
    """The run folder, the same on every rank, and the run's identity, which `begin_run` writes.

    `name` is part of the name of a new folder if there is no --log-dir. Writes config.json. The
    logs of a run that goes on are cut back to the step of its checkpoint, and half-written
    checkpoints of a killed process are removed. Raises ConfigError if the folder holds another run.
    """
    config = inputs.config

    def opened() -> tuple[Path, dict[str, Any]]:
        identity = identity_of(inputs)
        folder = new_run_folder(config.log_dir, name)
        resume.check_identity(folder, identity)
        checkpoint.sweep(folder)
        checkpoint.set_aside(folder, inputs.start.step)
        resume.truncate_logs(folder, inputs.start.step)
        facts = {
            **dataclasses.asdict(config),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        try:
            (folder / "config.json").write_text(json.dumps(facts, indent=2))
        except OSError as error:
            raise ConfigError(
                f"--log-dir {folder}: cannot be written to ({error.strerror}); give another folder"
            ) from error
        return folder, identity

    return distributed.together(opened, only_first=True)


def identity_of(inputs: Inputs) -> dict[str, Any]:
    """What makes this run this run: its flags, and digests of what they name."""
    config, data = inputs.config, inputs.data
    total = data.total_steps(config.max_steps, config.max_epochs)
    constant = config.min_lr in (None, config.lr)  # else the rate depends on the last step
    return resume.identity(
        config,
        baseline=own_baseline.identity(config.baseline),
        policy=resume.weights(inputs.policy),
        date=inputs.start.date,
        reward_model=inputs.client.fingerprint,
        end_ids=inputs.end_ids,
        prompts=resume.digest([[p.ids, p.text, p.label] for p in data.prompts]),
        held_out=resume.digest([[p.ids, p.text, p.label] for p in data.held_out]),
        total_steps=None if constant else total,
    )


def begin_run(folder: Path, identity: dict[str, Any]) -> None:
    """Let the folder hold this run from here on: the models have passed every check."""

    def begun() -> None:
        resume.write_identity(folder, identity)
        point_latest(folder)

    distributed.together(begun, only_first=True)
