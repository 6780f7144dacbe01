"""Child processes of the launcher, each in a group of its own, and the signals between it and them.

Ctrl-C at a terminal comes to the launcher alone. What it does with a signal depends on the child in
front: a trainer is told, and saves in its own time; any other command is ended at once.
The standard library alone, for any Python from 3.8 on.
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
SAVING = 660.0  # seconds that a trainer may take to end its step and save: torchrun's 600 and more
AGAIN = 75  # exit code: the same command goes on (sysexits.h: EX_TEMPFAIL)


class EndedError(Exception):
    """The launcher ends, with an exit code and a sentence for stderr ("": the child has said it)."""

    def __init__(self, code: int, reason: str = "") -> None:
        """`code` as of exits.py."""
        super().__init__(reason)
        self.code = code


def say(line: str) -> None:
    """One line on stderr, under the name that the user has called."""
    sys.stderr.flush()
    os.write(
        2, f"launch.sh: {line}\n".encode()
    )  # also from a signal handler, in the middle of a print


def family(pid: int) -> list[int]:
    """A process and everything that it has started, the youngest first. Without `ps`: it alone."""
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
    """From now on a process below this one whose parent dies becomes this one's child (Linux).

    torchrun's workers, if it is killed: they can then be told to save. prctl(2).
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def end_orphans(kept: Sequence[Child], grace: float) -> None:
    """SIGTERM for all that this process has inherited, SIGKILL after `grace` seconds."""
    known = {os.getpid()} | {pid for child in kept for pid in family(child.process.pid)}
    deadline, told = time.monotonic() + grace, set[int]()
    while orphans := [pid for pid in family(os.getpid()) if pid not in known and not fetched(pid)]:
        for pid in orphans:
            late = time.monotonic() > deadline
            if late or pid not in told:
                told.add(pid)
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
        time.sleep(0.1)


def fetched(pid: int) -> bool:
    """Whether a process has ended, its exit status now read; `ps` itself, for one."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:  # a grandchild, or gone
        return not exists(pid)


def exists(pid: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class Child:
    """A process in a session of its own, with nothing to read."""

    def __init__(self, command: Sequence[str], **options: Any) -> None:
        """`options` go to Popen. Raises EndedError if the program is not there."""
        try:
            self.process = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, start_new_session=True, **options
            )
        except OSError as error:
            raise EndedError(2, f"{command[0]} cannot be started: {error.strerror}") from error

    @property
    def code(self) -> int | None:
        """Its exit code, 128 + N after signal N as a shell has it; None while it runs."""
        code = self.process.poll()
        return code if code is None or code >= 0 else 128 - code

    def tell(self, name: str, whole_group: bool = False) -> None:
        """Send it a signal, alone or with its group. One that has ended is left alone."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                (os.killpg if whole_group else os.kill)(self.process.pid, getattr(signal, name))

    def kill(self) -> None:
        """SIGKILL for it and for all that it has started, whatever their groups."""
        if self.process.poll() is None:
            for pid in family(self.process.pid):  # torchrun's workers have groups of their own
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            self.tell("SIGKILL", whole_group=True)
        self.process.wait()

    def end(self, grace: float = GRACE, whole_group: bool = True) -> int:
        """SIGTERM, then SIGKILL after `grace` seconds; its exit code. A stopped child is woken."""
        self.tell("SIGTERM", whole_group)
        self.tell("SIGCONT", whole_group)
        deadline = time.monotonic() + grace
        while self.code is None and time.monotonic() < deadline:
            time.sleep(0.05)
        self.kill()
        return self.code or 0


class Signals:
    """SIGINT, SIGTERM, SIGHUP and SIGUSR1 of this process: noted, and passed to a trainer in front."""

    def __init__(self) -> None:
        """Takes them over for as long as the process lives."""
        self.first: str | None = None  # the name of the first one
        self.at = 0.0  # when it came, seconds of time.monotonic
        self.trainer: Child | None = None
        self.as_usr1 = False  # under srun, which answers TERM by killing its tasks
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup, or after & in a script
                signal.signal(number, self._noted)

    def _noted(self, number: int, frame: object) -> None:
        if self.first is not None:  # another one must not break the save that the first has started
            return
        self.first, self.at = signal.Signals(number).name, time.monotonic()
        if self.trainer is not None:
            say(f"{self.first}: the actor ends after this step and saves")
            self.tell_trainer(self.first)

    def tell_trainer(self, name: str) -> None:
        """Ask the trainer to save and end."""
        if self.trainer is not None:
            name = "SIGTERM" if name == "SIGHUP" else name
            self.trainer.tell("SIGUSR1" if self.as_usr1 else name)

    def raise_if_any(self, doing: str) -> None:
        """Raises EndedError after a signal, where no trainer has to save first."""
        if self.first is not None:
            raise EndedError(AGAIN, f"stopped by {self.first} {doing}")


def wait_for(child: Child, signals: Signals, doing: str) -> int:
    """Exit code of a command that is in front. A signal ends the command, and raises EndedError."""
    try:
        while child.code is None:
            signals.raise_if_any(doing)
            time.sleep(0.05)
    finally:
        child.end()
    signals.raise_if_any(doing)
    return child.code or 0


def last_lines(file: IO[bytes] | str, count: int = 5) -> str:
    """The end of a log, for a message."""
    with open(file, "rb") if isinstance(file, str) else file as log:
        log.seek(0, os.SEEK_END)
        log.seek(max(0, log.tell() - 4096))
        return "\n".join(log.read().decode(errors="replace").splitlines()[-count:])
