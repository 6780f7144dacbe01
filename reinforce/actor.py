"""What the loop works with: everything that can be wrong is checked here, cheapest first, then loaded.

Order: flags, prompt files, the reward server, the tokenizer, and only then a model.
"""

import dataclasses
import json
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from reinforce import device as devices
from reinforce import distributed, lifecycle
from reinforce.config import TrainConfig
from reinforce.data import Prompt, check_record, tokenize
from reinforce.errors import ConfigError
from reinforce.http import read_token
from reinforce.logprobs import Scorer, head_is_plain
from reinforce.policy import context_length, end_tokens, load_policy, load_tokenizer
from reinforce.records import read_records
from reinforce.rm_client import RewardClient
from reinforce.sampler import Sampling


@dataclass(frozen=True)
class Actor:
    """What set-up makes and the loop uses."""

    config: TrainConfig
    tokenizer: Any
    model: nn.Module  # the policy
    scorer: nn.Module  # the same parameters, as the module whose forward gives logp; wrapped by DDP
    reference: nn.Module | None  # scorer of the frozen initial policy; None if beta = 0
    client: RewardClient
    training: Sampling
    validation: Sampling
    device: torch.device
    bf16: bool


def load_prompts(
    config: TrainConfig, tokenizer: Any, records: dict[str, list[dict[str, Any]]], policy: str, data_flag: str
) -> dict[str, list[Prompt]]:
    """Tokenized prompts of each file; says how many were too long. Raises ConfigError where context or ranks do not fit."""
    room = context_length(policy)
    if room is not None and room <= config.max_new_tokens:
        raise ConfigError(f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt in this model's {room} positions")
    longest = config.max_prompt_length if room is None else min(config.max_prompt_length, room - config.max_new_tokens)
    prompts = {}
    for name, lines in records.items():
        prompts[name], dropped = tokenize(lines, tokenizer, longest, name)
        if dropped and distributed.rank() == 0:
            print(f"{name}: left out {dropped} prompts longer than {longest} tokens (--max-prompt-length)")
    world, count = distributed.world_size(), len(prompts[data_flag])
    left = count % config.num_rollout_samples  # prompts of an epoch's last step
    if 0 < left < world and (config.max_steps is None or config.max_steps > count // config.num_rollout_samples):
        raise ConfigError(
            f"--num-rollout-samples {config.num_rollout_samples} leaves {left} of {count} prompts for an epoch's last step, "
            f"too few for {world} ranks: give another number, or drop {left} prompts"
        )
    return prompts


def set_up(
    config: TrainConfig, stack: ExitStack, policy_flag: str = "--policy", data_flag: str = "--train-data"
) -> tuple[Actor, list[Prompt], list[Prompt]]:
    """Check, start the toy's server if there is no other (it ends with `stack`), load. Returns actor, prompts, held-out prompts.

    The two flags are how errors name policy and prompts.
    """
    device = devices.pick(config.device, int(os.environ.get("LOCAL_RANK", "0")))
    if config.policy is None and os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        raise ConfigError("on several nodes give --policy, --train-data and --rm-host/--rm-port: the toy's server is local")
    lifecycle.refuse_used_folder(config.log_dir)
    if config.num_rollout_samples < distributed.world_size():
        raise ConfigError(
            f"--num-rollout-samples {config.num_rollout_samples} is fewer prompts than the {distributed.world_size()} ranks: "
            "give one for each at least"
        )
    policy, train_data, val_data = config.policy, config.train_data, config.val_data
    if policy is None or train_data is None:
        from recipes.toy import prepare

        toy = str(prepare()) if distributed.rank() == 0 else ""
        distributed.start(device)
        toy = distributed.agree(toy)
        policy, train_data, val_data = f"{toy}/policy", f"{toy}/train.jsonl", val_data or f"{toy}/validation.jsonl"
    else:
        distributed.start(device)
    records = {}
    for name, source in ((data_flag, train_data), ("--val-data", val_data)):
        if source is not None:
            records[name], bad = read_records(source, name, check_record, config.skip_bad_lines)
            if bad and distributed.rank() == 0:
                print(f"{name}: left out {bad} malformed lines (--skip-bad-lines)")
    host, port = config.rm_host, config.rm_port
    if host is None or port is None:
        address = stack.enter_context(lifecycle.toy_server()) if distributed.rank() == 0 else ("", 0)
        host, port = distributed.agree(address)
        if distributed.rank() == 0:
            print(f"reward server: http://{host}:{port}")
    client = RewardClient(host, port, token=read_token(), fingerprint=config.rm_fingerprint)
    client.connect(config.rm_wait)

    tokenizer = load_tokenizer(policy, policy_flag)
    ends = end_tokens(policy, tokenizer, policy_flag)
    prompts = load_prompts(config, tokenizer, records, policy, data_flag)
    model = load_policy(policy, tokenizer, device, flag=policy_flag)
    bf16 = devices.use_bf16(config.precision, device, sum(w.numel() for w in model.parameters()))
    plain = head_is_plain(model)
    if not plain and distributed.rank() == 0:
        print(f"--policy {policy}: this model does more than apply its head to hidden states; scoring with whole logits")
    scorer = Scorer(model, plain, config.temperature, ends, config.min_new_tokens).to(device)
    reference = None
    if config.initial_policy_kl_penalty > 0:
        frozen = load_policy(policy, tokenizer, device, frozen_dtype=torch.bfloat16 if bf16 else torch.float32)
        reference = Scorer(frozen, plain, config.temperature, ends, config.min_new_tokens).to(device)
    training = Sampling(config.max_new_tokens, ends, tokenizer.pad_token_id, config.temperature, config.min_new_tokens,
                        config.end_strings, tokenizer.decode)  # fmt: skip
    validation = dataclasses.replace(training, temperature=config.val_temperature, greedy=config.val_greedy,
                                     top_k=config.val_top_k, top_p=config.val_top_p)  # fmt: skip
    wrapped = distributed.replicate(scorer, device)
    actor = Actor(config, tokenizer, model, wrapped, reference, client, training, validation, device, bf16)
    if distributed.rank() == 0:
        name = os.path.relpath(policy) if Path(policy).is_dir() else policy
        print(
            f"device {device} · {'bf16' if bf16 else 'fp32'} · {torch.get_num_threads()} threads · {distributed.world_size()} ranks"
        )
        size, count = sum(w.numel() for w in model.parameters()), len(prompts[data_flag])
        print(f"{name}, {size / 1e6:.1f}M parameters · {count} prompts · baseline {config.baseline}")
    return actor, prompts[data_flag], prompts.get("--val-data", [])


def open_run_folder(config: TrainConfig) -> Path:
    """The run folder, the same on every rank, with config.json in it."""
    folder = None
    if distributed.rank() == 0:
        folder = lifecycle.new_run_folder(config.log_dir, "toy" if config.policy is None else Path(config.policy).name)
        facts = {**dataclasses.asdict(config), "torch": torch.__version__, "transformers": transformers.__version__}
        (folder / "config.json").write_text(json.dumps(facts, indent=2))
    folder = distributed.agree(folder)
    assert folder is not None
    return folder
