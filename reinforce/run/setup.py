"""From a command line to the actor: everything that can be wrong is checked first, cheapest first, then loaded.

Order: flags, run folder, prompt files, the reward server, the tokenizer, one reward, and only then
a model.
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

from reinforce import device as devices
from reinforce import guard, own_baseline
from reinforce.data.prompts import Data, check_record, tokenize
from reinforce.data.records import read_records
from reinforce.errors import ConfigError
from reinforce.hub import refuse_missing_path
from reinforce.logprobs import Scorer
from reinforce.policy import (
    checkpoint_blocks,
    context_length,
    end_tokens,
    load_policy,
    load_tokenizer,
    read_config,
)
from reinforce.refused import Refusals
from reinforce.rm_client import RewardClient
from reinforce.rm_connection import read_token
from reinforce.run import checkpoint, distributed, first_reward, resume
from reinforce.run.actor import Actor
from reinforce.run.config import TrainConfig
from reinforce.run.folder import new_run_folder, point_latest
from reinforce.sampler import Sampling
from reinforce.text import Prompt


@dataclass(frozen=True)
class Inputs:
    """A command line that has been checked, and what it names."""

    config: TrainConfig
    device: torch.device
    start: resume.Start
    policy: str  # folder or hub id of the initial policy
    policy_flag: str  # how errors name it
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
    """Tokenized prompts of each file; says how many were too long. Raises ConfigError where context or ranks do not fit."""
    room = context_length(policy)
    if room is not None and room <= config.max_new_tokens:
        raise ConfigError(
            f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt in this model's {room} positions"
        )
    longest = (
        config.max_prompt_length
        if room is None
        else min(config.max_prompt_length, room - config.max_new_tokens)
    )
    prompts = {}
    for name, lines in records.items():
        prompts[name], dropped = tokenize(lines, tokenizer, longest, name, date)
        if dropped and distributed.rank() == 0:
            print(
                f"{name}: left out {dropped} prompts longer than {longest} tokens (--max-prompt-length)"
            )
    world, count = distributed.world_size(), len(prompts[data_flag])
    left = count % config.num_rollout_samples  # prompts of an epoch's last step
    if 0 < left < world and (
        config.max_steps is None or config.max_steps > count // config.num_rollout_samples
    ):
        raise ConfigError(
            f"--num-rollout-samples {config.num_rollout_samples} leaves {left} of {count} prompts for an epoch's last step, "
            f"too few for {world} ranks: give another number, or drop {left} prompts"
        )
    return prompts


@dataclass(frozen=True)
class Begun:
    """What is known before any input is read."""

    device: torch.device
    start: resume.Start


def begin(config: TrainConfig) -> Begun:
    """Join the other ranks, and find where the run starts. Raises ConfigError where flags and ranks do not fit."""
    device = devices.pick(config.device, int(os.environ.get("LOCAL_RANK", "0")))
    if config.policy is None and os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        raise ConfigError(
            "on several nodes give --policy, --train-data and --rm-host/--rm-port: the toy's server is local"
        )
    if config.num_rollout_samples < distributed.world_size():
        raise ConfigError(
            f"--num-rollout-samples {config.num_rollout_samples} is fewer prompts than the {distributed.world_size()} ranks: "
            "give one for each at least"
        )
    if config.deterministic:
        devices.only_deterministic()
    distributed.start(device, alone=config.parallel == "fsdp")
    run = None if config.log_dir is None else Path(config.log_dir)
    distributed.together(
        lambda: own_baseline.check(config.baseline, config.num_rollouts_per_prompt)
    )
    start = distributed.together(lambda: resume.find_start(run, config.resume), only_first=True)
    return Begun(device, start)


def check(
    config: TrainConfig,
    begun: Begun,
    policy_flag: str = "--policy",
    data_flag: str = "--train-data",
) -> Inputs:
    """Everything but the models. Raises ConfigError.

    `config` names policy, prompts and server. Errors name the first two by the two flags.
    """
    policy, host, port = config.policy, config.rm_host, config.rm_port
    assert (
        policy is not None
        and config.train_data is not None
        and host is not None
        and port is not None
    )
    refuse_missing_path(policy, policy_flag)
    check_line = partial(check_record, prompt_key=config.prompt_key, label_key=config.label_key)
    records = {}
    for name, source in ((data_flag, config.train_data), ("--val-data", config.val_data)):
        if source is not None:
            records[name], bad = read_records(source, name, check_line, config.skip_bad_lines)
            if bad and distributed.rank() == 0:
                print(f"{name}: left out {bad} malformed lines (--skip-bad-lines)")
    client = RewardClient(host, port, token=read_token(), fingerprint=config.rm_fingerprint)
    client.connect(config.rm_wait)

    read_config(policy, policy_flag)
    tokenizer = load_tokenizer(policy, policy_flag)
    ends = end_tokens(policy, tokenizer, policy_flag)
    prompts = load_prompts(config, tokenizer, records, policy, data_flag, begun.start.date)
    data = Data(
        prompts[data_flag], prompts.get("--val-data", []), config.num_rollout_samples, config.seed
    )
    first = data.prompts[0]
    distributed.together(
        lambda: first_reward.ask(client, config, first, tokenizer, ends, data_flag), only_first=True
    )
    return Inputs(
        config, begun.device, begun.start, policy, policy_flag, tokenizer, ends, data, client
    )


def inspect(inputs: Inputs, model: nn.Module, source: str) -> guard.Verdict:
    """The guard's word on the policy, printed. Raises ConfigError if it must not be trained."""
    name = f"{inputs.policy_flag} {source}"
    prompts = [p.ids for p in inputs.data.prompts[:4]]
    verdict = guard.inspect(
        model,
        prompts,
        inputs.end_ids,
        inputs.tokenizer.pad_token_id,
        inputs.config.gradient_checkpointing,
        name,
    )
    print(
        f"checked in {verdict.seconds:.1f} s: log pi of a token differs by {verdict.sampling:.0e} between sampler and scorer, "
        f"by {verdict.padding:.0e} with its neighbours"
    )
    if not verdict.plain:
        print(
            f"{name}: this model does more than apply its head to hidden states; scoring with whole logits"
        )
    if verdict.unused:
        shown = ", ".join(verdict.unused[:3])
        print(
            f"{name}: {len(verdict.unused)} parameters have no part in the logits and stay as they are ({shown})"
        )
    return verdict


def load(inputs: Inputs) -> Actor:
    """The models, on their devices: the policy from the checkpoint that the run goes on with, if there is one."""
    config, device, tokenizer, ends = inputs.config, inputs.device, inputs.tokenizer, inputs.end_ids
    sharded = config.parallel == "fsdp"
    place = (
        torch.device("cpu") if sharded else device
    )  # a whole model may not fit the device that takes a shard of it
    source = inputs.policy if inputs.start.folder is None else str(inputs.start.folder)
    model = load_policy(source, tokenizer, place, flag=inputs.policy_flag)
    size = sum(w.numel() for w in model.parameters())
    bf16 = all(distributed.gather([devices.use_bf16(config.precision, device, size)]))
    if inputs.start.bf16 is not None and config.precision == "auto":
        bf16 = (
            inputs.start.bf16
        )  # the run goes on as it began, whatever this machine's processor is faster in
    if inputs.start.bf16 not in (None, bf16):
        raise ConfigError(
            f"--precision: this run began in {'bf16' if inputs.start.bf16 else 'fp32'}; give it that one again"
        )
    verdict = distributed.together(lambda: inspect(inputs, model, source), only_first=True)
    for name, weight in model.named_parameters():
        weight.requires_grad_(weight.requires_grad and name not in verdict.unused)
    if config.gradient_checkpointing:
        checkpoint_blocks(model)
    plain = verdict.plain
    scorer = Scorer(model, plain, config.temperature, ends, config.min_new_tokens).to(place)
    wrapped = distributed.wrap(
        scorer, device, config.parallel, bf16
    )  # before the reference: a rank then holds one whole model
    reference = None
    if config.initial_policy_kl_penalty > 0:
        half = bf16 and not sharded  # FSDP casts by itself, and wants one type in a block
        frozen = load_policy(
            inputs.policy, tokenizer, place, frozen_dtype=torch.bfloat16 if half else torch.float32
        )
        scored_by = Scorer(frozen, plain, config.temperature, ends, config.min_new_tokens).to(place)
        reference = distributed.wrap(scored_by, device, config.parallel, bf16)
    training = Sampling(
        config.max_new_tokens,
        ends,
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
    actor = Actor(
        config,
        tokenizer,
        model,
        scorer,
        wrapped,
        reference,
        inputs.client,
        training,
        validation,
        device,
        bf16,
        Refusals(config.skip_refused),
    )
    if distributed.rank() == 0:
        name = os.path.relpath(source) if Path(source).is_dir() else source
        ranks = f"{distributed.world_size()} ranks{' (fsdp)' if sharded else ''}"
        print(
            f"device {device} · {'bf16' if bf16 else 'fp32'} · {torch.get_num_threads()} threads · {ranks}"
        )
        print(
            f"{name}, {size / 1e6:.1f}M parameters · {len(inputs.data.prompts)} prompts · baseline {config.baseline}"
        )
        print(f"lr {config.lr:g} · responses of at most {config.max_new_tokens} tokens")
    return actor


def set_up(
    config: TrainConfig,
    policy_flag: str = "--policy",
    data_flag: str = "--train-data",
    date: str | None = None,
) -> tuple[Actor, Data]:
    """All of the above for a script that keeps no run folder; `date` is what chat templates print, by default today."""
    config = config.filled()
    begun = begin(config)
    if date is not None:
        begun = dataclasses.replace(begun, start=dataclasses.replace(begun.start, date=date))
    inputs = check(config, begun, policy_flag, data_flag)
    return load(inputs), inputs.data


def open_run_folder(inputs: Inputs, name: str) -> tuple[Path, dict[str, Any]]:
    """The run folder, the same on every rank, with config.json in it, and the run's identity, which is written by `begin_run`.

    Raises ConfigError if it holds another run.

    `name` is part of its name if there is no --log-dir.

    Of a run that goes on, the logs are cut back to the step of its checkpoint, and what a killed process left is removed.
    """
    config, data = inputs.config, inputs.data

    def opened() -> tuple[Path, dict[str, Any]]:
        decays = config.min_lr not in (
            None,
            config.lr,
        )  # then the rate depends on where the run is to end
        own = resume.identity(
            config,
            baseline=own_baseline.identity(config.baseline),
            policy=resume.weights(inputs.policy),
            date=inputs.start.date,
            reward_model=inputs.client.fingerprint,
            end_ids=inputs.end_ids,
            prompts=resume.digest([[p.ids, p.text, p.label] for p in data.prompts]),
            held_out=resume.digest([[p.ids, p.text, p.label] for p in data.held_out]),
            total_steps=data.total_steps(config.max_steps, config.max_epochs) if decays else None,
        )
        folder = new_run_folder(config.log_dir, name)
        resume.check_identity(folder, own)
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
                f"--log-dir {folder}: cannot be written to ({error.strerror})"
            ) from error
        return folder, own

    return distributed.together(opened, only_first=True)


def begin_run(folder: Path, identity: dict[str, Any]) -> None:
    """From here on the folder holds this run: its models have passed every check."""

    def begun() -> None:
        resume.write_identity(folder, identity)
        point_latest(folder)

    distributed.together(begun, only_first=True)
