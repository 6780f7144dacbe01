"""Does a change of the code change the numbers? Small runs on two checkouts, compared bit by bit.

    python bench/replay.py BEFORE
    python bench/replay.py BEFORE AFTER --cases rloo "two ranks, ddp"

BEFORE and AFTER are folders or git revisions; AFTER is this checkout by default. Each case is a run
of train.py on the toy's policy, against serve_rm.py of the same checkout with a plain reward
function. Compared are:

- the exit codes;
- every tensor of every checkpoint, byte for byte;
- the keys that both state.json have;
- the lines of metrics.jsonl, without times and without keys that only AFTER has;
- the lines of rollouts.jsonl, validation.jsonl, nonfinite.jsonl and evaluation.jsonl.

Not compared are identity.json, config.json and the screen. In the case "begun before" BEFORE makes
the first steps on both sides: the last ones show whether a run of BEFORE goes on with AFTER.
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

# "FILE N": the server dies in its N-th call, once; FILE then exists
DEATH = os.environ.get("REPLAY_DEATH", "")
calls = 0


def variety(prompts, completions, labels):
    """Different words, less a tenth for each word."""
    global calls
    # the one text that a run asks for before it begins does not count
    calls += len(prompts) > 1
    file, _, at = DEATH.rpartition(" ")
    if file and calls == int(at) and not Path(file).exists():
        Path(file).touch()
        os._exit(1)
    words = [text.split() for text in completions]
    return [len(set(w)) - 0.1 * len(w) for w in words]
'''


@dataclass(frozen=True)
class Case:
    """One run: flags of train.py beside the common ones, and the events of the run."""

    flags: str
    ranks: int = 1
    # steps of a first part; the rest is a resume
    stop_after: int | None = None
    # BEFORE makes the first part on both sides
    begun_before: bool = False
    # the call in which the reward server dies; it is started again for a resume
    death: int | None = None
    # recipes/evaluate.py follows
    evaluate: bool = False


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
        "--truncated penalize --missing-eos-penalty 0.5 --max-new-tokens 7 --kl abs "
        "--rollout-micro-batch-size 8"
    ),
    "one response a prompt": Case("--baseline remax --num-rollouts-per-prompt 1 --val-greedy"),
    "bf16": Case("--precision bf16 --gradient-checkpointing"),
    "not finite": Case("--lr 1e30"),
    "resume": Case("--baseline ema --save-interval 1", stop_after=2),
    "begun before": Case("--baseline ema --save-interval 1", stop_after=2, begun_before=True),
    # two calls a step, and one validation before the first step
    "server lost": Case("--baseline remax", death=5),
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
    "--max-new-tokens 24 --num-rollout-samples 6 --max-steps 4 --val-check-interval 2 "
    "--save-top-k 9 --device cpu --precision fp32 --lr 2e-3"
)


@dataclass(frozen=True)
class Found:
    """The results that a run has left behind."""

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
    command = ["git", "-C", str(ROOT), "archive", name]
    with tempfile.TemporaryDirectory() as folder:
        with subprocess.Popen(command, stdout=subprocess.PIPE) as git:
            assert git.stdout is not None
            with (
                contextlib.suppress(tarfile.ReadError),
                tarfile.open(fileobj=git.stdout, mode="r|") as archive,
            ):
                archive.extractall(folder, filter="data")
        if git.returncode:
            sys.exit(f"bench/replay.py: {name} is neither a folder nor a revision of {ROOT}")
        yield Path(folder)


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
        """Start the process, with one thread: so sums have one order, and a fork works."""
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
        """Call `main` of a script with these words in a new process and return its pid."""
        variables = {name: str(value) for name, value in environment.items()}
        call = {"module": module, "words": [module, *map(str, words)]}
        return self._ask({**call, "log": str(log), "environment": variables})

    def wait(self, pid: int) -> int:
        """Wait for a process of `start` and return its exit code."""
        return self._ask({"wait": pid})

    @contextlib.contextmanager
    def server(self, folder: Path, **environment: Any) -> Iterator[int]:
        """The port of this checkout's reward server, which ends with the block."""
        function, ready = folder / "reward.py", folder / "ready"
        function.write_text(REWARD)
        ready.unlink(missing_ok=True)
        words = ["--reward-fn", f"{function}:variety", "--ready-file", ready]
        pid = self.start("serve_rm", words, folder / "server.log", **environment)
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
        """Run train.py and return the exit code of its first rank.

        With `marker`, the first rank gets SIGTERM once that file exists.
        """
        words = [
            *COMMON.split(),
            *case.flags.split(),
            *("--policy", data / "policy"),
            *("--train-data", data / "train.jsonl", "--val-data", data / "few.jsonl"),
            *("--rm-host", "127.0.0.1", "--rm-port", port),
            *("--log-dir", run),
            *(() if steps is None else ("--max-steps", steps)),
        ]
        ranks: list[dict[str, Any]] = [{}]
        if case.ranks > 1:
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": s.getsockname()[1]}
            meeting["WORLD_SIZE"] = case.ranks
            ranks = [{**meeting, "RANK": r, "LOCAL_RANK": r} for r in range(case.ranks)]
        pids = [self.start("train", words, Path(f"{run}.log"), **rank) for rank in ranks]
        if marker is not None:
            until(marker.exists, "the reward server is gone")
            # without SIGTERM the run would look for the server for minutes
            os.kill(pids[0], signal.SIGTERM)
        first, *_ = [self.wait(pid) for pid in pids]
        return first


def until(done: Callable[[], bool], what: str) -> None:
    """Wait for a condition; after two minutes in vain, end the script with a line about it."""
    end = time.monotonic() + 120
    while not done():
        if time.monotonic() > end:
            sys.exit(f"bench/replay.py: waited in vain until {what}")
        time.sleep(0.02)


def replay(case: Case, runner: Runner, folder: Path, data: Path, begun: Path | None) -> Found:
    """Run a case on one checkout; `folder` is empty, `begun` a run whose copy goes on."""
    run, codes, marker = folder / "run", list[int](), folder / "dead"
    if begun is not None:
        shutil.copytree(begun, run)
    elif case.stop_after is not None:
        with runner.server(folder) as port:
            codes.append(runner.train(run, case, port, data, case.stop_after))
    if case.death is not None:
        with runner.server(folder, REPLAY_DEATH=f"{marker} {case.death}") as port:
            codes.append(runner.train(run, case, port, data, marker=marker))
        shutil.copytree(run, folder / "interrupted")
    with runner.server(folder) as port:
        codes.append(runner.train(run, case, port, data))
        if case.evaluate:
            words = ["--run", run, "--rm-host", "127.0.0.1", "--rm-port", port]
            codes.append(runner.wait(runner.start("recipes.evaluate", words, Path(f"{run}.log"))))
    found = read(run)
    if case.death is not None:
        first = read(folder / "interrupted")
        found.lines.update({f"interrupted/{name}": x for name, x in first.lines.items()})
        found.tensors.update({f"interrupted/{name}": x for name, x in first.tensors.items()})
    return Found(codes, found.lines, found.states, found.tensors)


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl without times and rates."""
    kept = [key for key in row if not key.startswith("time_") and key != "tokens_per_s"]
    return {key: row[key] for key in kept}


def read(run: Path) -> Found:
    """The logs and checkpoints of a run folder."""
    lines: dict[str, list[str]] = {}
    for name in ("metrics.jsonl", *LOGS):
        text = (run / name).read_text() if (run / name).exists() else ""
        rows = [json.loads(line) for line in text.splitlines()]
        if name == "metrics.jsonl":
            rows = [without_times(row) for row in rows]
        lines[name] = [json.dumps(row) for row in rows]
    states, tensors = {}, dict[str, tuple[str, bytes]]()
    for folder in sorted(run.glob("checkpoints/step-*")):
        states[folder.name] = json.loads((folder / "state.json").read_text())
        for path in sorted(folder.rglob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  a safetensors file is no dictionary
                    value = file.get_tensor(name)
                    kind = f"{value.dtype} {tuple(value.shape)}"
                    key = f"{folder.name}/{path.name}/{name}"
                    tensors[key] = (kind, value.numpy().tobytes())
    return Found(codes=[], lines=lines, states=states, tensors=tensors)


def differences(a: Found, b: Found) -> list[str]:
    """A sentence for each difference.

    Of a log only the first line that differs is named, of a checkpoint file only the first tensor.
    """
    codes = [] if a.codes == b.codes else [f"exit codes {a.codes}, then {b.codes}"]
    return [*codes, *of_lines(a, b), *of_states(a, b), *of_tensors(a, b)]


def of_lines(a: Found, b: Found) -> list[str]:
    """The differences of the logs."""
    sentences = []
    for name in sorted({*a.lines, *b.lines}):
        x, y = a.lines.get(name, []), b.lines.get(name, [])
        if len(x) != len(y):
            sentences.append(f"{name}: {len(x)} lines, then {len(y)}")
        for n, (line, other) in enumerate(zip(x, y, strict=False), 1):
            if line == other:
                continue
            old, new = json.loads(line), json.loads(other)
            if name.endswith("metrics.jsonl"):
                new = {key: value for key, value in new.items() if key in old}
            if changes := changed_keys(old, new):
                sentences.append(f"{name}:{n}: {', '.join(changes[:3])[:300]}")
                break
    return sentences


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Key, old and new value of everything that two lines do not have in common."""
    return [
        f"{key} {old.get(key)!r}, then {new.get(key)!r}"
        for key in {**old, **new}
        if old.get(key) != new.get(key) or (key in old) != (key in new)
    ]


def of_states(a: Found, b: Found) -> list[str]:
    """The differences of the checkpoints' state.json."""
    sentences = []
    for name in sorted({*a.states, *b.states}):
        old, new = a.states.get(name), b.states.get(name)
        if old is None or new is None:
            sentences.append(f"{name}: only {'after' if old is None else 'before'}")
            continue
        for key in old:
            if key in new and old[key] != new[key]:
                sentences.append(f"{name}/state.json: {key} {old[key]!r}, then {new[key]!r}")
    return sentences


def of_tensors(a: Found, b: Found) -> list[str]:
    """The differences of the checkpoints' tensors."""
    sentences, files = [], set()
    for name in sorted({*a.tensors, *b.tensors}):
        file = name.rsplit("/", 1)[0]
        if a.tensors.get(name) != b.tensors.get(name) and file not in files:
            files.add(file)
            sentences.append(f"{name}: not the same bytes")
    return sentences


def prepare(code: Path, folder: Path) -> Path:
    """The toy's policy and prompts, made by one checkout."""
    command = [sys.executable, "recipes/toy.py"]
    done = subprocess.run(command, cwd=code, check=True, capture_output=True, text=True)
    return with_few(Path(done.stdout.strip()), folder / "data")


def with_few(toy: Path, data: Path) -> Path:
    """A copy of the toy's folder with few.jsonl, nine prompts for validation."""
    shutil.copytree(toy, data)
    lines = (data / "validation.jsonl").read_text().splitlines(keepends=True)
    (data / "few.jsonl").write_text("".join(lines[:9]))
    return data


def main() -> None:
    """Run every case on both checkouts at the same time and print the differences.

    The exit code is 1 if there are any.
    """
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
        help="folder or git revision to compare BEFORE with (default: this checkout)",
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=tuple(CASES),
        default=tuple(CASES),
        metavar="CASE",
        help="cases to run (default: all)",
    )
    args = parser.parse_args()
    changed = 0
    with contextlib.ExitStack() as stack:
        before, after = (stack.enter_context(checkout(name)) for name in (args.before, args.after))
        top = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        data = prepare(before, top)
        runners = [Runner(before), Runner(after)]
        for name in args.cases:
            case, folder, begun = CASES[name], top / name.replace(" ", "-"), None
            (folder / "before").mkdir(parents=True)
            (folder / "after").mkdir()
            if case.begun_before:
                begun = folder / "begun"
                with runners[0].server(folder) as port:
                    runners[0].train(begun, case, port, data, case.stop_after)
            with ThreadPoolExecutor(2) as pool:
                jobs = [
                    pool.submit(replay, case, runner, folder / side, data, begun)
                    for runner, side in zip(runners, ("before", "after"), strict=True)
                ]
                old, new = (job.result() for job in jobs)
            sentences = differences(old, new)
            if not any(old.lines.values()):
                end_of_log = (folder / "before/run.log").read_text()[-500:]
                sentences.append(f"nothing to compare: {end_of_log}")
            changed += bool(sentences)
            number = sum(map(len, old.lines.values()))
            counts = f"codes {old.codes}, {number} lines, {len(old.tensors)} tensors"
            verdict = f"{'DIFFERENT' if sentences else 'identical'}   ({counts})"
            print(f"{name:<28} {verdict}", *sentences, sep="\n    ", flush=True)
    print(f"{len(args.cases)} cases, {changed} different")
    sys.exit(changed > 0)


if __name__ == "__main__":
    main()
