"""torchrun, but for its report where train.py has already said in one sentence why it ended.

Started by path, by launch.py. torchrun prints a page for every rank that ends with another code
than 0, and a traceback after a signal; the sentence would be lost in it. Codes 2 and 75 are those
of exits.py. Every other failure keeps torchrun's report.
"""

import logging
import sys

if __name__ == "__main__":
    del sys.path[0]  # this folder, whose names are no modules of their own
    logging.disable(logging.ERROR)  # "failed (exitcode: 2) local_rank: 0 ...", and the like

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

SAID = (2, 75)


def run() -> int:
    """torchrun's main, and its exit code: 1 for a failed rank."""
    try:
        main()
    except ChildFailedError as error:
        if any(failure.exitcode not in SAID for failure in error.failures.values()):
            raise
        return 1
    except SignalException:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run())
