"""How a run begins and ends: its folder, its exit code, signals, and the toy's own reward server.

Exit codes: 0 done, 1 failed and a retry will not cure it, 2 your configuration or input, 75 run the same command again.
torchrun turns every code but 0 into 1, so the code and its reason are also in <log-dir>/exit.json.
"""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

import torch

from reinforce import distributed
from reinforce.errors import ConfigError, FailedError, RetryError

ROOT = Path(__file__).resolve().parents[1]


class Stop:
    """Why a run should end before its last step: SIGTERM, SIGINT, SIGUSR1 or its time.

    Before the loop there is nothing to save, and a signal ends the run; in the loop it is noted, however many come, and the
    loop asks when a step is done. A save is never interrupted.
    """

    def __init__(self) -> None:
        """Take over the three signals of this process, and start its clock."""
        self.signal: str | None = None
        self.in_loop = False
        self.limit: int | None = None  # seconds since this object was made
        self._began = time.monotonic()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        first, self.signal = self.signal is None, signal.Signals(number).name
        if first and not self.in_loop:
            raise RetryError(f"stopped by {self.signal} before the first step")

    @property
    def reason(self) -> str | None:
        """What it is stopped by; None if it is not."""
        if self.signal is None and self.limit is not None and time.monotonic() - self._began >= self.limit:
            return f"its time limit of {self.limit} s"
        return self.signal


def holds_run(folder: Path) -> bool:
    """Whether a run has begun in this folder."""
    return (folder / "metrics.jsonl").exists()


def job() -> str:
    """What the processes of one torchrun have in common, and no other running command has."""
    return f"{os.environ.get('MASTER_ADDR', f'process {os.getpid()}')}:{os.environ.get('MASTER_PORT', '')}"


def holds(folder: Path) -> bool:
    """Whether this command is the last one that claimed the folder."""
    try:
        return (folder / ".lock").read_text() == job()
    except OSError:
        return False


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a run folder, so that the same command given twice does not write there twice; exit.json of the last one is removed.

    Raises ConfigError if another process holds it, or nobody can write there. The lock ends with this block, or with this process,
    however it ends; on a network file system that of a crashed node may take minutes, so a job of Slurm waits for it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a+")
    except OSError as error:
        raise ConfigError(f"--log-dir {folder}: cannot be written to ({error})") from error
    with lock:
        end = time.monotonic() + (120 if "SLURM_JOB_ID" in os.environ else 0)
        while not _locked(lock):
            if time.monotonic() >= end:
                raise ConfigError(f"--log-dir {folder}: a run is going on there right now; wait for its end or give another")
            time.sleep(1)
        lock.truncate(0)
        lock.write(job())
        lock.flush()
        if not holds_run(folder) or (folder / "identity.json").exists():
            (folder / "exit.json").unlink(missing_ok=True)
        yield


def _locked(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def new_run_folder(log_dir: str | None, name: str) -> Path:
    """The run folder, made on rank 0: the given one, or runs/NAME-TIME with runs/latest pointing to it."""
    if log_dir is not None:
        folder = Path(log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for n in range(1000):
        folder = Path("runs") / f"{name}-{stamp}{f'-{n}' if n else ''}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            (folder / ".lock").write_text(job())
            break
    latest = Path("runs/latest")
    partial = Path(f"runs/.latest-{os.getpid()}")
    partial.symlink_to(folder.name)
    partial.replace(latest)
    return folder


def new_folder(name: str, flag: str) -> None:
    """Make the folder that a script will write to, before it works for hours. Raises ConfigError if it holds anything."""
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
        used = any(Path(name).iterdir())
    except OSError as error:
        raise ConfigError(f"{flag} {name}: cannot be made ({error})") from error
    if used:
        raise ConfigError(f"{flag} {name}: not empty; give a new folder")


def run(main: Callable[[], None], folder: Callable[[], Path | None] = lambda: None, name: str = "train.py") -> int:
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
        code, reason = 1, f"out of GPU memory ({first_line(error)}); lower --micro-batch-size, --micro-batch-tokens (update) or "
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
    if place is not None and (holds(place) if distributed.rank() else True):
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            with (place / "exit.json").open("x" if code else "w") as file:  # the first rank that fails knows why
                json.dump({"code": code, "reason": reason}, file, ensure_ascii=False)
    if expected:  # else other ranks may be waiting in a collective, and NCCL would wait for them here
        distributed.stop()
    return code


@contextlib.contextmanager
def before_retry(call: Callable[[], None]) -> Iterator[None]:
    """If this block ends in a RetryError, call that first."""
    try:
        yield
    except RetryError:
        call()
        raise


def first_line(error: BaseException) -> str:
    """First line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def log_dir_of(argv: Sequence[str]) -> Path | None:
    """--log-dir of a command line that may be wrong elsewhere, so that its exit.json has a place."""
    for i, word in enumerate(argv):
        if word == "--log-dir" and i + 1 < len(argv):
            return Path(argv[i + 1])
        if word.startswith("--log-dir="):
            return Path(word.partition("=")[2])
    return None


@contextlib.contextmanager
def toy_server(wait: float = 120.0, batch: int = 32) -> Iterator[tuple[str, int]]:
    """serve_rm.py with the toy's reward model on a free loopback port; ends with this block, or with this process.

    `batch` is its --inference-micro-batch-size; at 1 a reward depends on its text alone, bitwise.
    """
    with tempfile.TemporaryDirectory() as place, (Path(place) / "server.log").open("w+") as log:
        ready = Path(place) / "ready"
        command = [sys.executable, str(ROOT / "serve_rm.py"), "--ready-file", str(ready), "--exit-with-parent",
                   "--inference-micro-batch-size", str(batch)]  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)
        try:
            end = time.monotonic() + wait
            while not ready.exists():
                if server.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise RuntimeError(f"the toy's reward server did not start: {log.read()[-2000:]}")
                time.sleep(0.05)
            host, port = ready.read_text().split()
            yield host, int(port)
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
