"""Work that goes on beside the main thread, such as a request whose answer is not needed yet."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_flight(work: Callable[[], T]) -> Future[T]:
    """Start `work` in a thread; `result()` waits for what it returns, or raises its error.

    The thread is a daemon: a process that ends on another error does not wait for it.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
