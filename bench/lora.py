"""LoRA beside full training: the same steps, prompts, seed and reward; reward, KL, memory, seconds.

    python bench/lora.py --policy cache/smollm2/policy --train-data cache/smollm2/train.jsonl

Each row is train.py in a process of its own, against one server of VADER's sentiment. The rates of
LoRA are multiples of --lr. Flags that are not listed go to train.py. Printed are the mean reward of
the first and of the last three steps, the KL of the last three in nats a response, the median
seconds of a step without the first, the process's peak memory, the trained parameters, a
checkpoint's size, and the machine's matrix rate before and after.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.step import ROOT, matrix_rate, reward_server

ENDS = 3  # steps at each end whose mean is printed
COLUMNS = ("reward, first", "last", "KL", "s a step", "rollout", "update")
MORE = ("peak, GiB", "trained, M", "checkpoint, MiB")


def run(words: list[str], folder: Path) -> dict[str, float]:
    """One run of train.py to its end: what the table shows of it. Raises on a failure."""
    command = [sys.executable, str(ROOT / "train.py"), *words, "--log-dir", str(folder)]
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        text = printed.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with code {process.returncode}:\n{text}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    (saved,) = (folder / "checkpoints").glob("step-*")
    whole = re.search(r"([\d.]+)M parameters ·", text)
    trained = re.search(r"([\d.]+)M parameters are trained", text) or whole
    assert trained is not None
    parts = [[line[f"time_{part}"] for line in lines[1:]] for part in ("rollout", "update")]
    values: list[float] = [
        statistics.fmean(line["reward"] for line in lines[:ENDS]),
        statistics.fmean(line["reward"] for line in lines[-ENDS:]),
        statistics.fmean(line["kl"] for line in lines[-ENDS:]),
        statistics.median(seconds_of(line) for line in lines[1:]),
        *map(statistics.median, parts),
        usage.ru_maxrss / 2**20,
        float(trained[1]),
        sum(path.stat().st_size for path in saved.rglob("*") if path.is_file()) / 2**20,
    ]
    return dict(zip((*COLUMNS, *MORE), values, strict=True))


def seconds_of(line: dict[str, Any]) -> float:
    """Seconds of a step, validation and checkpoint not counted."""
    parts = ("rollout", "reward", "reference", "update")
    return sum(line[f"time_{part}"] for part in parts if line[f"time_{part}"] is not None)


def table(args: argparse.Namespace, more: list[str], port: str) -> None:
    """Run each row, and print it; `more` are flags of train.py."""
    common = [
        *("--policy", args.policy, "--train-data", args.train_data),
        *("--rm-host", "127.0.0.1", "--rm-port", port, "--seed", str(args.seed)),
        *("--num-rollout-samples", "8", "--num-rollouts-per-prompt", "4"),
        *("--max-new-tokens", str(args.tokens), "--precision", args.precision),
        *("--initial-policy-kl-penalty", "0.02", "--max-epochs", "99"),
        *("--max-steps", str(args.steps), "--save-interval", "9999", "--save-top-k", "0"),
        *more,
    ]
    rows = [(f"full, lr {args.lr:g}", ["--lr", str(args.lr)])]
    for times in args.rates:
        rate = times * args.lr
        rows.append((f"LoRA, lr {rate:g}", ["--lr", str(rate), "--lora-rank", str(args.rank)]))
    print(f"| rank {args.rank} | {' | '.join((*COLUMNS, *MORE))} |")
    print("|---" * (1 + len(COLUMNS) + len(MORE)) + "|")
    for name, words in rows:
        with tempfile.TemporaryDirectory() as folder:
            found = run([*common, *words], Path(folder))
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in found.values())} |", flush=True)


def main() -> None:
    """Serve the reward, and make the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", required=True, help="folder of the language model")
    parser.add_argument("--train-data", required=True, help="prompts")
    parser.add_argument(
        "--reward-fn", default=f"{ROOT}/recipes/smollm2.py:positivity", help="reward"
    )
    parser.add_argument("--steps", type=int, default=12, help="steps of each run")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a response at most")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters")
    parser.add_argument("--lr", type=float, default=2e-5, help="learning rate of full training")
    parser.add_argument("--rates", type=float, nargs="+", default=[1, 10], help="LoRA's, over --lr")
    parser.add_argument("--precision", default="auto", help="as of train.py")
    parser.add_argument("--seed", type=int, default=0, help="seed of every run")
    args, more = parser.parse_known_args()
    print(f"{matrix_rate()}, {os.environ.get('OMP_NUM_THREADS', 'all')} threads", flush=True)
    with reward_server(args.reward_fn) as port:
        table(args, more, port)
    print(matrix_rate())


if __name__ == "__main__":
    main()
