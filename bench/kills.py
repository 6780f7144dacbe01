"""A run that cannot be lost: SIGKILL again and again, and the end of an undisturbed run.

    python bench/kills.py --kills 200              kill at random instants
    python bench/kills.py --kills 50 --ranks 2     kill one of two ranks, chosen at random
    python bench/kills.py --exact                  kill before and after each fsync and each rename

The run goes on after each kill, and with two ranks the other one must end by itself. A run is right
if every parameter, AdamW's averages, and every line of the logs but for times are bitwise those of
the undisturbed run. A run is lost if the same command does not bring it to its end, or does not go
on from the newest checkpoint. Each life of a run is a fork of this process, so that PyTorch is not
imported again. The rest is train.py on the toy, against serve_rm.py, with a checkpoint after every
step.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# a fork of a process with threads would hang
os.environ.setdefault("OMP_NUM_THREADS", "1")

# a life draws its curves at the end, and matplotlib is slow to import, like PyTorch
import matplotlib.pyplot  # noqa: F401

import train
from recipes import toy
from reinforce.run import checkpoint

STEPS = 6
BASELINES = ("rloo", "ema", "remax")
# seconds that a rank may outlive a killed one; it gets SIGTERM then, as from torchrun
BOUND = 60.0


def flags(run: Path, baseline: str, address: tuple[str, int], ranks: int) -> list[str]:
    """The command line of a run.

    Its third step is the short last one of an epoch, of four prompts, and has a checkpoint, too.
    """
    folder = toy.prepare()
    prompts = run.parent / "prompts.jsonl"
    if not prompts.exists():
        lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)[:14]
        prompts.write_text("".join(lines))
    values = {
        "policy": folder / "policy",
        "train-data": prompts,
        "val-data": prompts,
        "rm-host": address[0],
        "rm-port": address[1],
        "baseline": baseline,
        "num-rollout-samples": 5,
        "num-rollouts-per-prompt": 2,
        "max-new-tokens": 12,
        "lr": 0.01,
        "max-epochs": 9,
        "max-steps": STEPS,
        "val-check-interval": 3,
        "save-interval": 1,
        "save-top-k": 1,
        "device": "cpu",
        "log-dir": run,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def deadly(at: int, after: bool) -> None:
    """Kill this process at its `at`-th call (from 1) of fsync, rename or replace.

    0 kills nothing: the calls are counted, into the file $EVENTS.
    """
    count = 0

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == at and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*args, **options)
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            if not at:
                Path(os.environ["EVENTS"]).write_text(str(count))
            return result

        return watched

    for name in ("fsync", "rename", "replace"):
        setattr(os, name, wrapped(getattr(os, name)))


def born(words: list[str], ranks: int, prepare: Callable[[], None] = lambda: None) -> list[int]:
    """Fork the processes of one life and return their pids.

    Their output goes to a log beside the run folder.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        log = os.open(f"{words[-1]}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        sys.argv = ["train.py", *words]
        prepare()
        code = 70
        try:
            train.main()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.stdout.flush()
            os._exit(code)
    return pids


def buried(pids: list[int], patience: float) -> list[int]:
    """Wait for all processes and return their exit codes, -9 for a killed one.

    As with torchrun, the others get SIGTERM when one has failed. A process that outlives `patience`
    seconds is killed and has code -1.
    """
    codes, end, terminated = dict[int, int](), time.monotonic() + patience, False
    while len(codes) < len(pids):
        left = [pid for pid in pids if pid not in codes]
        if any(codes.values()) and not terminated:
            terminated = True
            for pid in left:
                os.kill(pid, signal.SIGTERM)
        for pid in left:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                codes[pid] = -1
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def digest(run: Path) -> str:
    """Hash of all that must be the same: weights, optimizer, and the logs without times."""
    last = sorted(run.glob("checkpoints/step-*"))[-1]
    tensors = [last / name for name in ("model.safetensors", checkpoint.OPTIMIZER)]
    parts = [last.name.encode(), *(file.read_bytes() for file in tensors)]
    for line in (run / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        kept = [k for k in values if not k.startswith("time_") and k != "tokens_per_s"]
        parts.append(json.dumps({k: values[k] for k in kept}).encode())
    parts += [(run / f"{name}.jsonl").read_bytes() for name in ("rollouts", "validation")]
    return hashlib.sha256(b"\n".join(parts)).hexdigest()


class Tally:
    """The kills and runs so far, and how the runs ended."""

    def __init__(self, folder: Path, address: tuple[str, int], ranks: int) -> None:
        """`folder` is an empty folder for the runs."""
        self.folder, self.address, self.ranks = folder, address, ranks
        self.kills = self.early = self.runs = self.lost = self.wrong = self.orphans = 0
        self.right: dict[str, str] = {}
        self.seconds = 0.0

    def undisturbed(self, baseline: str) -> None:
        """Run once without a kill, and keep the right digest and the seconds of a life."""
        run = self.folder / f"right-{baseline}"
        start = time.monotonic()
        codes = buried(born(flags(run, baseline, self.address, self.ranks), self.ranks), 300)
        if any(codes):
            end_of_log = Path(f"{run}.log").read_text()[-2000:]
            sys.exit(f"the undisturbed run ended with {codes}: {end_of_log}")
        self.seconds, self.right[baseline] = time.monotonic() - start, digest(run)

    def finish(self, run: Path, baseline: str) -> None:
        """Let a run go on to its end, and judge it."""
        self.runs += 1
        log, newest = Path(f"{run}.log"), checkpoint.newest(run)
        log.unlink(missing_ok=True)
        expected = ""
        if newest is not None:
            expected = f"going on after step {checkpoint.state(newest)['step']} of"
        codes = buried(born(flags(run, baseline, self.address, self.ranks), self.ranks), 300)
        if any(codes) or expected not in log.read_text():
            self.lost += 1
            print(f"lost: {run.name} ended with {codes}: {log.read_text()[-1500:]}", flush=True)
        elif digest(run) != self.right[baseline]:
            self.wrong += 1
            print(f"wrong: {run.name}", flush=True)
        else:
            shutil.rmtree(run)

    def random_kills(self, wanted: int, rng: random.Random) -> None:
        """Kill each run one to four times, until the number of kills is `wanted`."""
        while self.kills < wanted:
            baseline = BASELINES[self.runs % len(self.right)]
            run = self.folder / f"run-{self.runs}"
            for _ in range(rng.randint(1, 4)):
                pids = born(flags(run, baseline, self.address, self.ranks), self.ranks)
                time.sleep(rng.uniform(0.0, self.seconds))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rng.choice(pids), signal.SIGKILL)
                codes = buried(pids, BOUND)
                self.orphans += -1 in codes
                # no process was killed: the run had reached its end before
                if -9 not in codes:
                    break
                self.kills += 1
                self.early += not list(run.glob("checkpoints/step-*"))
            self.finish(run, baseline)
            counts = f"{self.kills} kills, {self.runs} runs, {self.lost} lost, {self.wrong} wrong"
            print(f"\r{counts}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)

    def exact_kills(self, baseline: str, stride: int) -> None:
        """Kill a run of three steps before and after every `stride`-th fsync, rename or replace.

        Every kill has another run.
        """
        counter = self.folder / "events"
        os.environ["EVENTS"] = str(counter)
        words = flags(self.folder / "counted", baseline, self.address, 1)
        words[words.index("--max-steps") + 1] = "3"
        buried(born(words, 1, lambda: deadly(0, False)), 300)
        total = int(counter.read_text())
        for at in range(1, total + 1, stride):
            for after in (False, True):
                run = self.folder / f"at-{at}-{after}"
                words = flags(run, baseline, self.address, 1)
                codes = buried(born(words, 1, partial(deadly, at, after)), 300)
                self.kills += codes == [-9]
                self.finish(run, baseline)
        print(f"{total} events of fsync and rename in three steps")


def main() -> None:
    """Serve the toy's reward, kill runs, and print the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kills",
        type=int,
        nargs="+",
        default=[200],
        help="kills at random instants, a number for each of --ranks",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=[1],
        help="processes of a run, of which one is killed at a time",
    )
    parser.add_argument(
        "--exact", action="store_true", help="kill at each fsync and rename instead"
    )
    parser.add_argument(
        "--stride", type=int, default=1, help="with --exact, kill at every N-th fsync or rename"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random instants")
    args = parser.parse_args()
    wrong = False
    with toy.server(batch=1) as address:
        for ranks, kills in zip(args.ranks, args.kills * len(args.ranks), strict=False):
            with tempfile.TemporaryDirectory() as folder:
                tally = Tally(Path(folder), address, ranks)
                start = time.monotonic()
                number = 1 if args.exact else max(1, min(3, kills))
                for baseline in BASELINES[:number]:
                    tally.undisturbed(baseline)
                if args.exact:
                    tally.exact_kills(BASELINES[0], args.stride)
                else:
                    tally.random_kills(kills, random.Random(args.seed))
            counts = {
                "kills": tally.kills,
                "before the first checkpoint": tally.early,
                "runs": tally.runs,
                "lost": tally.lost,
                "wrong": tally.wrong,
                "ranks that outlived another by more than a minute": tally.orphans,
                "ranks": ranks,
                "seconds": round(time.monotonic() - start),
            }
            for name, value in counts.items():
                print(f"{name:<52}{value:>6}")
            print(json.dumps(counts), flush=True)
            wrong |= bool(tally.lost or tally.wrong or tally.orphans)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
