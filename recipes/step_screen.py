"""What recipes/step.py shows: a table of numbers, and responses whose tokens are shaded."""

import os
import sys
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor

from reinforce.run.printable import escaped
from reinforce.text import decoded


def number(value: Tensor | float) -> str:
    """Three decimals, and no minus before a zero."""
    return f"{round(float(value), 3) + 0.0:.3f}"


def heading(prompt: str, steps: int, k: int) -> str:
    """The prompt, the end of a long one, and where its policy comes from."""
    text = escaped(prompt)
    text = text if len(text) < 70 else f"…{text[-68:]}"
    since = "π still is π_ref: KL is 0" if steps == 1 else "in step 1 π was π_ref"
    return f"prompt     {text}\nstep       {steps} on this prompt, from {k} responses y; {since}"


def numbers(table: dict[str, tuple[Tensor, str]]) -> str:
    """A line for each name: K numbers, and what they are."""
    count = len(next(iter(table.values()))[0])
    lines = [" " * 11 + "".join(f"{f'y{k}':>10}" for k in range(1, count + 1))]
    for name, (values, meaning) in table.items():
        columns = "".join(f"{number(value):>10}" for value in values)
        lines.append(f"{name:11}{columns}  {meaning}")
    return "\n".join(lines)


def effect(A: Tensor, change: Tensor, texts: list[list[str]]) -> str:  # noqa: N803
    """What the step did: A (K,), change of each token's log pi (K, T)."""
    moved = change.sum(1).double()  # (K,)
    climb, better, worse = (A * moved).mean(), A > 0, A < 0
    rose, fell = (better & (moved > 0)).sum(), (worse & (moved < 0)).sum()
    k, t = divmod(int(change.abs().argmax()), change.shape[1])
    token = f"{texts[k][t].strip()!r} in y{k + 1}, by {number(change[k, t])}"
    return "\n".join(
        [
            f"climb      {number(climb)} = 1/{len(A)} Σ A · change, which the gradient raises",
            f"A > 0      log π rose in {rose} of {better.sum()} responses",
            f"A < 0      log π fell in {fell} of {worse.sum()} responses",
            f"token      that moved most: {token}",
        ]
    )


def pieces(tokenizer: Any, prompt: Sequence[int], response: Sequence[int]) -> list[str]:
    """The response's text, cut where its tokens end, special tokens included."""

    def text(t: int) -> str:
        return decoded(tokenizer, prompt, response[:t], skip_special_tokens=False)

    whole, n = text(len(response)), len(response)
    ends = [*accumulate((len(text(t)) for t in range(1, n)), max), len(whole)]
    return [escaped(whole[a:b]) for a, b in zip([0, *ends], ends, strict=False)]


def responses(texts: list[list[str]], change: Tensor) -> str:
    """In lines of 80 columns; where the terminal has colours they show change (K, T)."""
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    most, lines = float(change.abs().max()) or 1.0, list[str]()
    for k, text in enumerate(texts):
        line, used = f"y{k + 1}  ", 4
        for piece, d in zip(text, change[k].tolist(), strict=False):
            if used + len(piece) > 80 and used > 4:
                lines.append(line)
                line, used = " " * 4, 4
            said = piece.lstrip() if used == 4 else piece
            line += shaded(said, d / most) if colours else said
            used += len(said)
        lines.append(line)
    if colours:
        key = f"{shaded('likelier', 1)} or {shaded('less likely', -1)} after the step"
        lines.append(f"    {key}; log π(token) changed by {most:.3f} at most")
    return "\n".join(lines)


def shaded(text: str, d: float) -> str:
    """The text in black on blue for d > 0 or on orange for d < 0, in three depths; |d| <= 1."""
    depth = round(3 * abs(d))
    if depth == 0:
        return text
    colour = ((153, 117, 75) if d > 0 else (223, 216, 208))[depth - 1]
    return f"\x1b[30;48;5;{colour}m{text}\x1b[0m"
