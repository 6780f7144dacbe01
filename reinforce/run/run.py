"""A run, as the loop sees it: which steps are to come, what each gave, and what is never lost.

Finished steps are logged and saved whatever happens next: a server that is gone or gives a wrong
answer, a signal, the time limit. Leaving the block of `with Run(...)` on an error of the server
saves them. Saving needs all ranks: inside the loop such errors come out of `distributed.together`,
on every rank, and never between an update and `finished`.
"""

import copy
import math
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from reinforce.baselines import Baseline
from reinforce.data.prompts import Data
from reinforce.errors import FailedError, RetryError
from reinforce.own_baseline import OwnBaselineError
from reinforce.refused import SAMPLED, VALIDATION, RefusedRowError
from reinforce.rm_connection import RewardError
from reinforce.run import checkpoint, distributed
from reinforce.run.actor import Actor
from reinforce.run.config import seconds
from reinforce.run.group import Group, make_groups, recorded
from reinforce.run.metrics import mean_reward, speed, summarise, summarise_ratios, summarise_updates
from reinforce.run.recorder import Recorder, Silent
from reinforce.run.resume import Start
from reinforce.run.stop import Stop
from reinforce.run.summary import print_summary
from reinforce.run.update import Step, Summed, Update
from reinforce.run.validation import validate


class Run:
    """The run folder and the state of a run. All ranks call every method at the same time."""

    def __init__(self, folder: Path, actor: Actor, data: Data, start: Start, stop: Stop) -> None:
        """`folder` has been opened for this run, and `actor` has been loaded from `start`."""
        self._folder, self._data, self._start = folder, data, start
        self._actor, self._config = actor, actor.config
        self._total = data.total_steps(self._config.max_steps, self._config.max_epochs)
        self._done = start.step  # finished steps
        self._saved = start.step  # steps in the last checkpoint
        self._refused = start.refused  # responses that finished steps have left out
        self._val_reward: float | None = None  # after the last finished step
        self._stop = stop
        self._stopped: str | None = None  # the reason of any rank, asked after each step
        limit = self._config.max_time_per_run
        stop.limit = None if limit is None else seconds(limit)
        actor.refusals.total = start.refused
        actor.client.stopped = lambda: stop.reason is not None  # then no request is tried again
        # the optimizer steps of the current step, each with the length of its gradient
        self._updates: list[tuple[Summed, float]] = []
        # metrics, groups and advantage of the last finished step, until they are written
        self._held: tuple[dict[str, Any], list[Group], Tensor] | None = None
        self._has_said_no_update = False
        self._began = time.perf_counter()
        recorder = Silent if distributed.rank() else Recorder
        self._recorder = recorder(folder, self._total, self._done)
        # the mean reward of each validation in validation.jsonl, by the step it was made after
        self._validated = distributed.together(
            lambda: {step: mean_reward(groups)[0] for step, groups in recorded(folder).items()},
            only_first=True,
        )

    def __enter__(self) -> "Run":
        """Begin the block in which nothing finished is lost."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Save the finished steps if the reward server or a baseline has ended the block.

        Raises FailedError on a refused response, and RetryError if the run was stopped early.
        """
        if isinstance(error, (RetryError, RewardError, OwnBaselineError)):
            self._save()  # all ranks have the error, and before any update of its step
        if error is not None:
            self._recorder.leave_screen()
        if isinstance(error, RefusedRowError):
            self._recorder.write_refused(self._done + 1, error.row)
            raise FailedError(self._refusal(error)) from error
        if error is None:
            self._conclude()

    def _refusal(self, error: RefusedRowError) -> str:
        """Where the server refused which response, and what to do."""
        step, fix = f"step {self._done + 1}", "it cannot be left out: mend the server"
        if error.row["kind"] == VALIDATION:
            step = f"the validation after step {self._done}"
        if error.row["kind"] == SAMPLED:
            fix = "--skip-refused N leaves out up to N such responses"
        return f"{step}: {error}; the whole row is in {self._folder}/refused.jsonl, and {fix}"

    def _conclude(self) -> None:
        """Say how the run ended. Raises RetryError if steps are left."""
        self._recorder.close()
        if self._start.step >= self._total:
            self._recorder.say(f"this run has all its {self._total} steps")
        elif self._done < self._total:
            raise RetryError(
                f"stopped by {self._stopped} after step {self._done} of {self._total}; "
                f"the same command with --log-dir {self._folder} goes on"
            )
        elif distributed.rank() == 0:
            print_summary(self._data, self._folder)

    def restore(self, optimizer: torch.optim.Optimizer, baseline: Baseline) -> None:
        """Give optimizer and baseline their state at the checkpoint from which this run goes on.

        The model was loaded from it.
        """
        self._optimizer, self._baseline = optimizer, baseline
        self._baseline_state = self._start.baseline  # after the last finished step
        if self._start.folder is not None:
            checkpoint.restore(self._start.folder, self._actor.model, optimizer)
            baseline.restore(self._start.baseline)
        if self._done:
            self._recorder.say(
                f"going on after step {self._done} of {self._total}: {self._start.folder}"
            )

    def steps(self) -> Iterator[int]:
        """The numbers of the steps to come; the first step of a run has number 0.

        A signal or the time limit ends them early.
        """
        self._stop.note_only()
        while self._done < self._total and self._stopped is None:
            self._began = time.perf_counter()
            self._actor.clock.read()
            yield self._done

    def learning_rate(self, step: int) -> float:
        """The learning rate of all optimizer steps in this step."""
        return self._config.learning_rate(step, self._total)

    def must_be_finite(self, made: Step, update: Update, sums: Summed, grad_norm: float) -> None:
        """Raise FailedError, on every rank, if loss or gradient is not finite.

        Loss and length of the gradient are the same numbers on all ranks. nonfinite.jsonl then
        holds the responses.
        """
        if math.isfinite(sums.loss + grad_norm):
            return
        bad = ~(sums.logp.sum(1) + made.batch.advantage).isfinite()  # (B,)
        responses = distributed.groups_of(bad, made.prompts)  # (P, K)
        self._recorder.write_nonfinite(
            made.number + 1, self._groups(made), update.prompts, responses.tolist()
        )
        progress = "no update was made"
        if done := len(self._updates):
            progress = f"after {done} of its updates; the last checkpoint is of an earlier step"
        raise FailedError(
            f"loss {sums.loss}, gradient {grad_norm} in step {made.number + 1}: {progress}; "
            f"the responses: {self._folder}/nonfinite.jsonl"
        )

    def updated(self, sums: Summed, grad_norm: float) -> None:
        """Count an optimizer step that was made."""
        self._updates.append((sums, grad_norm))

    def finished(self, made: Step) -> None:
        """Count the step as finished.

        Its line in metrics.jsonl waits for the validation that may follow.
        """
        if not self._updates:
            self._say_no_update(made.number + 1)
        seconds = self._actor.clock.read()
        seconds["update"] = time.perf_counter() - self._began - sum(seconds.values())
        groups = self._groups(made)
        greedy_tokens = 0 if made.greedy is None else int(made.greedy.length.sum())
        updates = [(sums.loss, sums.clipped, norm) for sums, norm in self._updates]
        metrics = {
            "step": made.number + 1,
            **summarise(groups, made.advantage.flatten().tolist()),
            **summarise_updates(groups, updates, self.learning_rate(made.number)),
            **self._ratios(made),
            "refused": self._actor.refusals.total,
            **speed(groups, sum(distributed.gather([greedy_tokens])), seconds),
            "prompts_seen": self._data.prompts_seen(made.number),
            "epoch": self._data.epoch(made.number),
        }
        for row in self._actor.refusals.rows:
            self._recorder.write_refused(made.number + 1, row)
        self._actor.refusals.rows.clear()
        self._refused = self._actor.refusals.total
        # of this step: a baseline that fails in the next one may have changed it by then
        self._baseline_state = copy.deepcopy(self._baseline.state)
        self._held, self._val_reward, self._updates = (metrics, groups, made.advantage), None, []
        self._done = made.number + 1
        reasons = distributed.of_all(self._stop.reason)
        self._stopped = next((reason for reason in reasons if reason), None)

    def _say_no_update(self, step: int) -> None:
        """Say it the first time that no response counts; the summary has the number of steps."""
        if self._has_said_no_update:
            return
        self._has_said_no_update = True
        reason = "the reward server refused all responses"
        if self._config.truncated == "drop":
            limit = f"--max-new-tokens {self._config.max_new_tokens}"
            reason = f"--truncated drop, and no response ended within {limit}"
        self._recorder.say(f"step {step} trains nothing: {reason}")

    def _groups(self, made: Step) -> list[Group]:
        """The responses of all ranks as text and numbers, in prompt order."""
        tokenizer, rollout = self._actor.tokenizer, made.batch.rollout
        groups = make_groups(tokenizer, made.prompts, rollout, made.judged, made.valid)
        return distributed.gather(groups)

    def _ratios(self, made: Step) -> dict[str, float | None]:
        """How far log pi of the scorer is from that of the sampler; None if nothing was scored."""
        scored = made.batch.logp_old
        if scored is None and self._updates:
            scored = self._updates[0][0].logp  # of the only optimizer step
        if scored is None:
            return summarise_ratios([], 1, 1)
        rollout, p = made.batch.rollout, len(made.prompts)
        log_ratio = (scored - rollout.logp).masked_fill(~rollout.mask, 0.0)  # (B, T), log rho
        gap = -log_ratio.sum(1)  # (B,)
        distance = (log_ratio.expm1() - log_ratio).sum(1)  # (B,)
        outside = ((log_ratio.exp() - 1).abs() > 0.1).sum(1)  # (B,)
        columns = [value.double().view(p, -1).sum(1) for value in (gap, distance, outside)]
        sums = torch.stack(columns, 1)  # (p, 3)
        tokens = sum(distributed.gather([int(rollout.length.sum())]))
        return summarise_ratios(distributed.gather(sums.tolist()), made.advantage.numel(), tokens)

    def validate_if_due(self) -> None:
        """Validate before the first step, after every --val-check-interval steps and at the end.

        One that a stop or a failure of the server has prevented is made when the run goes on.
        """
        held_out, done = self._data.held_out, self._done
        due = done == self._total or done % self._config.val_check_interval == 0
        if not held_out or not due or done in self._validated:
            return
        if self._stopped and done < self._total:  # saving comes first; it is made up for later
            return
        groups = validate(self._actor, held_out)
        self._val_reward = mean_reward(groups)[0]
        if self._held is not None:
            self._held[0]["val_reward"] = self._val_reward
        elif done:  # the step's line is written already
            self._recorder.complete(done, self._val_reward)
        self._write()
        self._recorder.validated(done, groups)
        self._validated[done] = self._val_reward

    def save_if_due(self) -> None:
        """Write the lines of the step and, if one is due, a checkpoint.

        A checkpoint is due every --save-interval steps, at a stop and at the end.
        """
        self._write()
        interval = self._config.save_interval or self._config.val_check_interval
        if self._done == self._total or self._stopped or self._done % interval == 0:
            self._save()

    def _write(self) -> None:
        """Write the lines of the last finished step, if they are not written yet."""
        if self._held is not None:
            metrics, groups, advantage = self._held
            self._recorder.log(metrics, groups, advantage.flatten().tolist())
            self._held = None

    def _save(self) -> None:
        """Write a checkpoint of the finished steps, if there is none yet."""
        if self._done == self._saved:
            return
        self._write()
        self._recorder.sync()
        state = {
            "val_reward": self._val_reward,
            "baseline": self._baseline_state,
            "bf16": self._actor.bf16,
            "refused": self._refused,
        }
        model, tokenizer = self._actor.model, self._actor.tokenizer
        optimizer, keep_best = self._optimizer, self._config.save_top_k
        checkpoint.save(
            *(self._folder, self._done, model, optimizer, tokenizer, state),
            *(keep_best, self._validated),
        )
        self._saved = self._done
