"""From a command line to inputs: all that can be wrong is checked, cheapest first, without a model.

The order: flags, run folder, prompt files, the reward server, the tokenizer, one reward. What comes
next is loading.py.
"""

import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from reinforce import adapter, own_baseline
from reinforce import device as devices
from reinforce.data.prompts import Data, check_record, tokenize
from reinforce.data.records import read_records
from reinforce.errors import ConfigError
from reinforce.hub import refuse_missing_path
from reinforce.policy import context_length, end_tokens, load_tokenizer, read_config, refuse_targets
from reinforce.rm_client import RewardClient
from reinforce.rm_connection import read_token
from reinforce.run import distributed, first_reward, resume, tensor_parallel
from reinforce.run.config import TrainConfig
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
            f"{world} {'ranks' if team == 1 else 'teams of ranks'}: give at least {world}"
        )
    if config.deterministic:
        devices.only_deterministic()
    distributed.start(device, alone=config.parallel == "fsdp", tensor_parallel=team)
    refuse_other_flags(config)
    k = config.num_rollouts_per_prompt
    distributed.together(lambda: own_baseline.check(config.baseline, k))
    run = None if config.log_dir is None else Path(config.log_dir)
    start = distributed.together(lambda: resume.find_start(run, config.resume), only_first=True)
    return Begun(device, start)


def refuse_other_flags(config: TrainConfig) -> None:
    """Raise ConfigError where the ranks were started with different flags.

    Files and addresses may have names of their own on each node.
    """
    own = {"policy", "train_data", "val_data", "rm_host", "rm_port", "log_dir"}
    flags = {name: value for name, value in asdict(config).items() if name not in own}
    for other, theirs in enumerate(distributed.of_all(flags)):
        for name, value in theirs.items():
            if value != flags[name]:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is {flags[name]} here and {value} on rank {other};"
                    " give all nodes the same command"
                )


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
    if len(set(distributed.of_all(client.fingerprint))) > 1:
        raise ConfigError(
            f"--rm-host/--rm-port: at {client.url} ranks have found different reward models; "
            "let all servers behind that address serve the same one"
        )

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

    if distributed.world_size() > 1:
        refuse_other_prompts(data, data_flag)

    check_schedule(config, data.total_steps(config.max_steps, config.max_epochs))

    def ask_first_reward() -> None:
        first_reward.ask(client, config, data.prompts[0], tokenizer, ends, data_flag)

    distributed.together(ask_first_reward, only_first=True)
    return Inputs(
        config, begun.device, begun.start, policy, policy_flag, tokenizer, ends, data, client
    )


def refuse_other_prompts(data: Data, data_flag: str) -> None:
    """Raise ConfigError where the ranks have read different prompts."""
    read = [[p.index, p.ids, p.text, p.messages, p.label] for p in [*data.prompts, *data.held_out]]
    digests = distributed.of_all(resume.digest(read))
    if len(set(digests)) > 1:
        other = next(i for i, digest in enumerate(digests) if digest != digests[0])
        raise ConfigError(
            f"{data_flag}, --val-data: rank {other} reads other prompts than rank 0; "
            "give all nodes the same files"
        )


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
    longest, limit = config.max_prompt_length, "--max-prompt-length"
    if context is not None:
        if context <= config.max_new_tokens:
            raise ConfigError(
                f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt "
                f"in this model's {context} positions; give fewer"
            )
        if context - config.max_new_tokens < longest:
            longest = context - config.max_new_tokens
            limit = f"the model's {context} positions less --max-new-tokens"
    prompts = {}
    for name, lines in records.items():
        prompts[name], dropped = tokenize(lines, tokenizer, longest, name, date, limit)
        if dropped and distributed.rank() == 0:
            too_long = f"{dropped} prompts longer than {longest} tokens"
            print(f"{name}: left out {too_long} ({limit})")
        if tokenizer.chat_template and distributed.rank() == 0:
            untemplated = sum(prompt.messages is None for prompt in prompts[name])
            if untemplated:
                print(f"{name}: {untemplated} prompts are text, which gets no chat template")
    refuse_short_last_step(config, len(prompts[data_flag]))
    return prompts


def refuse_short_last_step(config: TrainConfig, count: int) -> None:
    """Raise ConfigError if the last step of an epoch of `count` prompts has fewer than ranks."""
    world, per_step = distributed.teams(), config.num_rollout_samples
    full_steps, left = divmod(count, per_step)
    reached = config.max_steps is None or config.max_steps > full_steps
    if 0 < left < world and reached:
        if count < world:
            raise ConfigError(f"{count} prompts for {world} ranks: start fewer or give more")
        raise ConfigError(
            f"--num-rollout-samples {per_step} leaves {left} of {count} prompts for an epoch's "
            f"last step, too few for {world} ranks: give another number, or drop {left} prompts"
        )


def check_schedule(config: TrainConfig, total: int) -> None:
    """Say it if no step of a run of `total` steps has the learning rate --lr.

    Raises ConfigError if the rate is 0 in all steps.
    """
    last = min(config.warmup_steps, total - 1)  # the rate rises up to here, and not after it
    highest = max(config.learning_rate(step, total) for step in (last, max(0, last - 1)))
    if highest >= 0.999 * config.lr:
        return
    reached = (
        f"the run has {total} steps, in which --warmup-steps {config.warmup_steps} and "
        f"--constant-steps {config.constant_steps} get the learning rate to {highest:g} at most, "
        f"not to --lr {config.lr:g}"
    )
    if highest == 0:
        raise ConfigError(reached)
    if distributed.rank() == 0:
        print(reached)
