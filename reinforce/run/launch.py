"""Both jobs with one command: a reward server in the background, the actor in front, one exit code.

  ./launch.sh [TRAIN FLAGS]                      the toy, prepared on first use
  ./launch.sh smollm2 [TRAIN FLAGS]              SmolLM2-135M against a served sentiment function
  ./launch.sh run SERVER FLAGS -- TRAIN FLAGS    your own models, prompts and reward
  ./launch.sh hh PAIRS [--size S] [--base MODEL] [TRAIN FLAGS]
                                                 HH-RLHF: SFT, reward model, REINFORCE, evaluation,
                                                 all from one base (SmolLM2);
                                                 S: quick, hour (on two cores, default), full
  ./launch.sh compare [FLAGS] [-- TRAIN FLAGS]   all baselines on the toy, or on yours (--help)
  sbatch SERVER'S NODES : ACTOR'S NODES launch.sh run SERVER FLAGS -- TRAIN FLAGS
                                                 the same as a Slurm hetjob

SERVER FLAGS are those of serve_rm.py, TRAIN FLAGS those of train.py: --help of either lists them.
NPROC: processes of the actor on each node (default: 1; under Slurm the GPUs of a node).
RM_NPROC: processes of the reward server (default: 1), with --data-parallel or
--tensor-model-parallel-size among SERVER FLAGS.
PYTHON: a Python with PyTorch (default: the active environment's, .venv's, python3); under Slurm the
one in the container. SRUN_ARGS: words for both sruns (container image, mounts, --mpi).
Exit codes: 0 done, 1 failed, 2 your configuration or input, 75 run the same command again.
"""

from __future__ import annotations

import difflib
import fcntl
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # in place of this folder, whose files are modules of the package

from reinforce.run import slurm  # noqa: E402
from reinforce.run.children import (  # noqa: E402
    AGAIN,
    SAVING,
    Child,
    EndedError,
    Signals,
    adopt_orphans,
    end_orphans,
    end_with_parent,
    exists,
    last_lines,
    say,
    wait_for,
)
from reinforce.run.streams import unheard  # noqa: E402

RECIPES = ("toy", "smollm2", "run", "hh", "compare")  # recipes/pipelines/
UNREACHED = 600.0  # seconds for a server that is ready to answer here, on another node
STARTS_SERVER = (
    "launch.sh starts the reward server itself; with a server of your own, start torchrun train.py"
)
# flags that the launcher gives itself, and what to do instead
OURS = {
    "--rm-host": STARTS_SERVER,
    "--rm-port": STARTS_SERVER,
    "--ready-file": "launch.sh waits for the server itself; leave this flag out",
}


class Job:
    """The verbs of a recipe: `check`, `run`, `output`, `make`, `serve` and `train`.

    Each runs one command to its end (`serve`: until the server answers), or ends the launcher with
    the exit code of the command.
    """

    root = ROOT

    def __init__(self, name: str, words: Sequence[str], signals: Signals) -> None:
        """`words` are those of the user. Raises EndedError on a flag of the launcher itself."""
        for word in () if name == "compare" else words:  # compare takes a server of the user's
            flag = word.partition("=")[0]
            if reason := OURS.get(flag):
                raise EndedError(2, f"{flag}: {reason}")
        self.name = name
        self.signals = signals
        self.hetjob = slurm.Hetjob() if slurm.is_hetjob() else None
        if self.hetjob:
            slurm.refuse_lone_colon(words)
            signals.as_usr1 = True
        self.processes = processes_of("NPROC", self.hetjob.processes() if self.hetjob else "1")
        self.server_processes = processes_of("RM_NPROC", "1")
        self.python = find_python()
        self.given_folder = value_of("--log-dir", words)
        self.server: Child | None = None
        self.address: tuple[str, str] = ("", "")

    def command(self, script: str, *words: object) -> list[str]:
        """The command that runs a script of the repository."""
        return [self.python, str(ROOT / script), *map(str, words)]

    def run(self, script: str, *words: object) -> None:
        """Run a script, which prints itself what it does and what is wrong."""
        child = Child(self.command(script, *words), preexec_fn=end_with_parent)
        if code := wait_for(child, self.signals, f"in {script}"):
            raise EndedError(code)

    def output(self, script: str, *words: object) -> str:
        """Run a script, and return its last line on stdout: the folder that it has prepared."""
        command = self.command(script, *words)
        child = Child(command, stdout=subprocess.PIPE, preexec_fn=end_with_parent)
        code = wait_for(child, self.signals, f"in {script}")
        lines = (child.process.stdout.read() if child.process.stdout else b"").decode().splitlines()
        if code or not lines:
            raise EndedError(code or 1)
        return lines[-1]

    def make(self, folder: Path, script: str, *words: object) -> None:
        """Run a script with --out unless the folder exists, which it does only when complete."""
        if folder.is_dir():
            print(f"== {folder.name}: there already, {folder}", flush=True)
            return
        print(f"== {folder.name}", flush=True)
        here = f".{folder.name}-{platform.node()}-"  # two launchers may make it at the same time
        for left in folder.parent.glob(f"{here}*"):
            pid = left.name[len(here) :]
            if pid.isdigit() and not exists(int(pid)):  # of one that was killed
                shutil.rmtree(left, ignore_errors=True)
        partial = folder.with_name(f"{here}{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)  # in a container the id may be the same
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.run(script, *words, "--out", partial)
            partial.rename(folder)
        except OSError:  # another launcher was faster
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def check(
        self, train: Sequence[object], server: Sequence[object] = ("--reward-fn", "x:y")
    ) -> None:
        """Check both command lines before anything is prepared: a typo must not cost a wait."""
        self.run("recipes/check_flags.py", *server, "--", *train)

    def serve(self, *flags: object) -> None:
        """Start serve_rm.py and wait until it answers."""
        self.folder = new_folder(self.given_folder, self.name, self.hetjob)
        self.held = hold(self.folder, 120 if self.hetjob else 0)
        ready, self.log = self.folder / "server.ready", self.folder / "server.log"
        try:
            for stale in (ready, self.folder / "exit.json"):
                if stale.exists():
                    stale.unlink()
            self.log.touch()
        except OSError as error:
            raise unwritable(self.folder, error) from error
        srun, options = [], ["--exit-with-parent"]
        if self.hetjob:
            os.environ["RM_TOKEN_FILE"] = str(self.folder / "rm_token")
            slurm.write_token(self.folder / "rm_token")
            srun, options = self.hetjob.srun(0), ["--host", "0.0.0.0"]
        command = self.command("serve_rm.py", *options, *flags, "--ready-file", ready)
        if self.server_processes != "1":
            torchrun = ["--standalone", "--nproc-per-node", self.server_processes]
            command = self.command("reinforce/run/torchrun.py", *torchrun, *command[1:])
        with self.log.open("wb") as log:
            self.server = Child([*srun, *command], stdout=log, stderr=subprocess.STDOUT)
        since = None  # when the server had written its address
        while not self.is_ready(ready):
            self.signals.raise_if_any("before the reward server was ready")
            if self.server.code is not None:
                raise EndedError(self.server.code or 1, self.server_ended(""))
            since = since or (time.monotonic() if self.address[0] else None)
            if since and time.monotonic() > since + UNREACHED:
                where = f"http://{':'.join(self.address)}"
                reason = f"the reward server is ready, and nothing answers here at {where}"
                raise EndedError(1, f"{reason}; its log: {self.log}")
            time.sleep(0.05)
        print(f"reward server: http://{':'.join(self.address)}, log: {self.log}", flush=True)

    def is_ready(self, ready: Path) -> bool:
        """Whether the server has written its address, and answers there."""
        words = ready.read_text().split() if ready.exists() else []
        if len(words) != 2:  # not there, or seen empty through a shared file system
            return False
        host, port = words
        if self.hetjob:
            host = self.hetjob.server_host
        self.address = (host, port)
        return self.hetjob is None or slurm.is_healthy(host, port)

    def server_ended(self, first: str) -> str:
        """Print the last lines of the log of a server that has ended; return a sentence on it."""
        assert self.server is not None
        print(last_lines(str(self.log)), file=sys.stderr)
        return f"the reward server ended{first} with code {self.server.code}; its log: {self.log}"

    def train(self, *flags: object) -> None:
        """Run train.py under torchrun against the server, to the run's exit code."""
        cpus = (self.hetjob.cpus() if self.hetjob else None) or os.cpu_count() or 1
        threads = max(1, cpus // int(self.processes)) if self.processes.isdigit() else 1
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        # as torchrun's --shutdown-timeout, which PyTorch 2.11 does not have
        os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
        host, port = self.address
        torchrun = [
            *(self.hetjob.srun(1) if self.hetjob else []),
            *self.command("reinforce/run/torchrun.py"),
            *(self.hetjob.rendezvous() if self.hetjob else ["--standalone"]),
            *("--nproc-per-node", self.processes),
            *("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"),
        ]
        words = ["--rm-host", host, "--rm-port", port, "--rm-wait", "600", "--log-dir", self.folder]
        before = newest_checkpoint(self.folder)
        self.signals.raise_if_any("before the first step")
        os.environ["LAUNCHER"] = str(os.getpid())  # torchrun.py ends with it
        trainer = Child([*torchrun, str(ROOT / "train.py"), *map(str, [*flags, *words])])
        self.signals.trainer = trainer
        if self.signals.first:  # it came while the trainer was being started
            self.signals.tell_trainer(self.signals.first)
        server_code = self.watch(trainer)
        self.signals.trainer = None
        if server_code is not None and not self.signals.first:  # a signal may end both
            raise EndedError(server_code or AGAIN, self.server_ended(" first,"))
        self.conclude(trainer.code or 0, before)

    def watch(self, trainer: Child) -> int | None:
        """Wait for the end of the trainer; the exit code of the server if that ended first."""
        assert self.server is not None
        server_code, asked = None, None
        while trainer.code is None:
            if server_code is None and self.server.code is not None:
                server_code, asked = self.server.code, time.monotonic()
                self.signals.tell_trainer("SIGTERM")
            asked = asked or (self.signals.at if self.signals.first else None)
            if asked and time.monotonic() > asked + SAVING:
                say(f"the actor has not ended in {SAVING:.0f} s, and is killed")
                trainer.kill()
            time.sleep(0.1)
        end_orphans([self.server], SAVING)  # if torchrun was killed: its workers save
        return server_code

    def conclude(self, code: int, before: str) -> None:
        """Raise EndedError unless the run is done; requeue a job of Slurm that can go on."""
        newest = newest_checkpoint(self.folder)
        ended = read_exit(self.folder)
        killed = code < 0 or code > 128  # torchrun, or one of its ranks
        if ended:
            code, reason = ended
        # a node that fails takes its torchrun along
        elif code and (self.signals.first or killed or (self.hetjob and newest != before)):
            cause = f"stopped by {self.signals.first}" if self.signals.first else "killed"
            code, reason = AGAIN, f"the actor was {cause} before it could say why"
        else:
            reason = "the actor ended without a word"
        if code == 0:
            return
        say(reason)
        if code == AGAIN and self.hetjob is None:
            say(f"to go on, the same command with --log-dir {self.folder}")
        elif code == AGAIN and self.signals.first in ("SIGTERM", "SIGINT"):
            say(
                f"not requeued: {self.signals.first}, as of scancel; the same command "
                f"with --log-dir {self.folder} goes on"
            )
        elif code == AGAIN and newest == before:
            say("not requeued: no new checkpoint since this job started")
        elif code == AGAIN and self.hetjob:
            self.end()
            failed = self.hetjob.requeue()
            said = f"not requeued, {failed}; the same command with --log-dir {self.folder} goes on"
            say(said if failed else f"requeued, to go on from {newest}")
        raise EndedError(code, f"exit code {code}; logs: {self.folder}")

    def end(self) -> None:
        """End the trainer first, then the server that the trainer talks to."""
        if self.signals.trainer is not None:
            self.signals.tell_trainer("SIGTERM")
            self.watch(self.signals.trainer)
            self.signals.trainer = None
        if self.server is not None:
            self.server.end()


def find_python() -> str:
    """A Python with PyTorch: PYTHON, that of the active environment or .venv, or python3.

    Raises EndedError if none of them has PyTorch. PYTHON itself is not looked at.
    """
    if os.environ.get("PYTHON"):
        return os.environ["PYTHON"]
    look = "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is None)"
    active = (os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX"), str(ROOT / ".venv"))
    for python in [f"{folder}/bin/python" for folder in active if folder] + ["python3"]:
        try:
            if subprocess.run([python, "-c", look], stderr=subprocess.DEVNULL).returncode == 0:
                return python
        except OSError:
            continue
    raise EndedError(
        2,
        f"no PyTorch in the active environment, .venv or python3. First, in {ROOT}:\n"
        "  python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && ./launch.sh",
    )


def processes_of(variable: str, default: str) -> str:
    """torchrun's --nproc-per-node, from a variable of the environment. Raises EndedError."""
    given = os.environ.get(variable) or default
    is_number = given.isascii() and given.isdigit() and len(given) <= 4 and int(given) > 0
    if not is_number and given not in ("gpu", "cpu", "auto"):
        raise EndedError(2, f"{variable} is '{given}'; give a number of processes, or gpu")
    return given


def value_of(flag: str, words: Sequence[str]) -> str | None:
    """The last value of a flag, as argparse takes it."""
    found = None
    for i, word in enumerate(words):
        if word == flag and i + 1 < len(words):
            found = words[i + 1]
        elif word.startswith(f"{flag}="):
            found = word.partition("=")[2]
    return found


def new_folder(given: str | None, name: str, hetjob: slurm.Hetjob | None) -> Path:
    """The run folder: the given one, or a new one; a requeued job finds its folder again."""
    if given is None and hetjob is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for folder in (Path(f"runs/{name}-{stamp}"), Path(f"runs/{name}-{stamp}-{os.getpid()}")):
            if not folder.exists():
                break
    else:
        folder = Path(given or f"runs/{name}-{hetjob.id if hetjob else ''}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"--log-dir {folder} cannot be made ({error.strerror}); give another folder"
        raise EndedError(2, reason) from error
    whole = folder.resolve()  # a container may start in another folder, a link may be moved
    return whole if hetjob or whole != folder.absolute() else folder


def unwritable(folder: Path, error: OSError) -> EndedError:
    """What to raise where nothing can be written."""
    reason = f"--log-dir {folder} cannot be written to ({error.strerror})"
    return EndedError(2, f"{reason}; give another folder")


def hold(folder: Path, wait: float) -> IO[str]:
    """The lock of this launcher on a run folder, held while it is open. Raises EndedError.

    train.py holds a lock of its own. On a network file system a lock of a crashed node may last.
    """
    end = time.monotonic() + wait
    while True:
        try:
            held = (folder / ".launch").open("a")
        except OSError as error:
            raise unwritable(folder, error) from error
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with (folder / ".lock").open("a") as trainers:
                fcntl.flock(trainers, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return held
        except BlockingIOError as error:
            held.close()
            if time.monotonic() >= end:
                reason = (
                    "a run is going on there right now; wait for its end, or give another folder"
                )
                raise EndedError(2, f"--log-dir {folder}: {reason}") from error
            time.sleep(0.5)
        except OSError:  # a file system without locks
            return held


def newest_checkpoint(folder: Path) -> str:
    """The name of the newest checkpoint in a run folder; "" if there is none."""
    names = [path.name for path in folder.glob("checkpoints/step-*") if path.name[5:].isdigit()]
    return max(names, key=lambda name: int(name[5:]), default="")


def read_exit(folder: Path) -> tuple[int, str] | None:
    """Code and reason of exit.json; None where it is missing or torn."""
    try:
        found = json.loads((folder / "exit.json").read_text())
        return int(found["code"]), str(found["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def recipe_of(words: Sequence[str]) -> tuple[str, list[str]]:
    """The name of the recipe, and the rest of the command line. Raises EndedError."""
    if not words or words[0].startswith("-"):
        return "toy", list(words)
    name = words[0]
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise EndedError(2, f"unknown recipe '{name}'{hint}; there are {', '.join(RECIPES)}")
    return name, list(words[1:])


def main(words: Sequence[str]) -> int:
    """Run the recipe that the command line names, and return the exit code."""
    if words and words[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    job = None
    try:
        name, rest = recipe_of(words)
        if name != "compare" and {"-h", "--help"} & set(rest):
            print(__doc__)
            return 0
        adopt_orphans()
        job = Job(name, rest, Signals())
        importlib.import_module(f"recipes.pipelines.{name}").pipeline(job, rest)
    except EndedError as error:
        if str(error):
            say(str(error))
        return error.code
    finally:
        if job is not None:
            job.end()
    return 0


if __name__ == "__main__":
    sys.stdout, sys.stderr = unheard(sys.stdout), unheard(sys.stderr)  # `| head` leaves early
    sys.exit(main(sys.argv[1:]))
