"""A hacked reward in one picture: the toy with the KL penalty and without it.

    python recipes/toy_hack.py          two runs of 100 steps, and hack.png

The reward model likes both policies. The grammar, which training never sees, tells them apart:
without the penalty the texts are no reviews any more.
"""

import json
import statistics
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes import toy
from reinforce.errors import ConfigError, FailedError
from reinforce.flags import flag, parse, refuse
from reinforce.run import exits, pictures
from reinforce.run.folder import new_folder, new_run_folder

BETAS = (0.05, 0.0)
LOOKS = {0.05: (pictures.BLUE, "-"), 0.0: (pictures.VERMILION, "--")}  # colour and dashes


LONGEST = 76  # characters of a response that fit below the panels


@dataclass(frozen=True)
class Config:
    """The flags."""

    max_steps: int = flag(100, "size", "steps of each run")
    seed: int = flag(0, "size", "seed of both runs")
    log_dir: str | None = flag(
        None, "report", "folder of both runs (default: a new runs/hack-TIME)"
    )
    picture: str | None = flag(
        None, "report", "file of the picture (default: hack.png in --log-dir)"
    )

    def check(self) -> None:
        """Raise ConfigError on the first combination that cannot work."""
        refuse(self, positive=("max_steps",))
        if self.picture is not None:
            path = Path(self.picture)
            if path.suffix != ".png" or path.is_dir() or not path.parent.is_dir():
                raise ConfigError(f"--picture {path}: give a file NAME.png in a folder that exists")


@dataclass(frozen=True)
class Step:
    """One step's responses, in the eyes of the reward model and of the grammar."""

    reward: float  # mean
    grammatical: float  # share
    positive: float  # share
    response: str  # the first one


def train(beta: float, config: Config, folder: Path) -> list[Step]:
    """Train the toy with this penalty, and read what it said. Raises FailedError."""
    script = Path(__file__).resolve().parents[1] / "train.py"
    command = [sys.executable, str(script), "--initial-policy-kl-penalty", str(beta)]
    size = ["--max-steps", str(config.max_steps), "--seed", str(config.seed)]
    done = subprocess.run([*command, *size, "--log-dir", str(folder)])
    if done.returncode:
        raise FailedError(f"the run in {folder} ended with exit code {done.returncode}")
    return read_steps(folder)


def read_steps(folder: Path) -> list[Step]:
    """The steps of a run on the toy, from its rollouts.jsonl."""
    groups: dict[int, list[dict[str, Any]]] = {}
    with (folder / "rollouts.jsonl").open() as file:
        for line in file:
            group = json.loads(line)
            groups.setdefault(group["step"], []).append(group)
    return [_read_step(groups[step]) for step in sorted(groups)]


def _read_step(groups: list[dict[str, Any]]) -> Step:
    responses = [response for group in groups for response in group["response"]]
    labels = [toy.sentiment(response) for response in responses]
    return Step(
        statistics.fmean(reward for group in groups for reward in group["reward"]),
        statistics.fmean(label is not None for label in labels),
        statistics.fmean(label is not None and label > 0 for label in labels),
        responses[0].strip(),
    )


def draw(runs: dict[float, list[Step]], path: Path) -> None:
    """The reward model's reward beside the grammar's shares, and each run's last response."""
    panels = {
        "A": ("reward model's reward", "reward"),
        "B": ("grammar: is a review", "grammatical"),
        "C": ("grammar: is positive", "positive"),
    }
    with pictures.picture(path, "ABC", 4.6) as (figure, axes):
        for letter, (title, name) in panels.items():
            axis = axes[letter]
            for beta, steps in runs.items():
                color, dashes = LOOKS[beta]
                said = textwrap.shorten(steps[-1].response, LONGEST, placeholder=" ...")
                label = f"β = {beta:g}: “{said}”" if letter == "A" else None
                values = [getattr(step, name) for step in steps]
                numbers = range(1, len(steps) + 1)
                pictures.plot_smoothed(axis, numbers, values, color, linestyle=dashes, label=label)
            axis.set_title(title)
            pictures.finish_steps(axis, max(map(len, runs.values())))
            if letter != "A":
                axis.set_ylim(-0.05, 1.05)
            pictures.finish_values(axis)
        figure.legend(loc="outside lower center")


def main() -> None:
    """Train twice, draw."""
    config = parse(Config, __doc__)
    if config.log_dir is not None:
        new_folder(config.log_dir, "--log-dir")
    folder = new_run_folder(config.log_dir, "hack")
    runs = {beta: train(beta, config, folder / f"beta-{beta:g}") for beta in BETAS}
    path = folder / "hack.png" if config.picture is None else Path(config.picture)
    draw(runs, path)
    print("\nlast step   reward  grammatical  positive")
    for beta, steps in runs.items():
        last = steps[-1]
        print(f"β = {beta:<6g}{last.reward:>8.2f}{last.grammatical:>13.2f}{last.positive:>10.2f}")
    print(f"picture     {path}")


if __name__ == "__main__":
    sys.exit(exits.run(main, name="recipes/toy_hack.py"))
