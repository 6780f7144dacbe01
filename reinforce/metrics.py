"""What a person looks at: metrics, rollouts and validation.jsonl, TensorBoard, one line or bar a step, curves.png.

All numbers are means over all rows, or tokens, of all ranks. KL is per response, in nats, as in the objective; entropy is the
mean of -logp per token, an estimate from the sampled tokens; zero_signal is the share of groups whose valid rows all have the
same objective, or are fewer than two, which teach group baselines nothing (null at K = 1); logprob_gap is the mean over responses
of sum_t (sampler's - scorer's logp); ratio_clipped the share of tokens whose gradient the clipped ratio cut; tokens counts what
was sampled, ReMax's greedy responses included.
"""

import json
import math
import os
import resource
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from reinforce.data import Prompt
from reinforce.group import Group

SHOWN = ("reward", "kl", "response_length", "tokens_per_s")


def summarise(groups: Sequence[Group], advantage: Sequence[float]) -> dict[str, Any]:
    """Metrics of one step's groups, of all ranks; advantage (P*K,)."""
    rows = [row for g in groups for row in zip(g.reward, g.objective, g.length, g.finished, g.logp, strict=True)]
    reward, objective, length, finished, logp = (list(column) for column in zip(*rows, strict=True))
    kl = [value for g in groups for value in g.kl or []]
    return {
        "reward": statistics.fmean(reward),
        "reward_std": statistics.stdev(reward) if len(reward) > 1 else 0.0,
        "kl": statistics.fmean(kl) if kl else None,
        "objective": statistics.fmean(objective),
        "advantage_std": statistics.stdev(advantage) if len(advantage) > 1 else 0.0,
        "entropy": -math.fsum(logp) / sum(length),
        "response_length": statistics.fmean(length),
        "finished": statistics.fmean(finished),
        "valid": statistics.fmean(v for g in groups for v in g.valid),
        "zero_signal": statistics.fmean(len(set(_counted(g))) < 2 for g in groups) if len(groups[0].reward) > 1 else None,
    }


def summarise_updates(
    groups: Sequence[Group], updates: Sequence[tuple[float, float, float]], lr: float, logprob_gap: float | None
) -> dict[str, Any]:
    """Means over a step's optimizer steps, of (loss, clipped tokens, length of the gradient) each; None where there was none."""
    losses, clipped, norms = ([update[i] for update in updates] for i in range(3))
    tokens = sum(n for g in groups for n, valid in zip(g.length, g.valid, strict=True) if valid)
    return {
        "loss": math.fsum(losses) / len(losses) if losses else None,
        "grad_norm": sum(norms) / len(norms) if norms else None,
        "lr": lr,
        "optimizer_steps": len(norms),
        "logprob_gap": logprob_gap,
        "ratio_clipped": math.fsum(clipped) / max(1, tokens),
    }


def speed(groups: Sequence[Group], greedy_tokens: int, seconds: dict[str, float]) -> dict[str, Any]:
    """Sampled tokens, and what the step's parts took in seconds."""
    tokens = sum(sum(g.length) for g in groups) + greedy_tokens
    times = {f"time_{work}": seconds.get(work, 0.0) for work in ("rollout", "reward", "reference", "update")}
    return {"tokens": tokens, "tokens_per_s": tokens / times["time_rollout"], **times}


def _counted(group: Group) -> list[float]:
    return [r for r, v in zip(group.objective, group.valid, strict=True) if v]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def mean_reward(groups: Sequence[Group]) -> tuple[float, float]:
    """Mean of all rewards, and its standard error."""
    return mean_and_error([r for g in groups for r in g.reward])


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """Distinct-n: different word n-grams over all word n-grams of the texts; falls towards 0 as they become alike.

    See "A Diversity-Promoting Objective Function for Neural Conversation Models", Li et al. (2016, arXiv 1510.03055).

    >>> distinct(["a b a b"])
    0.6666666666666666
    """
    words = [text.split() for text in texts]
    grams = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def recorded(run: Path) -> dict[int, list[Group]]:
    """The validations in a run folder, {step: groups}, in order."""
    found: dict[int, list[Group]] = {}
    if not (run / "validation.jsonl").exists():
        return found
    for line in (run / "validation.jsonl").read_text().splitlines():
        record = json.loads(line)
        found.setdefault(record.pop("step"), []).append(Group(**record))
    return found


def tell(prompts: list[Prompt], run: Path) -> None:
    """The last screen: the first validation and the last, five samples of each, where the files are."""
    validations = list(recorded(run).values())
    if validations:
        before, after = validations[0], validations[-1]
        print(f"\n{'validation':<12}{'reward':>16}{'tokens':>9}{'finished':>10}{'distinct-2':>12}")
        for name, groups in (("before", before), ("after", after)):
            reward, error = mean_reward(groups)
            n, variety = len(groups), distinct([g.response[0] for g in groups])
            length, finished = sum(g.length[0] for g in groups) / n, sum(g.finished[0] for g in groups) / n
            print(f"{name:<12}{reward:>8.3f} ± {error:.3f}{length:>9.1f}{finished:>10.2f}{variety:>12.2f}")
        for prompt, old, new in list(zip(prompts, before, after, strict=True))[:5]:
            print(f"\nprompt  {prompt.messages[-1]['content'] if prompt.messages else prompt.text}")
            print(f"before  {old.reward[0]:+.2f}  {old.response[0].strip()}")
            print(f"after   {new.reward[0]:+.2f}  {new.response[0].strip()}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    print(f"\ncurves {run}/curves.png · responses {run}/rollouts.jsonl · policy {run}/checkpoints · peak memory {peak:.1f} GiB")


class Recorder:
    """The files of a run folder and the progress on screen: rank 0's; other ranks have a `Silent` one."""

    def __init__(self, folder: Path, total: int, done: int = 0) -> None:
        """`total` steps are to come, of which `done` are there already."""
        self.folder = folder
        self._metrics = (folder / "metrics.jsonl").open("a", buffering=1)
        self._rollouts = (folder / "rollouts.jsonl").open("a", buffering=1)
        self._validation = (folder / "validation.jsonl").open("a", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else None)
        self._bar = tqdm(total=total, initial=done, desc="step", dynamic_ncols=True) if sys.stderr.isatty() else None
        self._total = total

    def log(self, metrics: dict[str, Any], groups: Sequence[Group], advantage: Sequence[float]) -> None:
        """One step."""
        step = metrics["step"]
        self._metrics.write(json.dumps(metrics) + "\n")
        k = len(groups[0].reward)
        for i, group in enumerate(groups):
            record = {"step": step, **asdict(group), "advantage": list(advantage[i * k : (i + 1) * k])}
            self._rollouts.write(json.dumps(record) + "\n")
        for name, value in metrics.items():
            if isinstance(value, (int, float)) and name != "val_reward":
                self._board.add_scalar(name, value, step)
        shown = {name: format(metrics[name], ".0f" if name == "tokens_per_s" else ".2f") for name in SHOWN
                 if metrics[name] is not None}  # fmt: skip
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
        self.say(f"validation after step {step}: reward {reward:.3f} ± {error:.3f} over {len(groups)} prompts")

    def accuse(self, step: int, groups: Sequence[Group], update: Sequence[int], bad: Sequence[Sequence[bool]]) -> None:
        """nonfinite.jsonl: of an update on the groups of these numbers, the bad responses (P, K), or all if none stands out."""
        rows = [(i, k) for i in update for k in range(len(bad[i]))]
        with (self.folder / "nonfinite.jsonl").open("w") as file:
            for i, k in [(i, k) for i, k in rows if bad[i][k]] or rows:
                one = {name: v[k] if isinstance(v, list) else v for name, v in asdict(groups[i]).items()}
                file.write(json.dumps({"step": step, "k": k, **one}) + "\n")

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

    def log(self, metrics: dict[str, Any], groups: Sequence[Group], advantage: Sequence[float]) -> None:
        """Nothing."""

    def validated(self, step: int, groups: Sequence[Group]) -> None:
        """Nothing."""

    def accuse(self, step: int, groups: Sequence[Group], update: Sequence[int], bad: Sequence[Sequence[bool]]) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def draw_curves(folder: Path) -> None:
    """curves.png from metrics.jsonl: reward, KL, reward against KL, length, entropy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if not lines:
        return
    panels = [("step", "reward"), ("step", "kl"), ("kl", "reward"), ("step", "response_length"), ("step", "entropy")]
    units = {"step": "step", "reward": "reward", "kl": "KL to the initial policy, nats", "response_length": "tokens",
             "entropy": "nats per token"}  # fmt: skip
    titles = {"reward": "mean reward", "kl": "KL", "response_length": "response length", "entropy": "entropy"}
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.4), layout="constrained")
    for axis, (x, y) in zip(axes, panels, strict=True):
        points = [(line[x], line[y]) for line in lines if line[x] is not None and line[y] is not None]
        if points:
            along = x == "step"
            axis.plot(*zip(*points, strict=True), "-" if along else ".", color="tab:blue", markersize=4, label="training")
        if y == "reward" and x == "step":
            measured = [(step, mean_reward(groups)[0]) for step, groups in recorded(folder).items()]
            if measured:
                axis.plot(*zip(*measured, strict=True), "o--", color="tab:orange", label="validation")
                axis.legend()
        axis.set(xlabel=units[x], ylabel=units[y], title=titles[y] if x == "step" else "reward against KL")
        axis.grid(alpha=0.3)
    figure.savefig(folder / "curves.png", dpi=110)
    plt.close(figure)
