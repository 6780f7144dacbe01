"""The run folder, which --log-dir names: how it is made, and held by one command at a time."""

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from reinforce.errors import ConfigError


def holds_run(folder: Path) -> bool:
    """Whether a run has begun in this folder."""
    return (folder / "metrics.jsonl").exists()


def job() -> str:
    """A name that the processes of one torchrun share, and no other running command has."""
    address = os.environ.get("MASTER_ADDR", f"process {os.getpid()}")
    return f"{address}:{os.environ.get('MASTER_PORT', '')}"


def is_ours(folder: Path) -> bool:
    """Whether this command was the last one to claim the folder."""
    try:
        return (folder / ".lock").read_text() == job()
    except OSError:
        return False


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """A block that holds a run folder, so that a command given twice does not write there twice.

    Raises ConfigError if another process holds it, or if it cannot be written to. Removes the
    exit.json of the run's last command. The lock ends with this block, or with this process however
    it ends. On a network file system the lock of a crashed node may last for minutes, so a job of
    Slurm waits 120 s for it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a+")
    except OSError as error:
        raise unwritable(folder, error) from error
    with lock:
        deadline = time.monotonic() + (120 if "SLURM_JOB_ID" in os.environ else 0)
        while not _locked(lock):
            if time.monotonic() >= deadline:
                raise ConfigError(
                    f"--log-dir {folder}: a run is going on there right now; wait for its end, "
                    "or give another folder"
                )
            time.sleep(1)
        lock.truncate(0)
        lock.write(job())
        lock.flush()
        # a run without identity.json will be refused, and keeps its exit.json
        if not holds_run(folder) or (folder / "identity.json").exists():
            try:
                (folder / "exit.json").unlink(missing_ok=True)
            except OSError as error:
                raise unwritable(folder, error) from error
        yield


def unwritable(folder: Path, error: OSError) -> ConfigError:
    """What to raise where nothing can be written."""
    return ConfigError(f"--log-dir {folder}: cannot be written to ({error}); give another folder")


def _locked(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def new_run_folder(log_dir: str | None, name: str) -> Path:
    """Make the run folder on rank 0: the given one, or a new runs/NAME-TIME. Raises ConfigError."""
    stamp, n = time.strftime("%Y%m%d-%H%M%S"), 0
    while True:
        suffix = f"-{n}" if n else ""
        named = f"runs/{name}-{stamp}{suffix}" if log_dir is None else log_dir
        folder = pinned(Path(named))
        try:
            folder.mkdir(parents=True, exist_ok=log_dir is not None)
        except FileExistsError as error:
            if log_dir is not None:
                raise ConfigError(f"--log-dir {folder}: a file is there; give a folder") from error
            n += 1
        except OSError as error:
            raise ConfigError(
                f"{folder} cannot be made ({error.strerror}): "
                "give a folder that can be written to as --log-dir"
            ) from error
        else:
            if log_dir is None:
                (folder / ".lock").write_text(job())
            return folder


def pinned(folder: Path) -> Path:
    """The folder itself where a link leads to it: runs/latest may point elsewhere before the end.

    >>> pinned(Path("runs/none"))
    PosixPath('runs/none')
    """
    whole = folder.resolve()
    return folder if whole == folder.absolute() else whole


def checkpoints_of(run: Path) -> list[Path]:
    """The folders of a run's checkpoints, oldest first, damaged ones included.

    Raises ConfigError where they cannot be listed, for they may be there.
    """
    parent = run / "checkpoints"
    try:
        names = [entry.name for entry in os.scandir(parent)]
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not parent.is_symlink():
            return []
        raise ConfigError(f"{parent}: cannot be listed ({error.strerror})") from error
    # and no copy that a user has made beside them
    ours = [name for name in names if re.fullmatch(r"step-\d+", name)]
    return [parent / name for name in sorted(ours, key=lambda name: int(name[5:]))]


def point_latest(folder: Path) -> None:
    """Let the link runs/latest point to a run folder, if that lies in ./runs.

    A folder of this name, from a copy that followed the link, is left alone.
    """
    runs = Path("runs")
    link = runs / "latest"
    copied = link.is_dir() and not link.is_symlink()
    if folder.resolve().parent == runs.resolve() and folder.name != "latest" and not copied:
        partial = runs / f".latest-{os.getpid()}"
        with contextlib.suppress(OSError):  # a file system without links
            partial.unlink(missing_ok=True)
            partial.symlink_to(folder.name)
            partial.replace(link)


def new_folder(name: str, flag: str) -> None:
    """Make the folder that a script will write to, before the script works for hours.

    Raises ConfigError if it cannot be made, or is not empty.
    """
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
        used = any(Path(name).iterdir())
    except OSError as error:
        raise ConfigError(
            f"{flag} {name}: cannot be made ({error}); give another folder"
        ) from error
    if used:
        raise ConfigError(f"{flag} {name}: not empty; give a new folder")


def log_dir_of(argv: Sequence[str]) -> Path | None:
    """--log-dir of a command line that may be wrong elsewhere: exit.json goes there."""
    found = ""
    for i, word in enumerate(argv):  # the last one counts, as argparse has it
        if word == "--log-dir" and i + 1 < len(argv):
            found = argv[i + 1]
        if word.startswith("--log-dir="):
            found = word.partition("=")[2]
    return pinned(Path(found)) if found else None
