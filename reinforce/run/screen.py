"""The progress of a run on screen: a bar in a terminal, a line a step elsewhere."""

import os
import sys
import time
from typing import Any

from reinforce.run.printable import columns_of

LABELS = {"reward": "reward", "kl": "KL", "response_length": "length", "tokens_per_s": "tokens/s"}
SHORTEST_BAR, LONGEST_BAR = 8, 40  # columns


class Progress:
    """What is done of a run. The bar is on standard error, lines of text are on standard output."""

    def __init__(self, total: int, done: int = 0) -> None:
        """The run has `total` steps in all, of which `done` are made already."""
        self._total, self._done, self._done_before = total, done, done
        self._began = time.monotonic()
        self._numbers: dict[str, str] = {}  # of the last step
        self._has_bar = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._draw()

    def step(self, metrics: dict[str, Any]) -> None:
        """A step is done; its metrics have the keys of LABELS, None where there is no number."""
        self._done = metrics["step"]
        self._numbers = {
            label: number(metrics[key]) for key, label in LABELS.items() if metrics[key] is not None
        }
        if self._has_bar:
            self._draw()
        else:
            print(step_line(self._done, self._total, self._numbers), flush=True)

    def say(self, line: str) -> None:
        """A line of text above the bar."""
        self._write("\r\x1b[K")
        print(line, flush=True)
        self._draw()

    def close(self) -> None:
        """Leave the bar as it is, and the rest of the screen to others."""
        self._write("\n")
        self._has_bar = False

    def _draw(self) -> None:
        block = "█" if _can_print("█") else "#"
        columns = columns_of(sys.stderr) - 1  # a full line would move the cursor to the next one
        line = bar_line(self._done, self._total, self._numbers, self._clock(), columns, block)
        self._write(f"\r{line}\x1b[K")

    def _clock(self) -> str:
        """The time that is left, at the speed so far; at the end the time that it took."""
        passed, made = time.monotonic() - self._began, self._done - self._done_before
        if self._done >= self._total:
            return f"in {duration(passed)}"
        return f"{duration(passed / made * (self._total - self._done))} left" if made else ""

    def _write(self, text: str) -> None:
        if self._has_bar:
            sys.stderr.write(text)
            sys.stderr.flush()


def step_line(done: int, total: int, numbers: dict[str, str]) -> str:
    """A step on a line of its own, its columns below those of other steps.

    >>> step_line(7, 100, {"reward": "1.54", "tokens/s": "34312"})
    'step   7/100  reward   1.54  tokens/s  34312'
    """
    fields = [f"{label} {value:>6}" for label, value in numbers.items()]
    return "  ".join([f"step {done:>{len(str(total))}}/{total}", *fields])


def bar_line(
    done: int, total: int, numbers: dict[str, str], clock: str, columns: int, block: str = "█"
) -> str:
    """A step as a bar and as many whole numbers as the columns hold.

    Reward, KL and speed come before the bar, the bar before the clock and the length.

    >>> bar_line(7, 10, {"reward": "1.54", "KL": "3.62", "tokens/s": "34312"}, "", 61)
    'step  7/10 |█████   |  reward  1.54  KL  3.62  tokens/s 34312'
    """
    count = f"{done:>{len(str(total))}}/{total}"
    heads = (f"step {count}", count, f"{done / max(1, total):.0%}", "")
    head = next(head for head in heads if len(head) <= columns)
    fields = [f"  {label} {value:>5}" for label, value in numbers.items() if label != "length"]
    extra = [f"  {clock}"] if clock else []
    if "length" in numbers:
        extra.append(f"  length {numbers['length']:>5}")
    tail, room = "", columns - len(head)
    for field in fields:
        if len(tail + field) > room:
            return head + tail
        tail += field
    for field in extra:
        if len(" ||" + tail + field) + SHORTEST_BAR <= room:
            tail += field
    width = min(LONGEST_BAR, room - len(" ||" + tail))
    if width < SHORTEST_BAR:
        return head + tail
    return f"{head} |{block * (width * done // max(1, total)):<{width}}|{tail}"


def number(value: float) -> str:
    """A number in seven characters or so, whatever its size.

    >>> number(1.5), number(-1e-9), number(34311.6), number(-123456789.0)
    ('1.50', '0.00', '34312', '-1.2e+08')
    """
    if abs(value) < 1000:
        return f"{value:.2f}".replace("-0.00", "0.00")
    return f"{value:.0f}" if abs(value) < 1e6 else f"{value:.1e}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> duration(61.2), duration(400_000)
    ('0:01:01', '111:06:40')
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _can_print(text: str) -> bool:
    try:
        text.encode(sys.stderr.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
