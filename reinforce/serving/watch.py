"""What ends the server: a signal, the end of its parent, or a forward that hangs; in a thread.

The main thread belongs to the model or the reward function, which may hold it for as long as they
like. The kernel's side of a signal handler writes the signal's number into a socket
(signal.set_wakeup_fd), and this thread reads it there.
"""

import faulthandler
import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
import time
from types import TracebackType
from typing import Any, NoReturn

from reinforce.serving.handler import RewardServer

HANG_SECONDS = 120.0  # one forward; every request in it has got its 504 long before
DRAIN_SECONDS = 20.0  # for the answers that are being made, after a signal
TICK = 0.1
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Watch:
    """`with Watch(server, parent):` around loading and serving, in the main thread.

    The first signal lets the answers that are being made go out, and `Batcher.run` return; a second
    one ends the process.
    """

    _reading: socket.socket
    _writing: socket.socket

    def __init__(self, server: RewardServer, parent: int | None) -> None:
        """`parent`: the process whose end is to be ours; None: nobody's."""
        self._server, self._parent = server, parent
        self._ending: float | None = None  # since when
        self._left = threading.Event()

    def __enter__(self) -> None:
        self._reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)
        self._before: dict[int, Any] = {n: signal.signal(n, _heard) for n in SIGNALS}
        signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(
            before=self._before_fork, after_in_parent=self._unmask, after_in_child=self._forked
        )
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")
        self._thread.start()

    def __exit__(self, kind: type | None, error: object, trace: TracebackType | None) -> None:
        self._left.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._reading.close()
        self._writing.close()

    def _before_fork(self) -> None:
        """A signal to a child that still has our handlers would end us, and not the child."""
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def _unmask(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _forked(self) -> None:
        """A child of a reward function (multiprocessing): our signals and our port are not its."""
        if not self._left.is_set():
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._server.socket.close()
        self._unmask()

    def _run(self) -> None:
        while not self._left.is_set():
            # ends the process (code 1) where even this thread is not let in any more
            faulthandler.dump_traceback_later(HANG_SECONDS + 10, exit=True)
            ready, _, _ = select.select([self._reading], [], [], TICK)
            for number in self._reading.recv(64) if ready else b"":
                if number in SIGNALS:
                    self._end()
            if self._parent is not None and self._parent != os.getppid():
                self._parent = None
                self._end()
            self._look()

    def _end(self) -> None:
        service = self._server.service
        if self._ending is not None or service is None:  # a second signal, or nothing is served yet
            _exit(0)
        self._ending, self._server.draining = time.monotonic(), True

    def _look(self) -> None:
        service = self._server.service
        if service is not None and service.batcher.forward_for() > HANG_SECONDS:
            print(f"serve_rm.py: a forward took over {HANG_SECONDS:g} s", file=sys.stderr)
            faulthandler.dump_traceback()
            _exit(70)
        if service is None or self._ending is None:
            return
        if not self._server.busy:
            service.batcher.stop()
        elif time.monotonic() > self._ending + DRAIN_SECONDS:
            _exit(0)


def _exit(code: int) -> NoReturn:
    """End at once, and the children of a reward function with us."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def _heard(number: int, frame: object) -> None:
    """The number is in the socket already."""
