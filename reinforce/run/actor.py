"""The actor's models and its reward client, behind the verbs that the loop is written in."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from reinforce import device as devices
from reinforce.logprobs import Scorer
from reinforce.packed_weights import packed_weights
from reinforce.refused import (
    SAMPLED,
    VALIDATION,
    Refusals,
    RefusedRowError,
    Row,
    rewards_but_refused,
)
from reinforce.rm_client import RefusedError, RewardClient
from reinforce.rollout import Batch, Rollout, micro_batches
from reinforce.run import distributed
from reinforce.run.config import TrainConfig
from reinforce.run.in_flight import in_flight
from reinforce.run.offload import Idle
from reinforce.run.update import Update
from reinforce.sampler import CPU, Sampling, row_seed, sample_in_batches
from reinforce.text import Prompt, reward_requests

# --micro-batch-tokens by default. On a CPU twice as many were 1.13 times as fast, for 3.5 GiB more
# (bench/update.py --rows 32 64 --tokens 64 with SmolLM2-135M in bfloat16); a GPU was not measured.
MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


class Clock:
    """Seconds that each kind of work took since `read` was called last."""

    def __init__(self) -> None:
        """All zero."""
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, work: str) -> Iterator[None]:
        """Add what this block takes to `work`, a GPU's part included."""
        start = time.perf_counter()
        yield
        if torch.cuda.is_initialized():  # not with --device cpu
            torch.cuda.synchronize()
        self._seconds[work] = self._seconds.get(work, 0.0) + time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """The seconds so far; they start at zero again."""
        seconds, self._seconds = self._seconds, {}
        return seconds


@dataclass(frozen=True)
class Requested:
    """Rewards that the server has been asked for."""

    answer: Future[tuple[Tensor, list[Row]]]
    most: int  # refused rows that may be left out


@dataclass(frozen=True)
class Actor:
    """What set-up makes. All its verbs but `respond` and `ask` are for every rank together."""

    config: TrainConfig
    tokenizer: Any
    model: nn.Module  # the policy
    policy: Scorer  # the same parameters: `decode` for sampling
    scorer: nn.Module  # the same again, wrapped by DDP or FSDP: its forward gives logp
    reference: nn.Module | None  # scorer of the frozen initial policy; None if beta = 0
    client: RewardClient
    training: Sampling
    validation: Sampling
    device: torch.device
    bf16: bool
    refusals: Refusals
    # with --offload-optimizer the class whose averages wait on the host
    adamw: Callable[..., torch.optim.AdamW] = torch.optim.AdamW
    # with --offload-reference the reference: fetched to score, dropped before any other work
    idle: Idle = field(default_factory=Idle)
    clock: Clock = field(default_factory=Clock)

    def sample(self, prompts: Sequence[Prompt], step: int) -> Rollout:
        """K responses to each of this rank's prompts, row b to prompt b // K."""
        self.idle.drop()
        with self.clock("rollout"), distributed.gathered(self.policy):
            return self.respond(prompts, self.config.num_rollouts_per_prompt, step, self.training)

    def sample_greedy(self, prompts: Sequence[Prompt], step: int) -> Rollout:
        """The likeliest token each time: one response to each of this rank's prompts."""
        with self.clock("rollout"), distributed.gathered(self.policy):
            return self.respond(prompts, 1, step, dataclasses.replace(self.training, greedy=True))

    def respond(
        self,
        prompts: Sequence[Prompt],
        k: int,
        step: int,
        sampling: Sampling,
        max_rows: int | None = None,
    ) -> Rollout:
        """k responses to each prompt, at most `max_rows` rows at a time.

        Each row has random numbers of its own. Call this under `distributed.gathered(self.policy)`:
        ranks stop at different lengths.
        """
        seeds = [row_seed(self.config.seed, step, p.index, j) for p in prompts for j in range(k)]
        rows = max_rows or self.config.rollout_micro_batch_size
        ids = [p.ids for p in prompts]
        autocast = devices.autocast(self.device, self.bf16)
        with autocast, packed_weights(self.policy, self.bf16):
            return sample_in_batches(self.policy.decode, ids, seeds, sampling, rows, self.device)

    def request_rewards(
        self, prompts: Sequence[Prompt], rollout: Rollout, kind: str = SAMPLED
    ) -> Requested:
        """Ask the server for the reward of each row, and wait for nothing.

        A sampled row that the server refuses will be NaN, as often in a run as --skip-refused
        allows.
        """
        most = self.refusals.left if kind == SAMPLED else 0
        if not distributed.first_of_team():
            return Requested(Future(), most)
        here = rollout.to(CPU)  # from a GPU its tokens would come after what the reference computes
        # a thread: it makes no collective call, which would meet those of the reference
        return Requested(in_flight(lambda: self.ask(prompts, here, kind, most)), most)

    def rewards(self, requested: Requested) -> Tensor:
        """The reward of each row, (B,) float64, as soon as the server has answered.

        A rank whose server fails takes the other ranks along.
        """
        with self.clock("reward"):
            answer = requested.answer.result
            reward, refused = distributed.together(lambda: distributed.once_a_team(answer))
            if requested.most:
                self.refusals.take([row for rows in distributed.gather([refused]) for row in rows])
        return reward

    def ask(
        self, prompts: Sequence[Prompt], rollout: Rollout, kind: str = VALIDATION, most: int = 0
    ) -> tuple[Tensor, list[Row]]:
        """The rewards of one rank's rows, (B,) float64, and the rows that are NaN.

        Raises RefusedRowError where the server refuses more than `most`.
        """
        reward = torch.empty(len(rollout.finished), dtype=torch.float64)  # (B,)
        refused: list[Row] = []

        def refusal(b: int, response: str, answer: str) -> Row:
            prompt = prompts[b * len(prompts) // len(reward)]
            place = {"index": prompt.index, "prompt": prompt.text}
            return {**place, "response": response, "answer": answer, "kind": kind}

        as_text = self.config.rm_format == "query"
        for rows, request in reward_requests(self.tokenizer, prompts, rollout, as_text):
            texts = request["completions"]
            try:
                left = most - len(refused)
                values, answers = rewards_but_refused(self.client, request, left)
            except RefusedError as error:
                if error.index is None:
                    raise
                i = error.index
                raise RefusedRowError(refusal(rows[i], texts[i], str(error))) from error
            refused += [refusal(rows[i], texts[i], answer) for i, answer in answers.items()]
            numbers = [torch.nan if value is None else value for value in values]
            reward[rows] = torch.tensor(numbers, dtype=torch.float64)
        return reward, refused

    def reference_logp(self, rollout: Rollout) -> Tensor | None:
        """log pi_ref of every response token, (B, T), 0 outside the mask; None if beta = 0."""
        if self.reference is None:
            return None
        with self.clock("reference"):
            self.idle.fetch()
            return self.score(self.reference, rollout)

    def logp_old(self, rollout: Rollout) -> Tensor:
        """log pi of every response token under the policy as it is now, (B, T), no gradient."""
        return self.score(self.scorer, rollout)

    @torch.no_grad()
    def score(self, scorer: nn.Module, rollout: Rollout) -> Tensor:
        """logp of every response token under `scorer`, (B, T) float32; 0 outside the mask."""
        logp = torch.zeros_like(rollout.logp)  # (B, T)
        max_rows = self.config.forward_micro_batch_size
        # without a plain head the logits of all positions are made at once: bound them
        tokens = sys.maxsize if self.policy.plain else self.max_tokens
        group = rollout.groups if self.policy.shares_prompt else None
        runs = micro_batches(*rollout.lengths, max_rows, tokens, group)
        for rows in distributed.in_step(runs):
            part = rollout.take(rows)
            logp[rows, : part.mask.shape[1]] = self._forward(scorer, part)[: len(rows)]
        return logp

    @property
    def max_tokens(self) -> int:
        """--micro-batch-tokens, or this device's default."""
        return self.config.micro_batch_tokens or MICRO_BATCH_TOKENS[self.device.type]

    def micro_batches(self, batch: Batch, update: Update) -> Iterator[Batch]:
        """The parts of this rank's rows of an optimizer step.

        Ranks exchange gradients in the last part's backward pass. Every rank gets as many parts:
        one that has no rows left gets a row of weight 0, since a sharded model needs all ranks.
        """
        self.idle.drop()
        most = self.config.micro_batch_size, self.max_tokens
        prompt, response = ([lengths[b] for b in update.rows] for lengths in batch.rollout.lengths)
        groups = batch.rollout.groups if self.policy.shares_prompt else None
        group = None if groups is None else [groups[b] for b in update.rows]
        parts = distributed.in_step(micro_batches(prompt, response, *most, group))
        for i, part in enumerate(parts):
            with distributed.accumulating(self.scorer, last=i + 1 == len(parts)):
                yield batch.take([update.rows[j] for j in part])

    def logp(self, rollout: Rollout) -> Tensor:
        """log pi of every response token, (B, T), with gradient; 0 outside the mask."""
        return self._forward(self.scorer, rollout)

    def _forward(self, scorer: nn.Module, rollout: Rollout) -> Tensor:
        with devices.autocast(self.device, self.bf16):
            rows = (rollout.prompt, rollout.prompt_mask, rollout.response, rollout.mask)
            logp: Tensor = scorer(*rows)  # (B, T)
            return logp
