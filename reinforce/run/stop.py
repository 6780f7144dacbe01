"""Signals and the time limit: why a run ends before its last step."""

import signal
import time
from types import FrameType

from reinforce.errors import StoppedError


class Stop:
    """Why a run should end before its last step: SIGTERM, SIGINT, SIGUSR1 or its time limit.

    Before the loop there is nothing to save, and a signal ends the run. In the loop signals are
    noted, however many come, and the loop asks for the reason after each step. So no signal
    interrupts a save.
    """

    def __init__(self) -> None:
        """Take over the three signals of this process, and start the clock of the limit."""
        self.signal: str | None = None
        self.in_loop = False
        self.limit: int | None = None  # seconds since this object was made
        self._began = time.monotonic()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        is_first, self.signal = self.signal is None, signal.Signals(number).name
        if is_first and not self.in_loop:
            raise StoppedError(f"stopped by {self.signal} before the first step")

    @property
    def reason(self) -> str | None:
        """The signal or the limit that stops the run; None if nothing does."""
        if self.signal is not None:
            return self.signal
        if self.limit is not None and time.monotonic() - self._began >= self.limit:
            return f"its time limit of {self.limit} s"
        return None
