"""Is a change of the code a change of the numbers? The same small runs on two checkouts, compared bit by bit.

    python bench/replay.py BEFORE                    each a folder or a git revision; AFTER is this checkout by default
    python bench/replay.py BEFORE AFTER --cases rloo "two ranks, ddp"

Each case is a run of train.py on the toy's policy against that checkout's own serve_rm.py with a
plain reward function. Compared are the exit codes, every tensor of every checkpoint byte for byte,
what both state.json have, and the lines of metrics.jsonl (without times, and without what only
AFTER measures), rollouts.jsonl, validation.jsonl, nonfinite.jsonl and evaluation.jsonl. Not
compared: identity.json, config.json, the screen. In the case "begun before" the first steps are
BEFORE's on both sides, so the last ones tell whether its runs still go on.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
LOGS = ("rollouts.jsonl", "validation.jsonl", "nonfinite.jsonl", "evaluation.jsonl")
REWARD = '''
import os
from pathlib import Path

DEATH = os.environ.get("REPLAY_DEATH", "")  # "FILE N": the server dies in its N-th call, once; FILE then exists
calls = 0


def variety(prompts, completions, labels):
    """Different words, less a tenth for each word."""
    global calls
    calls += len(prompts) > 1  # not the one text that a run asks for before it begins
    file, _, at = DEATH.rpartition(" ")
    if file and calls == int(at) and not Path(file).exists():
        Path(file).touch()
        os._exit(1)
    words = [text.split() for text in completions]
    return [len(set(w)) - 0.1 * len(w) for w in words]
'''


@dataclass(frozen=True)
class Case:
    """One run: flags of train.py beside the common ones, and what happens to it."""

    flags: str
    ranks: int = 1
    stop_after: int | None = None  # steps of a first part; the rest is a resume
    begun_before: bool = False  # that first part is BEFORE's on both sides
    death: int | None = (
        None  # the call in which the reward server dies; it is then started again for a resume
    )
    evaluate: bool = False  # recipes/evaluate.py follows


CASES = {
    "none": Case("--baseline none --truncated keep"),
    "rloo": Case(
        "--baseline rloo --warmup-steps 2 --min-lr 1e-4 --weight-decay 0.1", evaluate=True
    ),
    "ema": Case("--baseline ema --temperature 0.8 --val-temperature 0.5 --val-top-p 0.9"),
    "remax": Case("--baseline remax --min-new-tokens 3 --micro-batch-size 5"),
    "group-mean": Case("--baseline group-mean --initial-policy-kl-penalty 0 --end-strings . and"),
    "grpo": Case("--baseline grpo --loss-norm token --micro-batch-tokens 100"),
    "several optimizer steps": Case(
        "--preset nemo-aligner --global-batch-size 8 --lr 7e-3 --ratio-clip 0.05"
    ),
    "drop": Case("--truncated drop --max-new-tokens 7 --global-batch-size 4 --micro-batch-size 3"),
    "drop, remax": Case("--baseline remax --truncated drop --max-new-tokens 7 --loss-norm length"),
    "drop all": Case("--truncated drop --max-new-tokens 4 --min-new-tokens 3"),
    "penalize": Case(
        "--truncated penalize --missing-eos-penalty 0.5 --max-new-tokens 7 --kl abs --rollout-micro-batch-size 8"
    ),
    "one response a prompt": Case("--baseline remax --num-rollouts-per-prompt 1 --val-greedy"),
    "bf16": Case("--precision bf16 --gradient-checkpointing"),
    "not finite": Case("--lr 1e30"),
    "resume": Case("--baseline ema --save-interval 1", stop_after=2),
    "begun before": Case("--baseline ema --save-interval 1", stop_after=2, begun_before=True),
    "server lost": Case(
        "--baseline remax", death=5
    ),  # two calls a step, and one validation before the first
    "server lost in a validation": Case("", death=4),
    "two ranks, ddp": Case(
        "--baseline remax --truncated drop --max-new-tokens 9 --num-rollout-samples 7", ranks=2
    ),
    "two ranks, fsdp": Case(
        "--parallel fsdp --num-rollout-samples 7 --global-batch-size 4 --gradient-checkpointing",
        ranks=2,
    ),
    "two ranks, resume": Case(
        "--parallel fsdp --baseline ema --num-rollout-samples 5", ranks=2, stop_after=2
    ),
}
COMMON = (
    "--max-new-tokens 24 --num-rollout-samples 6 --max-steps 4 --val-check-interval 2 --save-top-k 9 --device cpu "
    "--precision fp32 --lr 2e-3"
)


@dataclass(frozen=True)
class Found:
    """What a run left behind."""

    codes: list[int]
    lines: dict[str, list[str]]  # file -> its lines, without times
    states: dict[str, dict[str, Any]]  # checkpoint -> its state.json
    tensors: dict[str, tuple[str, bytes]]  # checkpoint/file/name -> type and shape, bytes


@contextlib.contextmanager
def checkout(name: str) -> Iterator[Path]:
    """The folder itself, or a git revision of this repository unpacked in a temporary one."""
    if Path(name).is_dir():
        yield Path(name).resolve()
        return
    with tempfile.TemporaryDirectory() as place:
        with subprocess.Popen(
            ["git", "-C", str(ROOT), "archive", name], stdout=subprocess.PIPE
        ) as git:
            assert git.stdout is not None
            with (
                contextlib.suppress(tarfile.ReadError),
                tarfile.open(fileobj=git.stdout, mode="r|") as archive,
            ):
                archive.extractall(place, filter="data")
        if git.returncode:
            sys.exit(f"bench/replay.py: {name} is neither a folder nor a revision of {ROOT}")
        yield Path(place)


RUNNER = """
import importlib, json, os, sys
sys.path.insert(0, os.getcwd())
import matplotlib.pyplot, recipes.evaluate, serve_rm, train
for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        print(os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    os.environ.update(job["environment"])
    sys.argv = job["words"]
    code = 70
    try:
        importlib.import_module(job["module"]).main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(code)
"""


class Runner:
    """Processes of one checkout, forked from one that has imported PyTorch and the scripts."""

    def __init__(self, code: Path) -> None:
        """One thread in all of them, so that sums have one order and a fork has what it needs."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", RUNNER],
            cwd=code,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _ask(self, job: dict[str, Any]) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(self, module: str, words: list[Any], log: Path, **environment: Any) -> int:
        """Call `main` of a script with these words in a process of its own; its pid."""
        variables = {name: str(value) for name, value in environment.items()}
        return self._ask(
            {
                "module": module,
                "words": [module, *map(str, words)],
                "log": str(log),
                "environment": variables,
            }
        )

    def wait(self, pid: int) -> int:
        """Exit code of a process that `start` made, when it has ended."""
        return self._ask({"wait": pid})

    @contextlib.contextmanager
    def server(self, place: Path, **environment: Any) -> Iterator[int]:
        """The port of this checkout's reward server."""
        function, ready = place / "reward.py", place / "ready"
        function.write_text(REWARD)
        ready.unlink(missing_ok=True)
        words = ["--reward-fn", f"{function}:variety", "--ready-file", ready]
        pid = self.start("serve_rm", words, place / "server.log", **environment)
        try:
            until(ready.exists, "the reward server is ready")
            yield int(ready.read_text().split()[1])
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            self.wait(pid)

    def train(
        self,
        run: Path,
        case: Case,
        port: int,
        data: Path,
        steps: int | None = None,
        marker: Path | None = None,
    ) -> int:
        """The exit code of train.py, the first rank's; with `marker`, it gets SIGTERM once that file is there."""
        words = [
            *COMMON.split(),
            *case.flags.split(),
            "--policy",
            data / "policy",
            "--train-data",
            data / "train.jsonl",
            "--val-data",
            data / "few.jsonl",
            "--rm-host",
            "127.0.0.1",
            "--rm-port",
            port,
            "--log-dir",
            run,
            *([] if steps is None else ["--max-steps", steps]),
        ]
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            meeting = {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": s.getsockname()[1],
                "WORLD_SIZE": case.ranks,
            }
        ranks = (
            [{**meeting, "RANK": r, "LOCAL_RANK": r} for r in range(case.ranks)]
            if case.ranks > 1
            else [{}]
        )
        pids = [self.start("train", words, Path(f"{run}.log"), **rank) for rank in ranks]
        if marker is not None:
            until(marker.exists, "the reward server is gone")
            os.kill(pids[0], signal.SIGTERM)  # else it would look for the server for minutes
        first, *_ = [self.wait(pid) for pid in pids]
        return first


def until(done: Callable[[], bool], what: str) -> None:
    """Wait two minutes at most."""
    end = time.monotonic() + 120
    while not done():
        if time.monotonic() > end:
            sys.exit(f"bench/replay.py: waited in vain until {what}")
        time.sleep(0.02)


def replay(case: Case, runner: Runner, place: Path, data: Path, begun: Path | None) -> Found:
    """Run a case on one checkout; `place` is an empty folder, `begun` a run that goes on here."""
    run, codes, marker = place / "run", list[int](), place / "dead"
    if begun is not None:
        shutil.copytree(begun, run)
    elif case.stop_after is not None:
        with runner.server(place) as port:
            codes.append(runner.train(run, case, port, data, case.stop_after))
    if case.death is not None:
        with runner.server(place, REPLAY_DEATH=f"{marker} {case.death}") as port:
            codes.append(runner.train(run, case, port, data, marker=marker))
        shutil.copytree(run, place / "interrupted")
    with runner.server(place) as port:
        codes.append(runner.train(run, case, port, data))
        if case.evaluate:
            words = ["--run", run, "--rm-host", "127.0.0.1", "--rm-port", port]
            codes.append(runner.wait(runner.start("recipes.evaluate", words, Path(f"{run}.log"))))
    found = read(run)
    if case.death is not None:
        cut = read(place / "interrupted")
        found.lines.update({f"interrupted/{name}": lines for name, lines in cut.lines.items()})
        found.tensors.update({f"interrupted/{name}": value for name, value in cut.tensors.items()})
    return Found(codes, found.lines, found.states, found.tensors)


def read(run: Path) -> Found:
    """The logs and checkpoints of a run folder."""
    lines: dict[str, list[str]] = {}
    for name in ("metrics.jsonl", *LOGS):
        rows = (
            [json.loads(line) for line in (run / name).read_text().splitlines()]
            if (run / name).exists()
            else []
        )
        if name == "metrics.jsonl":
            rows = [
                {k: v for k, v in row.items() if not k.startswith("time_") and k != "tokens_per_s"}
                for row in rows
            ]
        lines[name] = [json.dumps(row) for row in rows]
    states, tensors = {}, dict[str, tuple[str, bytes]]()
    for folder in sorted(run.glob("checkpoints/step-*")):
        states[folder.name] = json.loads((folder / "state.json").read_text())
        for path in sorted(folder.rglob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  it is no dictionary
                    value = file.get_tensor(name)
                    tensors[f"{folder.name}/{path.name}/{name}"] = (
                        f"{value.dtype} {tuple(value.shape)}",
                        value.numpy().tobytes(),
                    )
    return Found(codes=[], lines=lines, states=states, tensors=tensors)


def differences(a: Found, b: Found) -> list[str]:
    """What is not the same, a sentence each; no more than the first line of a file and the first tensor of a checkpoint file."""
    told = [] if a.codes == b.codes else [f"exit codes {a.codes}, then {b.codes}"]
    for name in sorted({*a.lines, *b.lines}):
        x, y = a.lines.get(name, []), b.lines.get(name, [])
        if len(x) != len(y):
            told.append(f"{name}: {len(x)} lines, then {len(y)}")
        for n, (line, other) in enumerate(zip(x, y, strict=False), 1):
            if line != other:
                old, new = json.loads(line), json.loads(other)
                if name.endswith("metrics.jsonl"):
                    new = {key: value for key, value in new.items() if key in old}
                keys = [
                    key
                    for key in {**old, **new}
                    if old.get(key) != new.get(key) or (key in old) != (key in new)
                ]
                if not keys:
                    continue
                told.append(
                    f"{name}:{n}: "
                    + ", ".join(
                        f"{key} {old.get(key)!r}, then {new.get(key)!r}" for key in keys[:3]
                    )[:300]
                )
                break
    for name in sorted({*a.states, *b.states}):
        old, new = a.states.get(name), b.states.get(name)
        if old is None or new is None:
            told.append(f"{name}: only {'after' if old is None else 'before'}")
        else:
            told += [
                f"{name}/state.json: {key} {old[key]!r}, then {new[key]!r}"
                for key in old
                if key in new and old[key] != new[key]
            ]
    files = set()
    for name in sorted({*a.tensors, *b.tensors}):
        file = name.rsplit("/", 1)[0]
        if a.tensors.get(name) != b.tensors.get(name) and file not in files:
            files.add(file)
            told.append(f"{name}: not the same bytes")
    return told


def prepare(code: Path, place: Path) -> Path:
    """The toy's policy and prompts, as one checkout makes them."""
    made = subprocess.run(
        [sys.executable, "recipes/toy.py"], cwd=code, check=True, capture_output=True, text=True
    )
    return with_few(Path(made.stdout.strip()), place / "data")


def with_few(toy: Path, data: Path) -> Path:
    """A copy of the toy's folder with few.jsonl, nine prompts for validation."""
    shutil.copytree(toy, data)
    (data / "few.jsonl").write_text(
        "".join((data / "validation.jsonl").read_text().splitlines(keepends=True)[:9])
    )
    return data


def main() -> None:
    """Run every case on both checkouts, both at a time, and tell what differs; exit code 1 if anything does."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "before",
        metavar="BEFORE",
        help="folder of a checkout, or a git revision of this repository",
    )
    parser.add_argument(
        "after",
        metavar="AFTER",
        nargs="?",
        default=str(ROOT),
        help="the same (default: this checkout)",
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=tuple(CASES),
        default=tuple(CASES),
        metavar="CASE",
        help="default: all",
    )
    args = parser.parse_args()
    changed = 0
    with contextlib.ExitStack() as stack:
        before, after = (stack.enter_context(checkout(name)) for name in (args.before, args.after))
        top = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        data = prepare(before, top)
        runners = [Runner(before), Runner(after)]
        for name in args.cases:
            case, place, begun = CASES[name], top / name.replace(" ", "-"), None
            (place / "before").mkdir(parents=True)
            (place / "after").mkdir()
            if case.begun_before:
                begun = place / "begun"
                with runners[0].server(place) as port:
                    runners[0].train(begun, case, port, data, case.stop_after)
            with ThreadPoolExecutor(2) as pool:
                jobs = [
                    pool.submit(replay, case, runner, place / side, data, begun)
                    for runner, side in zip(runners, ("before", "after"), strict=True)
                ]
                old, new = (job.result() for job in jobs)
            told = differences(old, new)
            if not any(old.lines.values()):
                told.append(f"nothing to compare: {(place / 'before/run.log').read_text()[-500:]}")
            changed += bool(told)
            counts = f"codes {old.codes}, {sum(map(len, old.lines.values()))} lines, {len(old.tensors)} tensors"
            print(
                f"{name:<28} {'DIFFERENT' if told else 'identical'}   ({counts})",
                *told,
                sep="\n    ",
                flush=True,
            )
    print(f"{len(args.cases)} cases, {changed} different")
    sys.exit(changed > 0)


if __name__ == "__main__":
    main()
