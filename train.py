"""The actor: trains a policy with REINFORCE against a reward server.

    torchrun train.py --baseline rloo                                   the toy, reward server included
    torchrun --nproc-per-node 2 train.py --baseline remax               on two processes
    torchrun train.py --policy SFT --train-data prompts.jsonl --rm-host 127.0.0.1 --rm-port 5567

The update, for K responses y ~ pi to each prompt x:

    R = r(x, y) - beta * sum_t [log pi(y_t) - log pi_ref(y_t)]       A = R - baseline(R)
    gradient of  -(1/N) sum_b A_b sum_t log pi(y_bt)                 N: rows of the whole optimizer step, all ranks

Beside GRPO trainers this deletes the clipped ratio and the old log-probs (one update per rollout is on-policy), the division
by the group's deviation, the division by a response's length, and KL as a loss term: what is left is unbiased.
"""

import dataclasses
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from reinforce import baselines, checkpoint, distributed, lifecycle, optim
from reinforce import device as devices
from reinforce.config import TrainConfig, parse
from reinforce.data import Prompt, read_records, step_prompts, steps_per_epoch, tokenize
from reinforce.errors import ConfigError, RetryError
from reinforce.group import Group, make_groups, reward_request
from reinforce.http import read_token
from reinforce.kl import k1, per_response
from reinforce.logprobs import Scorer, head_is_plain
from reinforce.loss import normaliser, reinforce_loss
from reinforce.metrics import Recorder, distinct, mean_reward, summarise
from reinforce.policy import context_length, end_tokens, load_policy, load_tokenizer
from reinforce.rm_client import RewardClient
from reinforce.sampler import Rollout, Sampling, micro_batches, row_seed, sample_in_batches

VALIDATION = -1  # the "step" of validation's random numbers: the same at every validation, so before and after compare


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


def rollout(actor: Actor, prompts: Sequence[Prompt], k: int, step: int, how: Sampling, max_rows: int) -> Rollout:
    """k responses to each prompt, row b to prompt b // k, each row with its own random numbers."""
    seeds = [row_seed(actor.config.seed, step, p.index, j) for p in prompts for j in range(k)]
    with devices.autocast(actor.device, actor.bf16):
        return sample_in_batches(actor.model, [p.ids for p in prompts], seeds, how, max_rows)


def judge(actor: Actor, prompts: Sequence[Prompt], out: Rollout) -> tuple[Tensor, Tensor | None, Tensor, float]:
    """reward (B,), KL (B,) or None, objective R = reward - beta * KL (B,), and the seconds that the reward took."""
    start = time.perf_counter()
    request = reward_request(actor.tokenizer, prompts, out, actor.config.rm_format == "query")
    reward = torch.tensor(actor.client.rewards(**request), dtype=torch.float64)  # (B,)
    seconds = time.perf_counter() - start
    if actor.reference is None:
        return reward, None, reward, seconds
    kl = torch.zeros_like(reward)  # (B,)
    lengths = (out.prompt_mask.sum(1) + out.length).tolist()
    for rows in micro_batches(lengths, actor.config.forward_micro_batch_size, sys.maxsize):
        part = out.take(rows)
        with torch.no_grad(), devices.autocast(actor.device, actor.bf16):
            ref_logp = actor.reference(part.prompt, part.prompt_mask, part.response, part.mask)  # (b, T)
        kl[rows] = per_response(k1(part.logp, ref_logp), part.mask).double().cpu()
    return reward, kl, reward - actor.config.initial_policy_kl_penalty * kl, seconds


def validate(actor: Actor, prompts: list[Prompt]) -> list[Group]:
    """One response to each validation prompt, scored; the same groups on every rank."""
    mine = distributed.deal(prompts)
    groups: list[Group] = []
    if mine:
        out = rollout(actor, mine, 1, VALIDATION, actor.validation, actor.config.val_rollout_micro_batch_size)
        request = reward_request(actor.tokenizer, mine, out, actor.config.rm_format == "query")
        reward = torch.tensor(actor.client.rewards(**request), dtype=torch.float64)
        groups = make_groups(actor.tokenizer, mine, out, reward, None, reward)
    return distributed.gather(groups)


def make_baseline(config: TrainConfig) -> Callable[..., Tensor]:
    """The advantage function of --baseline: (P, K) -> (P, K), for remax with greedy (P,) as second argument."""
    if config.baseline == "ema":
        return baselines.Ema(config.ema_decay)
    return cast(Callable[..., Tensor], getattr(baselines, config.baseline.replace("-", "_")))


def train(config: TrainConfig, actor: Actor, prompts: list[Prompt], held_out: list[Prompt], run: Path) -> None:
    """The loop."""
    p, k, world = config.num_rollout_samples, config.num_rollouts_per_prompt, distributed.world_size()
    per_epoch = steps_per_epoch(len(prompts), p)
    total = min(config.max_steps or sys.maxsize, (config.max_epochs or sys.maxsize) * per_epoch)
    min_lr = config.lr if config.min_lr is None else config.min_lr
    optimizer = optim.adamw(actor.model, config.lr, cast(tuple[float, float], config.adam_betas), config.weight_decay)
    baseline = make_baseline(config)
    recorder = Recorder(run, total) if distributed.rank() == 0 else None
    stop = lifecycle.Stop()
    stop.listen()
    before = after = validate(actor, held_out)
    if recorder and before:
        recorder.validated(0, before)

    for step in range(total):
        # 1. sample: K responses to each of this rank's prompts, and for ReMax the greedy one
        start = time.perf_counter()
        mine = distributed.deal([prompts[i] for i in step_prompts(len(prompts), p, config.seed, step)])
        out = rollout(actor, mine, k, step, actor.training, config.rollout_micro_batch_size)
        greedy = None
        if config.baseline == "remax":
            likeliest = dataclasses.replace(actor.training, greedy=True)
            greedy = rollout(actor, mine, 1, step, likeliest, config.rollout_micro_batch_size)
        sampled = time.perf_counter()

        # 2. and 3. score over HTTP, KL to the initial policy: R = r - beta * KL
        reward, kl, objective, reward_seconds = judge(actor, mine, out)  # (B,) each
        greedy_objective = None if greedy is None else judge(actor, mine, greedy)[2]  # (P of this rank,)
        judged = time.perf_counter()

        # 4. advantages, over whole groups, from all ranks' rows in prompt order
        groups = distributed.gather(make_groups(actor.tokenizer, mine, out, reward, kl, objective))
        objectives = torch.tensor([g.objective for g in groups], dtype=torch.float64)  # (P, K)
        against = () if greedy_objective is None else (torch.tensor(distributed.gather(greedy_objective.tolist())),)
        advantages = baseline(objectives, *against)  # (P, K)
        own = torch.stack(distributed.deal(list(advantages))).flatten().float().to(actor.device)  # (B,)

        # 5. update: one optimizer step, in micro-batches, divided by the rows of all ranks
        divisor = normaliser(torch.tensor([g.length for g in groups]), torch.ones_like(objectives, dtype=torch.bool), "sequence")
        loss, gap = torch.zeros((), device=actor.device), torch.zeros(len(own), device=actor.device)
        parts = micro_batches((out.prompt_mask.sum(1) + out.length).tolist(), config.micro_batch_size, config.micro_batch_tokens)
        for rows in parts:
            part = out.take(rows)
            with distributed.accumulating(actor.scorer, last=rows is parts[-1]):
                with devices.autocast(actor.device, actor.bf16):
                    logp = actor.scorer(part.prompt, part.prompt_mask, part.response, part.mask)  # (b, T)
                micro_loss = reinforce_loss(logp, own[rows], part.mask, divisor)
                (micro_loss * world).backward()  # DDP averages over ranks, and N already counts them all
            loss += micro_loss.detach()
            gap[rows] = (part.logp - logp.detach()).sum(1)
        grad_norm = optim.clip(actor.model, config.max_grad_norm)
        if not math.isfinite(grad_norm):
            raise FloatingPointError(f"the gradient of step {step + 1} is {grad_norm}; no optimizer step was made")
        optim.set_learning_rate(optimizer, optim.learning_rate(step, total, config.lr, min_lr, config.warmup_steps, config.constant_steps))
        optimizer.step()
        optimizer.zero_grad()
        updated = time.perf_counter()

        # 6. log, validate, save
        gaps, losses = distributed.gather(gap.tolist()), distributed.gather([loss.item()])
        last = step + 1 == total
        stopping = distributed.anywhere(stop.signal is not None)
        metrics = {
            "step": step + 1, **summarise(groups, advantages.flatten().tolist()), "loss": math.fsum(losses), "grad_norm": grad_norm,
            "lr": optimizer.param_groups[0]["lr"], "logprob_gap": math.fsum(gaps) / len(gaps), "ratio_clipped": 0.0,
            "tokens_per_s": sum(sum(g.length) for g in groups) / (sampled - start), "time_rollout": sampled - start,
            "time_reward": reward_seconds, "time_reference": judged - sampled - reward_seconds, "time_update": updated - judged,
            "prompts_seen": (step // per_epoch) * len(prompts) + min((step % per_epoch + 1) * p, len(prompts)),
            "epoch": step // per_epoch,
        }  # fmt: skip
        if held_out and (last or (step + 1) % config.val_check_interval == 0):
            after = validate(actor, held_out)
            metrics["val_reward"] = mean_reward(after)[0]
            if recorder:
                recorder.validated(step + 1, after)
        if recorder:
            recorder.log(metrics, groups, advantages.flatten().tolist())
            if last or stopping or (step + 1) % (config.save_interval or config.val_check_interval) == 0:
                state = {"val_reward": metrics.get("val_reward"), "ema": getattr(baseline, "value", None)}
                checkpoint.save(run, step + 1, actor.model, actor.tokenizer, state, config.save_top_k)
        if stopping and not last:
            break

    if recorder:
        recorder.close()
        if stop.signal is None:
            tell(held_out, before, after, run)
    if stop.signal is not None and not last:
        raise RetryError(f"stopped by {stop.signal} after step {step + 1} of {total}; a checkpoint is in {run}/checkpoints")


def tell(prompts: list[Prompt], before: list[Group], after: list[Group], run: Path) -> None:
    """The last screen: validation before and after, five samples of each, where the files are."""
    if before:
        print(f"\n{'validation':<12}{'reward':>16}{'tokens':>9}{'finished':>10}{'distinct-2':>12}")
        for name, groups in (("before", before), ("after", after)):
            reward, error = mean_reward(groups)
            n, variety = len(groups), distinct([g.response[0] for g in groups])
            length, finished = sum(g.length[0] for g in groups) / n, sum(g.finished[0] for g in groups) / n
            print(f"{name:<12}{reward:>8.3f} ± {error:.3f}{length:>9.1f}{finished:>10.2f}{variety:>12.2f}")
        for prompt, old, new in list(zip(prompts, before, after, strict=True))[:5]:
            print(f"\nprompt  {prompt.messages[-1]['content'] if prompt.messages else prompt.text}")
            print(f"before  {old.reward[0]:+.2f}  {old.response[0].strip()}")
            print(f"after   {new.reward[0]:+.2f}  {new.response[0].strip()}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    print(f"\ncurves {run}/curves.png · responses {run}/rollouts.jsonl · policy {run}/checkpoints · peak memory {peak:.1f} GiB")


def load_prompts(config: TrainConfig, tokenizer: Any, records: dict[str, list[dict[str, Any]]], policy: str) -> dict[str, list[Prompt]]:
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
    world, count = distributed.world_size(), len(prompts["--train-data"])
    smallest = count % config.num_rollout_samples or config.num_rollout_samples
    if min(smallest, count) < world:
        raise ConfigError(f"--num-rollout-samples: a step of {smallest} prompts cannot be dealt to {world} ranks; "
                          f"there are {count} prompts")  # fmt: skip
    return prompts


def set_up(config: TrainConfig, stack: ExitStack, folders: list[Path]) -> None:
    """Check everything that can be wrong, cheapest first; load; train."""
    device = devices.pick(config.device, int(os.environ.get("LOCAL_RANK", "0")))
    if config.policy is None and os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        raise ConfigError("on several nodes give --policy, --train-data and --rm-host/--rm-port: the toy's server is local")
    if config.num_rollout_samples < distributed.world_size():
        raise ConfigError(f"--num-rollout-samples {config.num_rollout_samples} is fewer prompts than the "
                          f"{distributed.world_size()} ranks")  # fmt: skip
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
    for name, source in (("--train-data", train_data), ("--val-data", val_data)):
        if source is not None:
            records[name], bad = read_records(source, name, config.skip_bad_lines)
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

    tokenizer = load_tokenizer(policy)
    ends = end_tokens(policy, tokenizer)
    prompts = load_prompts(config, tokenizer, records, policy)
    model = load_policy(policy, tokenizer, device)
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
    actor = Actor(config, tokenizer, model, distributed.replicate(scorer, device), reference, client, training, validation, device, bf16)

    name = "toy" if config.policy is None else Path(policy).name
    run = lifecycle.new_run_folder(config.log_dir, name) if distributed.rank() == 0 else Path()
    folders[:] = [distributed.agree(run)]
    if distributed.rank() == 0:
        facts = {**dataclasses.asdict(config), "torch": torch.__version__, "transformers": transformers.__version__}
        (folders[0] / "config.json").write_text(json.dumps(facts, indent=2))
        size = sum(w.numel() for w in model.parameters())
        print(f"device {device} · {'bf16' if bf16 else 'fp32'} · {torch.get_num_threads()} threads · {distributed.world_size()} ranks · "
              f"{name}, {size / 1e6:.1f}M parameters · {config.baseline}, {len(prompts['--train-data'])} prompts · {folders[0]}")  # fmt: skip
    train(config, actor, prompts["--train-data"], prompts.get("--val-data", []), folders[0])


def main() -> None:
    """Command line; the exit code is lifecycle's."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    given = lifecycle.log_dir_of(sys.argv)
    folders = [given] if given is not None else []
    if given is not None and distributed.rank() == 0:
        (given / "exit.json").unlink(missing_ok=True)

    def body() -> None:
        with ExitStack() as stack:
            set_up(parse(TrainConfig, cast(str, __doc__)), stack, folders)

    sys.exit(lifecycle.run(body, lambda: folders[0] if folders else None))


if __name__ == "__main__":
    main()
