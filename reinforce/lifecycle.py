"""How a run begins and ends: its folder, its exit code, signals, and the toy's own reward server.

Exit codes: 0 done, 1 failed and a retry will not cure it, 2 your configuration or input, 75 run the same command again.
torchrun turns every code but 0 into 1, so the code and its reason are also in <log-dir>/exit.json.
"""

import contextlib
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

from reinforce import distributed
from reinforce.errors import ConfigError, FailedError, RetryError

ROOT = Path(__file__).resolve().parents[1]


class Stop:
    """SIGTERM, SIGINT or SIGUSR1. Before the loop there is nothing to save, and they end the run; then it looks here."""

    def __init__(self) -> None:
        """Take over the three signals of this process."""
        self.signal: str | None = None
        self.in_loop = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        if not self.in_loop:
            raise RetryError(f"stopped by {self.signal} before the first step")


def holds_run(folder: Path) -> bool:
    """Whether a run has begun in this folder."""
    return (folder / "metrics.jsonl").exists()


def refuse_used_folder(log_dir: str | None) -> None:
    """Raise ConfigError if the folder holds a run already."""
    if log_dir is not None and holds_run(Path(log_dir)):
        raise ConfigError(f"--log-dir {log_dir} holds another run; give an empty or new folder")


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
    except Exception as error:
        traceback.print_exc()
        code, reason = 1, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    if code:
        rank = f" (rank {distributed.rank()})" if distributed.rank() else ""
        print(f"{name}{rank}: {reason}", file=sys.stderr, flush=True)
    place = folder()
    if place is not None and (code or distributed.rank() == 0):
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            with (place / "exit.json").open("x") as file:  # the first rank that fails knows why
                json.dump({"code": code, "reason": reason}, file)
    distributed.stop()
    return code


def log_dir_of(argv: Sequence[str]) -> Path | None:
    """--log-dir of a command line that may be wrong elsewhere, so that its exit.json has a place."""
    for i, word in enumerate(argv):
        if word == "--log-dir" and i + 1 < len(argv):
            return Path(argv[i + 1])
        if word.startswith("--log-dir="):
            return Path(word.partition("=")[2])
    return None


@contextlib.contextmanager
def toy_server(wait: float = 120.0) -> Iterator[tuple[str, int]]:
    """serve_rm.py with the toy's reward model on a free loopback port; ends with this block, or with this process."""
    with tempfile.TemporaryDirectory() as place, (Path(place) / "server.log").open("w+") as log:
        ready = Path(place) / "ready"
        command = [sys.executable, str(ROOT / "serve_rm.py"), "--ready-file", str(ready), "--exit-with-parent"]
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
