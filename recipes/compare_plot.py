"""compare.png: of every baseline the reward against tokens and KL, and the noise of the gradient.

A baseline has the same colour, dashes and marker everywhere. Of lines that coincide the later ones
are thinner and dashed, with markers at other places, so that each can be seen.
"""

import statistics
from pathlib import Path
from typing import Any

import numpy as np

from recipes.intervals import student
from reinforce.run import pictures
from reinforce.run.pictures import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, YELLOW

Lines = list[dict[str, Any]]  # metrics.jsonl of a run, with the tokens so far
Noise = dict[
    str, list[dict[str, float | None]]
]  # "initial", "trained": a seed's ratios by baseline

LOOKS = {  # colour, dashes, marker
    "none": (BLACK, (0, (1, 1)), "x"),
    "ema": (ORANGE, (0, (5, 1)), "s"),
    "rloo": (BLUE, "-", "o"),
    "remax": (VERMILION, (0, (4, 1, 1, 1)), "^"),
    "group-mean": (SKY, (0, (2, 2)), "D"),
    "grpo": (GREEN, (0, (6, 2)), "v"),
}
OTHER_LOOKS = ((PURPLE, "--", "P"), (YELLOW, "-.", "*"))  # of one's own baselines
NOISE_AXIS = "full: initial policy, hollow: trained,\nwhere it could be measured in all seeds"
POINTS = 60  # of a curve
MARKERS = 5  # of a curve


def draw(
    curves: dict[str, list[Lines]], labels: dict[str, str], noise: Noise, budget: int, path: Path
) -> None:
    """The three panels; `curves` has the runs of a baseline, `labels` its name in the picture."""
    own = [name for name in curves if name not in LOOKS]
    looks = {name: _look(name, own) for name in curves}
    with pictures.picture(path, "AA;BC", 9) as (_, axes):
        for i, name in enumerate(curves):
            width = 5 - 3.5 * i / max(1, len(curves) - 1)
            style = {"linewidth": width, "markersize": 8, **looks[name]}
            offset = POINTS * i // (MARKERS * len(curves))
            _draw_curves(axes, curves[name], budget, offset, {"label": labels[name], **style})
            for where in noise:
                ratios = [one[name] for one in noise[where]]
                known = [ratio for ratio in ratios if ratio is not None]
                if len(known) == len(ratios) > 1:  # else the mean would be of the clearer ones
                    _draw_noise(axes["C"], i, where == "initial", known, looks[name])
        axes["A"].set(title="reward, mean of the seeds, 95 % interval", xlabel="sampled tokens")
        axes["B"].set(title="reward against KL", xlabel="KL to the initial policy, nats")
        if any(line["kl"] is None for runs in curves.values() for run in runs for line in run):
            pictures.say_instead(axes["B"], "β = 0: no KL")
        for letter in "AB":
            pictures.finish_values(axes[letter])
            pictures.finish_values(axes[letter], "x")
        _finish_noise(axes["C"], [labels[name] for name in curves], any(noise.values()))
        axes["A"].legend(loc="lower right", ncols=2, handlelength=3.5)


def _look(name: str, own: list[str]) -> dict[str, Any]:
    look = LOOKS.get(name) or OTHER_LOOKS[own.index(name) % len(OTHER_LOOKS)]
    color, dashes, marker = look
    return {"color": color, "linestyle": dashes, "marker": marker}


def _draw_curves(
    axes: dict[str, Any], runs: list[Lines], budget: int, offset: int, style: dict[str, Any]
) -> None:
    """Means over the seeds along the tokens; intervals stand at the markers."""
    grid = np.linspace(0, budget, POINTS + 1)[1:]
    reward = np.array([[near(run, t, "reward") for t in grid] for run in runs])  # (seeds, points)
    kl = np.array([[near(run, t, "kl") for t in grid] for run in runs])  # (seeds, points)
    half = [student(column.tolist())[1] for column in reward.T]
    every = (offset, POINTS // MARKERS)
    axes["A"].errorbar(
        grid,
        reward.mean(0),
        half,
        errorevery=every,
        markevery=every,
        elinewidth=1.5,
        capsize=3,
        **style,
    )
    axes["B"].plot(kl.mean(0), reward.mean(0), markevery=every, **style)


def _draw_noise(
    axis: Any, place: int, initial: bool, known: list[float], look: dict[str, Any]
) -> None:
    """One baseline's mean and interval: full at the initial policy, hollow at the trained one."""
    mean, half = student(known)
    shape = {"marker": look["marker"], "color": look["color"], "markersize": 10, "capsize": 4}
    if not initial:
        shape["markerfacecolor"] = "white"
    x = place + (-0.15 if initial else 0.15)
    low = min(half, 0.9 * mean)  # an axis of logarithms has no 0
    axis.errorbar(x, mean, [[low], [half]], **shape)


def _finish_noise(axis: Any, labels: list[str], measured: bool) -> None:
    axis.set_title("noise of one step's gradient")
    if not measured:
        pictures.say_instead(axis, "not measured")
        return
    axis.set(yscale="log", xlim=(-0.5, len(labels) - 0.5), xlabel=NOISE_AXIS)
    axis.set_xticks(range(len(labels)), labels, rotation=40, ha="right", rotation_mode="anchor")


def near(run: Lines, tokens: float, key: str) -> float:
    """Mean of the five steps up to a number of tokens."""
    before = [line[key] or 0.0 for line in run if line["tokens_so_far"] <= tokens]
    return statistics.fmean(before[-5:] or [run[0][key] or 0.0])
