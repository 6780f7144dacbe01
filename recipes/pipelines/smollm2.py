"""A real language model, SmolLM2-135M-Instruct, against a served function, VADER's sentiment."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reinforce.run.launch import Job

# the user's words come after these flags, and win
SETTINGS = (
    *("--num-rollout-samples", 8, "--num-rollouts-per-prompt", 4, "--max-new-tokens", 32),
    *("--max-steps", 24, "--max-epochs", 2, "--val-check-interval", 12),
    *("--lr", 2e-5, "--initial-policy-kl-penalty", 0.02, "--micro-batch-size", 16),
)


def pipeline(job: Job, words: list[str]) -> None:
    """`words` are flags of train.py."""
    job.check(train=[*SETTINGS, *words])
    data = job.output("recipes/smollm2.py")
    job.serve("--reward-fn", f"{job.root}/recipes/smollm2.py:positivity")
    job.train(
        *("--policy", f"{data}/policy"),
        *("--train-data", f"{data}/train.jsonl"),
        *("--val-data", f"{data}/validation.jsonl"),
        *SETTINGS,
        *words,
    )
