"""How a script ends: its exit code, and for a run exit.json.

Exit codes: 0 done, 1 failed and a retry will not cure it, 2 your configuration or input, 75 run the
same command again. torchrun turns every code but 0 into 1, so the code and its reason are also in
<log-dir>/exit.json.
"""

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from reinforce.errors import ConfigError, FailedError, RetryError
from reinforce.run import distributed
from reinforce.run.folder import claimed, is_ours, log_dir_of
from reinforce.run.stop import Stop


def run(
    main: Callable[[], None],
    folder: Callable[[], Path | None] = lambda: None,
    name: str = "train.py",
) -> int:
    """Call main and turn how it ended into an exit code and, once the folder is known, exit.json. `name` is the script's."""
    expected = True
    try:
        main()
        code, reason = 0, "done"
    except ConfigError as error:
        code, reason = 2, str(error)
    except RetryError as error:
        code, reason = 75, str(error)
    except FailedError as error:
        code, reason = 1, str(error)
    except KeyboardInterrupt:
        code, reason = 75, "interrupted"
    except torch.OutOfMemoryError as error:
        expected = False
        code, reason = (
            1,
            f"out of GPU memory ({first_line(error)}); lower --micro-batch-size, --micro-batch-tokens (update) or ",
        )
        reason += "--rollout-micro-batch-size (sampling), or give --gradient-checkpointing"
    except Exception as error:
        expected = False
        if distributed.lost(error):
            code, reason = 75, f"another rank is gone ({first_line(error)})"
        else:
            traceback.print_exc()
            code, reason = 1, f"{type(error).__name__}: {first_line(error)}"
    if code:
        rank = f" (rank {distributed.rank()})" if distributed.rank() else ""
        print(f"{name}{rank}: {reason}", file=sys.stderr, flush=True)
    place = folder()
    if place is not None and (distributed.rank() == 0 or is_ours(place)):
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            with (place / "exit.json").open(
                "x" if code else "w"
            ) as file:  # the first rank that fails knows why
                json.dump({"code": code, "reason": reason}, file, ensure_ascii=False)
    if code:
        report_to_torchrun(reason)
    if (
        expected
    ):  # else other ranks may be waiting in a collective, and NCCL would wait for them here
        distributed.stop()
    return code


def report_to_torchrun(reason: str) -> None:
    """Let torchrun's report of a failed rank end with the reason, in the file that it names for that."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file and not Path(file).exists():
        details = {"py_callstack": reason, "timestamp": str(int(time.time()))}
        text = json.dumps({"message": {"message": reason, "extraInfo": details}})
        with contextlib.suppress(OSError):
            Path(file).write_text(text)


class Life:
    """What a process of a run has until it ends."""

    def __init__(self) -> None:
        """Takes over the signals of this process."""
        self.stop = Stop()
        self.stack = ExitStack()  # what must be closed
        self.folder: Path | None = None  # where exit.json goes, once it is known


def run_in_folder(body: Callable[[Life], None]) -> int:
    """`run` for train.py: holds --log-dir, if it is given, before anything else can go wrong."""
    given = log_dir_of(sys.argv)
    place: list[Path | None] = [given if distributed.rank() else None]

    def main() -> None:
        life = Life()
        with life.stack:
            if given is not None and distributed.rank() == 0:
                life.stack.enter_context(claimed(given))
                place[:] = [given]
            try:
                body(life)
            finally:
                place[:] = [life.folder or place[0]]

    return run(main, lambda: place[0])


def first_line(error: BaseException) -> str:
    """First line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
