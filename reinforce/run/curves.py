"""curves.png, drawn from the logs of a run folder."""

import json
from pathlib import Path
from typing import Any

from reinforce.run.group import recorded
from reinforce.run.metrics import mean_reward
from reinforce.run.pictures import (
    BLUE,
    FEW,
    VERMILION,
    finish_steps,
    finish_values,
    finite,
    picture,
    plot_smoothed,
    say_instead,
    smoothed,
)

LAYOUT = "AAABBB;CCDDEE"
NO_KL = "β = 0: no KL"
TITLES = {
    "A": ("reward", "reward"),
    "C": ("kl", "KL, nats"),
    "D": ("response_length", "response length, tokens"),
    "E": ("entropy", "entropy, nats a token"),
}


def draw_curves(folder: Path) -> None:
    """curves.png from metrics.jsonl: reward, reward against KL, KL, length, entropy."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if not lines:
        return
    last = lines[-1]["step"]
    with picture(folder / "curves.png", LAYOUT, 7.5) as (figure, axes):
        for letter, (key, title) in TITLES.items():
            axis = axes[letter]
            points = [(line["step"], line[key]) for line in lines if finite(line[key])]
            label = "training" if letter == "A" else None
            if points:
                steps, values = zip(*points, strict=True)
                plot_smoothed(axis, steps, values, BLUE, label=label)
            if key == "reward":
                _draw_validation(axis, folder)
            axis.set_title(title)
            finish_steps(axis, last)
            finish_values(axis)
            if key == "kl" and not points:
                say_instead(axis, NO_KL)
        if axes["A"].get_legend_handles_labels()[0]:
            figure.legend(loc="outside upper center", ncols=2)
        _draw_against_kl(figure, axes["B"], lines)


def _draw_validation(axis: Any, folder: Path) -> None:
    """Mean validation rewards with their standard errors."""
    found = [(step, *mean_reward(groups)) for step, groups in recorded(folder).items()]
    if found:
        steps, means, errors = zip(*found, strict=True)
        label = "validation ± standard error"
        axis.errorbar(
            steps, means, errors, fmt="s--", color=VERMILION, capsize=4, linewidth=1.5, label=label
        )


def _draw_against_kl(figure: Any, axis: Any, lines: list[dict[str, Any]]) -> None:
    """Each step's reward over its KL, coloured by the step, over the smoothed path."""
    from matplotlib.ticker import MaxNLocator

    points = [
        (line["kl"], line["reward"], line["step"])
        for line in lines
        if finite(line["kl"]) and finite(line["reward"])
    ]
    if not points:
        has_kl = any(finite(line["kl"]) for line in lines)
        say_instead(axis, "no reward" if has_kl else NO_KL)
        return
    axis.set_title("reward against KL")
    kl, reward, steps = zip(*points, strict=True)
    axis.plot(smoothed(kl), smoothed(reward), color="0.6", linewidth=1.5, zorder=1)
    first, last = steps[0], max(steps[-1], steps[0] + 1)
    size = 40 if len(kl) < FEW else 22 if len(kl) < 400 else 5
    dots = axis.scatter(kl, reward, size, steps, cmap="viridis", vmin=first, vmax=last, zorder=2)
    if len(kl) > 1:
        figure.colorbar(dots, ax=axis, label="step", ticks=MaxNLocator(5, integer=True))
    axis.set_xlabel("KL to the initial policy, nats")
    finish_values(axis)
    finish_values(axis, "x")
