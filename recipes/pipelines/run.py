"""Your own models, prompts and reward: flags of serve_rm.py, --, flags of train.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reinforce.run.children import EndedError

if TYPE_CHECKING:
    from reinforce.run.launch import Job


def pipeline(job: Job, words: list[str]) -> None:
    """`words`: SERVER FLAGS -- TRAIN FLAGS. Raises EndedError without the two dashes."""
    if "--" not in words:
        raise EndedError(
            2,
            "run: the -- between the flags of serve_rm.py and those of train.py is missing: "
            "./launch.sh run SERVER FLAGS -- TRAIN FLAGS",
        )
    middle = words.index("--")
    server, train = words[:middle], words[middle + 1 :]
    job.check(train=train, server=server)
    job.serve(*server)
    job.train(*train)
