"""curves.png, drawn from the logs of a run folder."""

import json
from pathlib import Path

from reinforce.run.group import recorded
from reinforce.run.metrics import mean_reward


def draw_curves(folder: Path) -> None:
    """curves.png from metrics.jsonl: reward, KL, reward against KL, length, entropy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if not lines:
        return
    panels = [
        ("step", "reward"),
        ("step", "kl"),
        ("kl", "reward"),
        ("step", "response_length"),
        ("step", "entropy"),
    ]
    units = {
        "step": "step",
        "reward": "reward",
        "kl": "KL to the initial policy, nats",
        "response_length": "tokens",
        "entropy": "nats per token",
    }
    titles = {
        "reward": "mean reward",
        "kl": "KL",
        "response_length": "response length",
        "entropy": "entropy",
    }
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4 * len(panels), 3.4), layout="constrained"
    )
    for axis, (x, y) in zip(axes, panels, strict=True):
        points = [
            (line[x], line[y]) for line in lines if line[x] is not None and line[y] is not None
        ]
        if points:
            along = x == "step"
            axis.plot(
                *zip(*points, strict=True),
                "-" if along else ".",
                color="tab:blue",
                markersize=4,
                label="training",
            )
        if y == "reward" and x == "step":
            measured = [(step, mean_reward(groups)[0]) for step, groups in recorded(folder).items()]
            if measured:
                axis.plot(
                    *zip(*measured, strict=True), "o--", color="tab:orange", label="validation"
                )
                axis.legend()
        axis.set(
            xlabel=units[x],
            ylabel=units[y],
            title=titles[y] if x == "step" else "reward against KL",
        )
        axis.grid(alpha=0.3)
    figure.savefig(folder / "curves.png", dpi=110)
    plt.close(figure)
