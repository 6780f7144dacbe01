"""The run folder: made, held by one command at a time, and named by --log-dir."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from reinforce.errors import ConfigError


def holds_run(folder: Path) -> bool:
    """Whether a run has begun in this folder."""
    return (folder / "metrics.jsonl").exists()


def job() -> str:
    """What the processes of one torchrun have in common, and no other running command has."""
    return f"{os.environ.get('MASTER_ADDR', f'process {os.getpid()}')}:{os.environ.get('MASTER_PORT', '')}"


def is_ours(folder: Path) -> bool:
    """Whether this command is the last one that claimed the folder."""
    try:
        return (folder / ".lock").read_text() == job()
    except OSError:
        return False


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a run folder, so that the same command given twice does not write there twice; exit.json of the last one is removed.

    Raises ConfigError if another process holds it, or nobody can write there. The lock ends with
    this block, or with this process, however it ends; on a network file system that of a crashed
    node may take minutes, so a job of Slurm waits for it.
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
                raise ConfigError(
                    f"--log-dir {folder}: a run is going on there right now; wait for its end or give another"
                )
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
    """The run folder, made on rank 0: the given one, or a new runs/NAME-TIME. Raises ConfigError."""
    stamp, n = time.strftime("%Y%m%d-%H%M%S"), 0
    while True:
        folder = (
            Path(log_dir)
            if log_dir is not None
            else Path("runs") / f"{name}-{stamp}{f'-{n}' if n else ''}"
        )
        try:
            folder.mkdir(parents=True, exist_ok=log_dir is not None)
        except FileExistsError as error:
            if log_dir is not None:
                raise ConfigError(f"--log-dir {folder}: a file is there; give a folder") from error
            n += 1
        except OSError as error:
            raise ConfigError(
                f"{folder} cannot be made ({error.strerror}): give a folder to write to as --log-dir"
            ) from error
        else:
            if log_dir is None:
                (folder / ".lock").write_text(job())
            return folder


def point_latest(folder: Path) -> None:
    """Let runs/latest point to a run folder, if it lies in ./runs."""
    runs = Path("runs")
    copied = (runs / "latest").is_dir() and not (
        runs / "latest"
    ).is_symlink()  # a copy that followed the link
    if folder.resolve().parent == runs.resolve() and folder.name != "latest" and not copied:
        partial = runs / f".latest-{os.getpid()}"
        partial.symlink_to(folder.name)
        partial.replace(runs / "latest")


def new_folder(name: str, flag: str) -> None:
    """Make the folder that a script will write to, before it works for hours. Raises ConfigError if it holds anything."""
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
        used = any(Path(name).iterdir())
    except OSError as error:
        raise ConfigError(f"{flag} {name}: cannot be made ({error})") from error
    if used:
        raise ConfigError(f"{flag} {name}: not empty; give a new folder")


def log_dir_of(argv: Sequence[str]) -> Path | None:
    """--log-dir of a command line that may be wrong elsewhere, so that its exit.json has a place."""
    for i, word in enumerate(argv):
        if word == "--log-dir" and i + 1 < len(argv):
            return Path(argv[i + 1])
        if word.startswith("--log-dir="):
            return Path(word.partition("=")[2])
    return None
