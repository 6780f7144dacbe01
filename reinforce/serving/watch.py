"""What ends the server: a signal, the end of its parent, or a forward that hangs; in a thread.

The main thread belongs to the model or the reward function, which may hold it for as long as they
like. The kernel's side of a signal handler writes the signal's number into a socket
(signal.set_wakeup_fd), and this thread reads it there.
"""

import contextlib
import faulthandler
import math
import multiprocessing
import os
import select
import signal
import socket
import threading
import time
from types import TracebackType
from typing import Any, NoReturn

from reinforce.serving.handler import RewardServer
from reinforce.serving.report import report

HANG_SECONDS = 120.0  # one forward; every request in it has got its 504 long before
# of computing, on all processors, without letting another thread in
LOCKED_SECONDS = (HANG_SECONDS + 10) * (os.cpu_count() or 1)
BLOCKED_SECONDS = 1800.0  # of waiting without letting one in; a stopped process's clock goes on
DRAIN_SECONDS = 20.0  # for the answers that are being made, after a signal
END_SECONDS = 5.0  # for a reward function's own threads, after the last answer
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
        self._looked = time.monotonic()
        self._forward: float | None = None  # since when the present one runs
        self._asleep = 0.0  # seconds of it in which the process was suspended
        self._computed = time.process_time()
        self._stderr: int | None = None  # a descriptor that no reward function closes
        self._armed = -math.inf  # when BLOCKED_SECONDS began
        self._left = threading.Event()

    def __enter__(self) -> None:
        self._reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)
        self._before: dict[int, Any] = {n: signal.signal(n, _heard) for n in SIGNALS}
        signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        with contextlib.suppress(OSError):  # standard error is closed
            self._stderr = os.dup(2)
            faulthandler.register(signal.SIGPROF, self._stderr, all_threads=True, chain=True)
        os.register_at_fork(
            before=self._before_fork, after_in_parent=self._unmask, after_in_child=self._forked
        )
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")
        self._thread.start()

    def __exit__(self, kind: type | None, error: object, trace: TracebackType | None) -> None:
        self._left.set()
        self._thread.join()
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGPROF)
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
        """A child of a reward function (multiprocessing): our signals and sockets are not its.

        A connection that it kept would stay open after we have closed it.
        """
        if not self._left.is_set():
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._server.socket.close()
            for connection in tuple(self._server.connections):
                with contextlib.suppress(OSError):
                    os.close(connection.transport.get_extra_info("socket").fileno())
        self._unmask()

    def _run(self) -> None:
        try:
            self._watch()
        except BaseException as error:
            report(f"the watch thread failed: {error!r}")
            _exit(70)  # without it no signal ends the server

    def _watch(self) -> None:
        while not self._left.is_set():
            signal.setitimer(signal.ITIMER_PROF, LOCKED_SECONDS)  # the kernel sees it, we do not
            if self._stderr is not None and time.monotonic() > self._armed + BLOCKED_SECONDS / 10:
                faulthandler.dump_traceback_later(BLOCKED_SECONDS, exit=True, file=self._stderr)
                self._armed = time.monotonic()
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
        service, now = self._server.service, time.monotonic()
        late, self._looked = now - self._looked - 1, now
        computed, self._computed = self._computed, time.process_time()
        if self._computed - computed > late / 10:  # this thread was kept out, but others ran
            late = 0.0
        if service is None:
            return
        started = service.batcher.started
        if started != self._forward:
            self._forward, self._asleep = started, 0.0
        running = 0.0 if started is None else now - started
        self._asleep += max(0.0, min(late, running))
        if running - self._asleep > HANG_SECONDS:
            report(f"a forward took over {HANG_SECONDS:g} s")
            with contextlib.suppress(OSError):
                faulthandler.dump_traceback(2)
            _exit(70)
        if self._ending is None:
            return
        if not self._server.busy:
            service.batcher.stop()
        if now > self._ending + DRAIN_SECONDS:
            _exit(0)


def end_soon() -> None:
    """The process ends within END_SECONDS, whatever threads a reward function has left."""
    timer = threading.Timer(END_SECONDS, _exit, (0,))
    timer.daemon = True
    timer.start()


def _exit(code: int) -> NoReturn:
    """End at once, and the children of a reward function with us."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def _heard(number: int, frame: object) -> None:
    """The number is in the socket already."""
