"""Child processes of the launcher, and the signals between the launcher and them.

Each child is in a process group of its own, so Ctrl-C at a terminal comes to the launcher alone.
A signal to the launcher is passed on to a trainer in front, which ends its step and saves. Any
other command in front is ended at once.
Only the standard library is imported, for any Python from 3.8 on.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import IO, Any

GRACE = 30.0  # seconds between SIGTERM and SIGKILL: the server drains for 20
SAVING = 660.0  # seconds for a trainer to end its step and save: the 600 of torchrun and more
AGAIN = 75  # exit code: the same command goes on (sysexits.h: EX_TEMPFAIL)


class EndedError(Exception):
    """The launcher ends, with an exit code and a sentence for stderr.

    The sentence is "" where the child has printed its own.
    """

    def __init__(self, code: int, reason: str = "") -> None:
        """`code` is one of the exit codes in exits.py, or that of a child."""
        super().__init__(reason)
        self.code = code


def say(line: str) -> None:
    """Print one line to stderr, under the name of the script that the user has called."""
    with contextlib.suppress(OSError):  # nobody reads it any more
        sys.stderr.flush()
        # not print, which a signal handler may have interrupted
        os.write(2, f"launch.sh: {line}\n".encode(errors="backslashreplace"))


def family(pid: int) -> list[int]:
    """A process and all its descendants, the youngest first; without `ps` the process alone."""
    parents: dict[int, list[int]] = {}
    with contextlib.suppress(OSError):
        table = subprocess.run(
            ["ps", "-A", "-o", "pid=,ppid="], stdout=subprocess.PIPE, check=False
        )
        for line in table.stdout.decode().splitlines():
            child, parent = map(int, line.split())
            parents.setdefault(parent, []).append(child)
    found = [pid]
    for one in found:
        found.extend(parents.get(one, ()))
    return found[::-1]


def adopt_orphans() -> None:
    """Make every descendant whose parent dies a child of this process (Linux, see prctl(2)).

    If torchrun is killed, its workers can then be told to save.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def end_with_parent() -> None:
    """Have this process get SIGTERM when its parent dies, of a SIGKILL say (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM), 0, 0, 0)  # PR_SET_PDEATHSIG


def end_orphans(kept: Sequence[Child], grace: float) -> None:
    """End the processes that this one has adopted: SIGTERM, then SIGKILL after `grace` seconds.

    The `kept` children and all that they have started are left alone.
    """
    known = {os.getpid()} | {pid for child in kept for pid in family(child.process.pid)}
    deadline = time.monotonic() + grace
    signalled: set[int] = set()
    while orphans := [pid for pid in family(os.getpid()) if pid not in known and not fetched(pid)]:
        for pid in orphans:
            late = time.monotonic() > deadline
            if late or pid not in signalled:
                signalled.add(pid)
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
        time.sleep(0.1)


def fetched(pid: int) -> bool:
    """Whether a process has ended, `ps` itself for one; reads the exit status of a child."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:  # a grandchild, or no process any more
        return not exists(pid)


def exists(pid: int) -> bool:
    """Whether a process has this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is another user's
    return True


class Child:
    """A process in a session of its own, with an empty stdin."""

    def __init__(self, command: Sequence[str], **options: Any) -> None:
        """Start it; `options` go to Popen. Raises EndedError if the program cannot be started."""
        try:
            self.process = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, start_new_session=True, **options
            )
        except OSError as error:
            raise EndedError(2, f"{command[0]} cannot be started: {error.strerror}") from error

    @property
    def code(self) -> int | None:
        """The exit code, as in a shell 128 + N after signal N; None while the process runs."""
        code = self.process.poll()
        return code if code is None or code >= 0 else 128 - code

    def tell(self, name: str, whole_group: bool = False) -> None:
        """Send a signal to the process, or to its group; nothing happens once it has ended."""
        send = os.killpg if whole_group else os.kill
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                send(self.process.pid, getattr(signal, name))

    def kill(self) -> None:
        """Send SIGKILL to the process and all its descendants, whatever their groups."""
        if self.process.poll() is None:
            for pid in family(self.process.pid):  # workers of torchrun have groups of their own
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            self.tell("SIGKILL", whole_group=True)
        self.process.wait()

    def end(self, grace: float = GRACE, whole_group: bool = True) -> int:
        """Send SIGTERM, then SIGKILL after `grace` seconds, and return the exit code.

        A child that is stopped (SIGSTOP) is woken.
        """
        self.tell("SIGTERM", whole_group)
        self.tell("SIGCONT", whole_group)
        deadline = time.monotonic() + grace
        while self.code is None and time.monotonic() < deadline:
            time.sleep(0.05)
        self.kill()
        return self.code or 0


class Signals:
    """SIGINT, SIGTERM, SIGHUP and SIGUSR1 of this process: noted, and passed on to a trainer."""

    def __init__(self) -> None:
        """Take the four signals over for as long as the process lives."""
        self.first: str | None = None  # the name of the first signal
        self.at = 0.0  # when the first signal came, seconds of time.monotonic
        self.trainer: Child | None = None  # the trainer in front, if there is one
        self.as_usr1 = False  # under srun, which kills its tasks at a SIGTERM
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            # ignored under nohup, or after & in a script: that stays so
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        if self.first is not None:  # a second signal must not break the save after the first
            return
        self.first, self.at = signal.Signals(number).name, time.monotonic()
        if self.trainer is not None:
            self.tell_trainer(self.first)
            say(f"{self.first}: the actor is asked to end after this step and to save")

    def tell_trainer(self, name: str) -> None:
        """Ask the trainer, by a signal, to save and end."""
        if self.trainer is not None:
            name = "SIGTERM" if name == "SIGHUP" else name
            self.trainer.tell("SIGUSR1" if self.as_usr1 else name)

    def raise_if_any(self, doing: str) -> None:
        """Raise EndedError after a signal, where no trainer has to save first."""
        if self.first is not None:
            raise EndedError(AGAIN, f"stopped by {self.first} {doing}")


def wait_for(child: Child, signals: Signals, doing: str) -> int:
    """Wait for a command in front, and return its exit code.

    A signal ends the command. EndedError is then raised.
    """
    try:
        while child.code is None:
            signals.raise_if_any(doing)
            time.sleep(0.05)
    finally:
        child.end()
    signals.raise_if_any(doing)
    return child.code or 0


def last_lines(file: IO[bytes] | str, count: int = 5) -> str:
    """The last lines of a log, for a message."""
    with open(file, "rb") if isinstance(file, str) else file as log:
        log.seek(0, os.SEEK_END)
        log.seek(max(0, log.tell() - 4096))
        return "\n".join(log.read().decode(errors="replace").splitlines()[-count:])
