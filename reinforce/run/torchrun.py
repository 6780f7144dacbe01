"""torchrun, but for its report where train.py has already said in one sentence why it ended.

Started by path, by launch.py. torchrun prints a page for every rank that ends with another code
than 0, and a traceback after a signal; the sentence would be lost in it. Codes 2 and 75 are those
of exits.py. Every other failure keeps torchrun's report.
With --exit-with-parent, a flag of serve_rm.py, or as the launcher's own child, torchrun ends as
well when its parent has ended.
"""
# ruff: noqa: E402

import logging
import os
import signal
import sys
import threading
import time

PARENT = os.getppid()  # before imports that take seconds, in which the parent may end

if __name__ == "__main__":
    del sys.path[0]  # this folder, whose names are no modules of their own
    logging.disable(logging.ERROR)  # "failed (exitcode: 2) local_rank: 0 ...", and the like

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

SAID = (2, 75)


def run() -> int:
    """torchrun's main, and its exit code.

    2 for your configuration, 128 + n for a rank that signal n has ended, 1 for another failure.
    """
    if "--exit-with-parent" in sys.argv or os.environ.get("LAUNCHER") == str(PARENT):
        threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        main()
    except ChildFailedError as error:
        # torchrun itself ends the other ranks by SIGTERM
        codes = {failure.exitcode for failure in error.failures.values()} - {-signal.SIGTERM}
        if not codes or not codes <= set(SAID):
            print(error, file=sys.stderr)
            return 128 - min(codes) if codes and min(codes) < 0 else 1
        return 2 if codes == {2} else 1
    except SignalException:
        return 1
    return 0


def end_with_parent() -> None:
    """Wait for the end of the parent, then end this process and its ranks as by a signal."""
    while os.getppid() == PARENT:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(run())
