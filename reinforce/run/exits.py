"""How a script ends: with an exit code and, if it is a run, exit.json.

     0   done
     1   failed, and a retry will not cure it
     2   your configuration or input is wrong
    75   run the same command again

torchrun turns every code but 0 into 1, so the code and its reason are also in <log-dir>/exit.json.
"""

import contextlib
import errno
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from reinforce.errors import ConfigError, FailedError, RetryError, StoppedError, first_line
from reinforce.run import distributed
from reinforce.run.folder import claimed, is_ours, log_dir_of
from reinforce.run.stop import Stop
from reinforce.run.streams import unheard


def run(
    main: Callable[[], None],
    folder: Callable[[], Path | None] = lambda: None,
    name: str = "train.py",
) -> int:
    """Call `main`, and return the exit code for its end; `name` is the name of the script.

    The reason of a failure goes to stderr. Code and reason go to exit.json, if `folder` knows a
    folder by then.
    """
    expected = True
    sys.stdout, sys.stderr = unheard(sys.stdout), unheard(sys.stderr)
    try:
        main()
        code, reason = 0, "done"
    except KeyboardInterrupt:
        code, reason = 75, "interrupted"
    except StoppedError as error:
        code, reason = 75, str(error)
    except Exception as error:
        expected = isinstance(error, (ConfigError, RetryError, FailedError))
        code, reason = outcome(error)
    if code:
        sys.stdout.flush()  # what was said before stands before the reason
        rank = f" (rank {distributed.rank()})" if distributed.rank() else ""
        print(f"{name}{rank}: {reason}", file=sys.stderr, flush=True)
    run_folder = folder()
    if run_folder is not None and (distributed.rank() == 0 or is_ours(run_folder)):
        write_exit(run_folder, code, reason)
    if code:
        report_to_torchrun(reason)
    if expected:
        # after an unexpected error other ranks may wait in a collective call, and NCCL would wait
        # for them here
        distributed.stop()
    return code


# what a disk says that is full, read-only, gone or broken
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ESTALE, errno.EIO)


def outcome(error: Exception) -> tuple[int, str]:
    """Exit code and reason for an exception; prints the traceback of an unknown one."""
    if isinstance(error, ConfigError):
        return 2, str(error)
    if isinstance(error, RetryError):
        return 75, str(error)
    if isinstance(error, FailedError):
        return 1, str(error)
    line = first_line(error)
    if isinstance(error, torch.OutOfMemoryError):
        return 1, (
            f"out of GPU memory ({line}); lower --micro-batch-tokens (in train.py also "
            "--micro-batch-size, and --rollout-micro-batch-size for sampling, or give "
            "--gradient-checkpointing)"
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in line:
        return 1, f"out of memory ({line}); take smaller sizes, or a machine with more"
    if isinstance(error, OSError) and error.errno in DISK:
        return 1, f"{line}; remove the cause, then give the same command again"
    if distributed.lost(error):
        return 75, f"another rank is gone ({line})"
    traceback.print_exc()
    return 1, f"{type(error).__name__}: {line}"


def write_exit(folder: Path, code: int, reason: str) -> None:
    """Write exit.json; of several ranks that fail, the first one knows the reason."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        # a reason may hold what is no text, such as the bytes of a path
        with (folder / "exit.json").open(
            "x" if code else "w", encoding="utf-8", errors="backslashreplace"
        ) as file:
            try:
                json.dump({"code": code, "reason": reason}, file, ensure_ascii=False)
                file.flush()
            except OSError:  # the disk is full
                (folder / "exit.json").unlink()


def report_to_torchrun(reason: str) -> None:
    """Write the reason to the file that torchrun names for it: its report then ends with it."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file and not Path(file).exists():
        details = {"py_callstack": reason, "timestamp": str(int(time.time()))}
        text = json.dumps({"message": {"message": reason, "extraInfo": details}})
        with contextlib.suppress(OSError):
            Path(file).write_text(text)


class Life:
    """What a process of a run has until it ends."""

    def __init__(self, log_dir: Path | None = None) -> None:
        """Take over the signals of this process. `log_dir`: --log-dir, a link followed once."""
        self.stop = Stop()
        self.log_dir = None if log_dir is None else str(log_dir)
        self._claimed: Path | None = None
        self.stack = ExitStack()  # what must be closed
        self.folder: Path | None = None  # where exit.json goes, once it is known

    def claim(self, folder: Path) -> None:
        """Hold the run folder until this life ends, on rank 0. Raises ConfigError."""
        if distributed.rank() == 0 and self._claimed is None:
            self.stack.enter_context(claimed(folder))
            self._claimed = folder


def run_in_folder(body: Callable[[Life], None]) -> int:
    """`run` for train.py: claims --log-dir, if it is given, before anything else can go wrong."""
    # a command that asks for --help is none on that folder
    given = None if {"-h", "--help"} & set(sys.argv) else log_dir_of(sys.argv)
    # on rank 0 the given folder is not ours until it is claimed
    folder = given if distributed.rank() else None

    def main() -> None:
        nonlocal folder
        life = Life(given)
        with life.stack:
            if given is not None and distributed.rank() == 0:
                life.claim(given)
                folder = given
            try:
                body(life)
            finally:
                folder = life.folder or folder
                life.stop.note_only()  # the run is over: a signal has nothing to stop any more

    return run(main, lambda: folder)
