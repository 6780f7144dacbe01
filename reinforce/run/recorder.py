"""What a person looks at: metrics, rollouts and validation.jsonl, TensorBoard, one line or bar a step, the last screen."""

import json
import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from reinforce.run.curves import draw_curves
from reinforce.run.group import Group, recorded
from reinforce.run.metrics import distinct, mean_reward
from reinforce.text import Prompt

SHOWN = ("reward", "kl", "response_length", "tokens_per_s")


class Recorder:
    """The files of a run folder and the progress on screen: rank 0's; other ranks have a `Silent` one."""

    def __init__(self, folder: Path, total: int, done: int = 0) -> None:
        """`total` steps are to come, of which `done` are there already."""
        self.folder = folder
        self._metrics = (folder / "metrics.jsonl").open("a", buffering=1)
        self._rollouts = (folder / "rollouts.jsonl").open("a", buffering=1)
        self._validation = (folder / "validation.jsonl").open("a", buffering=1)
        self._board = SummaryWriter(
            str(folder / "tensorboard"), purge_step=done + 1 if done else None
        )
        self._bar = (
            tqdm(total=total, initial=done, desc="step", dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )
        self._total = total

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
        shown = {
            name: format(metrics[name], ".0f" if name == "tokens_per_s" else ".2f")
            for name in SHOWN
            if metrics[name] is not None
        }
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update()
        else:
            fields = "  ".join(f"{name} {value:>7}" for name, value in shown.items())
            print(f"step {step:>{len(str(self._total))}}/{self._total}  {fields}", flush=True)

    def validated(self, step: int, groups: Sequence[Group]) -> None:
        """The validation after `step` steps."""
        for group in groups:
            self._validation.write(json.dumps({"step": step, **asdict(group)}) + "\n")
        reward, error = mean_reward(groups)
        self._board.add_scalar("val_reward", reward, step)
        self.say(
            f"validation after step {step}: reward {reward:.3f} ± {error:.3f} over {len(groups)} prompts"
        )

    def accuse(
        self,
        step: int,
        groups: Sequence[Group],
        update: Sequence[int],
        bad: Sequence[Sequence[bool]],
    ) -> None:
        """nonfinite.jsonl: of an update on the groups of these numbers, the bad responses (P, K), or all if none stands out."""
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
        """See that the disk has every line so far, since the checkpoint that follows counts on them."""
        for file in (self._metrics, self._rollouts, self._validation):
            file.flush()
            os.fsync(file.fileno())

    def say(self, line: str) -> None:
        """A line of text that does not tear the progress bar."""
        tqdm.write(line)
        sys.stdout.flush()

    def close(self) -> None:
        """Flush everything and draw the curves."""
        if self._bar is not None:
            self._bar.close()
        self._metrics.close()
        self._rollouts.close()
        self._validation.close()
        self._board.close()
        draw_curves(self.folder)


class Silent(Recorder):
    """A recorder that records nothing."""

    def __init__(self, folder: Path, total: int, done: int = 0) -> None:
        """Takes what a Recorder takes."""

    def log(
        self, metrics: dict[str, Any], groups: Sequence[Group], advantage: Sequence[float]
    ) -> None:
        """Nothing."""

    def validated(self, step: int, groups: Sequence[Group]) -> None:
        """Nothing."""

    def accuse(
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

    def close(self) -> None:
        """Nothing."""


def tell(prompts: list[Prompt], run: Path) -> None:
    """The last screen: the first validation and the last, five samples of each, where the files are."""
    validations = list(recorded(run).values())
    if validations:
        before, after = validations[0], validations[-1]
        print(f"\n{'validation':<12}{'reward':>16}{'tokens':>9}{'finished':>10}{'distinct-2':>12}")
        for name, groups in (("before", before), ("after", after)):
            reward, error = mean_reward(groups)
            n, variety = len(groups), distinct([g.response[0] for g in groups])
            length, finished = (
                sum(g.length[0] for g in groups) / n,
                sum(g.finished[0] for g in groups) / n,
            )
            print(
                f"{name:<12}{reward:>8.3f} ± {error:.3f}{length:>9.1f}{finished:>10.2f}{variety:>12.2f}"
            )
        for prompt, old, new in list(zip(prompts, before, after, strict=True))[:5]:
            print(f"\nprompt  {prompt.messages[-1]['content'] if prompt.messages else prompt.text}")
            print(f"before  {old.reward[0]:+.2f}  {old.response[0].strip()}")
            print(f"after   {new.reward[0]:+.2f}  {new.response[0].strip()}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**30 if sys.platform == "darwin" else 2**20
    )
    print(
        f"\ncurves {run}/curves.png · responses {run}/rollouts.jsonl · policy {run}/checkpoints · peak memory {peak:.1f} GiB"
    )
