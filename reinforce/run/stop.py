"""Signals and the time limit: why a run ends before its last step."""

import signal
import time
from types import FrameType

from reinforce.errors import StoppedError


class Stop:
    """Why a run should end before its last step: one of four signals, or its time limit.

    The signals are SIGTERM, SIGINT, SIGUSR1 and, where it is not ignored as under nohup, SIGHUP.

    Before the loop there is nothing to save, and a signal ends the run. In the loop signals are
    noted, however many come, and the loop asks for the reason after each step. So no signal
    interrupts a save.
    """

    def __init__(self) -> None:
        """Take over the signals of this process, and start the clock of the limit."""
        self.signal: str | None = None
        self._only_noted = False
        self.limit: int | None = None  # seconds since this object was made
        self._began = time.monotonic()
        numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)  # the terminal is closed
        for number in numbers:
            signal.signal(number, self._on_signal)

    def note_only(self) -> None:
        """From now on a signal is noted and raises nothing: in the loop, and after its end."""
        self._only_noted = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        is_first, self.signal = self.signal is None, signal.Signals(number).name
        if is_first and not self._only_noted:
            raise StoppedError(f"stopped by {self.signal} before the first step")

    @property
    def reason(self) -> str | None:
        """The signal or the limit that stops the run; None if nothing does."""
        if self.signal is not None:
            return self.signal
        if self.limit is not None and time.monotonic() - self._began >= self.limit:
            return f"its time limit of {self.limit} s"
        return None
