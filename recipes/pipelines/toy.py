"""The embedded default: prepare the toy, train on it, and let its grammar judge the result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reinforce.run.children import EndedError

if TYPE_CHECKING:
    from reinforce.run.launch import Job


def pipeline(job: Job, words: list[str]) -> None:
    """`words` are flags of train.py. Raises EndedError."""
    for word in words:
        if (flag := word.partition("=")[0]) in ("--policy", "--train-data"):
            reason = "the toy has its own; ./launch.sh run --reward-model RM -- FLAGS takes yours"
            raise EndedError(2, f"{flag}: {reason}")
    job.check(train=words)
    toy = job.output("recipes/toy.py")
    job.serve("--reward-model", f"{toy}/reward_model")
    job.train(
        *("--policy", f"{toy}/policy"),
        *("--train-data", f"{toy}/train.jsonl"),
        *("--val-data", f"{toy}/validation.jsonl"),
        *words,
    )
    job.run("recipes/toy.py", "--judge", job.folder)
    print("to see the reward model fooled, take the KL penalty away:")
    print("  ./launch.sh --initial-policy-kl-penalty 0")
