"""All baselines side by side: recipes/compare.py starts the reward server and the runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reinforce.run.launch import Job


def pipeline(job: Job, words: list[str]) -> None:
    """`words` are flags of recipes/compare.py."""
    job.run("recipes/compare.py", *words)
