"""What a run writes down: metrics, rollouts and validation.jsonl, TensorBoard, a step on screen."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from reinforce.errors import first_line
from reinforce.run.curves import draw_curves
from reinforce.run.group import Group
from reinforce.run.metrics import mean_reward
from reinforce.run.screen import Progress


class Recorder:
    """Rank 0's files of a run folder and progress on screen; other ranks have a `Silent` one."""

    def __init__(self, folder: Path, total: int, done: int = 0) -> None:
        """The run has `total` steps in all, of which `done` are made already."""
        self.folder = folder
        self._metrics = (folder / "metrics.jsonl").open("a", buffering=1)
        self._rollouts = (folder / "rollouts.jsonl").open("a", buffering=1)
        self._validation = (folder / "validation.jsonl").open("a", buffering=1)
        # also where a run was killed before its first checkpoint, and begins again
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
        self._progress = Progress(total, done)

    def log(
        self, metrics: dict[str, Any], groups: Sequence[Group], advantage: Sequence[float]
    ) -> None:
        """One step."""
        step = metrics["step"]
        self._metrics.write(json.dumps(metrics) + "\n")
        k = len(groups[0].reward)
        for i, group in enumerate(groups):
            record = {
                "step": step,
                **asdict(group),
                "advantage": list(advantage[i * k : (i + 1) * k]),
            }
            self._rollouts.write(json.dumps(record) + "\n")
        for name, value in metrics.items():
            if isinstance(value, (int, float)) and name != "val_reward":
                self._board.add_scalar(name, value, step)
        self._progress.step(metrics)

    def complete(self, step: int, val_reward: float) -> None:
        """Give the last line of metrics.jsonl, that of `step`, its validation reward."""
        path = self.folder / "metrics.jsonl"
        *before, last = path.read_text().splitlines(keepends=True) or [""]
        if not last:  # the logs were removed
            return
        metrics = json.loads(last)
        if metrics["step"] == step and "val_reward" not in metrics:
            partial = self.folder / f".metrics.{os.getpid()}"
            line = json.dumps({**metrics, "val_reward": val_reward}) + "\n"
            partial.write_text("".join([*before, line]))
            self._metrics.close()
            partial.replace(path)
            self._metrics = path.open("a", buffering=1)

    def validated(self, step: int, groups: Sequence[Group]) -> None:
        """The validation after `step` steps."""
        for group in groups:
            self._validation.write(json.dumps({"step": step, **asdict(group)}) + "\n")
        reward, error = mean_reward(groups)
        self._board.add_scalar("val_reward", reward, step)
        found = f"reward {reward:.3f} ± {error:.3f} over {len(groups)} prompts"
        self.say(f"validation after step {step}: {found}")

    def write_nonfinite(
        self,
        step: int,
        groups: Sequence[Group],
        update: Sequence[int],
        bad: Sequence[Sequence[bool]],
    ) -> None:
        """nonfinite.jsonl: the bad responses of an update, or all of them if none is bad by itself.

        `update` has the numbers of its groups, `bad` is (P, K).
        """
        rows = [(i, k) for i in update for k in range(len(bad[i]))]
        with (self.folder / "nonfinite.jsonl").open("w") as file:
            for i, k in [(i, k) for i, k in rows if bad[i][k]] or rows:
                one = {
                    name: v[k] if isinstance(v, list) else v
                    for name, v in asdict(groups[i]).items()
                }
                file.write(json.dumps({"step": step, "k": k, **one}) + "\n")

    def write_refused(self, step: int, row: dict[str, Any]) -> None:
        """refused.jsonl: a response of this step that the reward server refused."""
        with (self.folder / "refused.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **row}) + "\n")

    def sync(self) -> None:
        """See that the disk has every line so far: the checkpoint that follows counts on them."""
        for file in (self._metrics, self._rollouts, self._validation):
            file.flush()
            os.fsync(file.fileno())

    def say(self, line: str) -> None:
        """A line of text that does not tear the progress bar."""
        self._progress.say(line)

    def leave_screen(self) -> None:
        """Say no more: an error message follows."""
        self._progress.close()

    def close(self) -> None:
        """Flush everything and draw the curves."""
        self._progress.close()
        self._metrics.close()
        self._rollouts.close()
        self._validation.close()
        self._board.close()
        try:
            draw_curves(self.folder)
        except OSError as error:  # the run itself is done
            print(f"no curves.png: {first_line(error)}", file=sys.stderr, flush=True)


class Silent(Recorder):
    """A recorder that records nothing."""

    def __init__(self, folder: Path, total: int, done: int = 0) -> None:
        """Takes what a Recorder takes."""

    def log(
        self, metrics: dict[str, Any], groups: Sequence[Group], advantage: Sequence[float]
    ) -> None:
        """Nothing."""

    def complete(self, step: int, val_reward: float) -> None:
        """Nothing."""

    def validated(self, step: int, groups: Sequence[Group]) -> None:
        """Nothing."""

    def write_nonfinite(
        self,
        step: int,
        groups: Sequence[Group],
        update: Sequence[int],
        bad: Sequence[Sequence[bool]],
    ) -> None:
        """Nothing."""

    def write_refused(self, step: int, row: dict[str, Any]) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Nothing."""

    def leave_screen(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""
