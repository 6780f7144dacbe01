"""The actor: trains a policy with REINFORCE against a reward server.

    torchrun train.py --baseline rloo                            the toy, reward server included
    torchrun --nproc-per-node 2 train.py --baseline remax        on two processes
    torchrun train.py --policy SFT --train-data prompts.jsonl --rm-host 127.0.0.1 --rm-port 5567

The update, for K responses y ~ pi to each prompt x:

    R = r(x, y) - beta * sum_t [log pi(y_t) - log pi_ref(y_t)]
    A = R - baseline(R)
    gradient of  -(1/N) sum_b A_b sum_t log pi(y_bt)             N: rows of the step, all ranks

Compared with GRPO trainers the default leaves out the clipped ratio and the old log-probs (one
update per rollout is on-policy), the division by the group's deviation, the division by a
response's length, and KL as a loss term: what is left is unbiased.
"""

import reinforce.prerequisites  # noqa: F401  # isort: skip

import dataclasses
import faulthandler
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import transformers

from recipes import toy
from reinforce import optim, own_baseline
from reinforce.data.prompts import Data
from reinforce.flags import parse
from reinforce.kl import KL, per_response
from reinforce.loss import clipped_loss, reinforce_loss, token_weights
from reinforce.objective import Judged, counted, objective
from reinforce.refused import GREEDY, SAMPLED
from reinforce.rollout import Batch, Rollout
from reinforce.run import distributed, exits, loading, run_folder, setup
from reinforce.run.actor import Actor
from reinforce.run.config import TrainConfig
from reinforce.run.distributed import groups_of, rows_of
from reinforce.run.run import Run
from reinforce.run.update import Step, Summed, Sums, Update, plan_updates
from reinforce.text import Prompt


def judge(actor: Actor, prompts: Sequence[Prompt], rollout: Rollout, kind: str = SAMPLED) -> Judged:
    """r, KL and R = r - beta * KL - missing-EOS penalty of each response, (B,) float64.

    `kind` names the responses where the server refuses one.
    """
    config, kl = actor.config, None
    requested = actor.request_rewards(prompts, rollout, kind)  # over HTTP, while pi_ref scores
    ref_logp = actor.reference_logp(rollout)  # (B, T), or None if beta = 0
    if ref_logp is not None:
        kl_token = KL[config.kl](rollout.logp, ref_logp)  # (B, T)
        kl = per_response(kl_token, rollout.mask, config.kl_reduce).double().cpu()  # (B,)
    reward = actor.rewards(requested)  # (B,)
    beta, finished = config.initial_policy_kl_penalty, rollout.finished.cpu()
    return Judged(reward, kl, objective(reward, kl, beta, finished, config.missing_eos_penalty))


def backward(actor: Actor, batch: Batch, update: Update) -> Summed:
    """Gradient of one optimizer step, in micro-batches of this rank's rows; N is of all ranks."""
    sums = Sums(batch, actor.config.ratio_clip)
    for part in actor.micro_batches(batch, update):
        logp = actor.logp(part.rollout)  # (b, T)
        if part.logp_old is None:  # on-policy: plain REINFORCE
            loss = reinforce_loss(logp, part.advantage, part.weight, update.n)
        else:  # one of several optimizer steps from one rollout
            clip = actor.config.ratio_clip
            loss = clipped_loss(logp, part.logp_old, part.advantage, part.weight, update.n, clip)
        distributed.backward(loss)  # summed over ranks
        sums.add(part, logp, loss)
    return sums.over_ranks()


def train(actor: Actor, data: Data, run: Run) -> None:
    """The loop: `actor` owns the models and the reward client, `run` keeps what is done."""
    config = actor.config
    baseline = own_baseline.make(config.baseline, config.ema_decay)
    betas = cast(tuple[float, float], config.adam_betas)
    optimizer = optim.adamw(actor.model, config.lr, betas, config.weight_decay, actor.adamw)
    run.restore(optimizer, baseline)  # of a run that goes on: bitwise, or not at all
    run.validate_if_due()

    for step in run.steps():
        prompts = distributed.deal(data.prompts_of(step))  # this rank's, whole groups
        optim.set_learning_rate(optimizer, run.learning_rate(step))

        # 1. sample: K responses to each prompt, and for ReMax the greedy one
        rollout = actor.sample(prompts, step)  # B = P * K rows
        greedy = actor.sample_greedy(prompts, step) if baseline.needs_greedy else None

        # 2. and 3. reward r over HTTP, KL to the initial policy: R = r - beta * KL
        judged = judge(actor, prompts, rollout)
        judged_greedy = judge(actor, prompts, greedy, GREEDY) if greedy else None

        # 4. advantage A = R - baseline(R), over whole groups, of all ranks in prompt order
        reward = judged.reward.to(actor.device)  # (B,), this rank's
        own_valid = counted(rollout.finished, reward, config.truncated)  # (B,)
        R = groups_of(judged.objective, prompts)  # (P, K)
        valid = groups_of(own_valid, prompts)  # (P, K)
        length = groups_of(rollout.length, prompts)  # (P, K)
        greedy_R = groups_of(judged_greedy.objective, prompts)[:, 0] if judged_greedy else None
        advantage = baseline(R, valid, greedy_R)  # (P, K)

        # 5. update: one optimizer step, or with --global-batch-size several and the clipped ratio
        updates = plan_updates(valid, length, config)
        own_advantage = rows_of(advantage).float().to(actor.device)  # (B,), this rank's
        weight = token_weights(rollout.mask, config.loss_norm) * own_valid[:, None]  # (B, T)
        logp_old = actor.logp_old(rollout) if len(updates) > 1 else None  # (B, T)
        batch = Batch(rollout, own_advantage, weight, logp_old)
        made = Step(step, prompts, batch, own_valid, judged, greedy, advantage)
        for update in updates:
            if update.n == 0:  # every response was dropped
                continue
            sums = backward(actor, batch, update)
            grad_norm = optim.clip(actor.model, config.max_grad_norm)
            run.must_be_finite(made, update, sums, grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            run.updated(sums, grad_norm)

        # 6. log, validate, save; from here on the step counts, whatever becomes of the server
        run.finished(made)
        run.validate_if_due()
        run.save_if_due()


def start(life: exits.Life) -> None:
    """Check what can be wrong, cheapest first; then load the models and run the loop."""
    given = dataclasses.replace(parse(TrainConfig, __doc__), log_dir=life.log_dir)
    begun = setup.begin(given)  # joins the ranks, finds where the run starts
    # flags that are not given are as the run began; without --policy it is the toy
    config = toy.stand_in(given.filled(dict(begun.start.began_with)), life.stack)
    inputs = setup.check(config, begun)
    name = "toy" if given.policy is None else Path(given.policy).name
    life.folder, identity = run_folder.open_run_folder(inputs, name)
    life.claim(life.folder)
    actor = loading.load(inputs)
    run_folder.begin_run(life.folder, identity)
    with Run(life.folder, actor, inputs.data, inputs.start, life.stop) as run:
        train(actor, inputs.data, run)


def main() -> None:
    """Command line; what an exit code means is in exits.py."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    sys.exit(exits.run_in_folder(start))


if __name__ == "__main__":
    faulthandler.enable()  # a process that a library aborts says where it was
    main()
