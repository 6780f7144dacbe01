"""A whole step of ours beside one of TRL's RLOOTrainer, alternating in one run.

    pip install --no-deps trl==1.16.0 accelerate     for this script alone
    python bench/step.py --policy cache/smollm2/policy --case forced
    python bench/step.py --case toy --batches 16 32 64 --steps 20   its own policy and prompts

Both sides have the same model, prompts, K = 4, lengths, reward function and threads, a learning
rate of 0 (ours: 1e-30), a KL penalty, and an allocator that keeps freed memory. Ours asks a reward
server over HTTP, TRL calls the function in its own process. TRL runs without checkpointing, with
its cache, at each per-device batch that divides the step, in both precisions; the fastest counts.
Each measurement is a process of its own, whose first step is not counted. Printed are medians, the
machine's matrix rate, and the peak memory, whole and beyond what a process holds in any case:

    imports + 16 P + reference + copy for decoding      bytes; P parameters of 4 bytes, 4 of their
                                                        gradient and 8 of AdamW's averages

In bfloat16 our reference stores its linear layers in 2 bytes, and each side keeps a copy of them
that autocast makes while it samples. Each side draws responses of its own, of the same distribution
but not of the same lengths: their mean and their longest are printed, and the ratio of the times
of a sampled token beside that of the steps' times.
"""

import argparse
import contextlib
import itertools
import json
import math
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes import toy

ROOT = Path(__file__).resolve().parents[1]
K = 4
TOPICS = [
    "rivers",
    "winter",
    "bread",
    "trains",
    "music",
    "gardens",
    "maps",
    "clocks",
    "kites",
    "lamps",
    "bridges",
    "stones",
]


@dataclass(frozen=True)
class Case:
    """What a step samples."""

    tokens: int  # of a response at most
    forced: bool  # every response has as many
    ask: str = "Name one thing about {}, in one short sentence."
    prompt_words: int = 0  # appended to the question
    prompts: int = 4


CASES = {
    "forced": Case(64, True),
    "natural": Case(256, False, "Tell me about {} in two sentences."),
    "long": Case(32, True, prompt_words=380),  # about 512 prompt tokens
    "toy": Case(24, False, prompts=16),
}


def lines(name: str, count: int) -> list[dict[str, Any]]:
    """Lines of a data file: chats, each about another topic; of the toy its own prompts."""
    if name == "toy":
        rng = random.Random(0)
        return [{"prompt": toy.make_prompt(rng)[0]} for _ in range(count)]
    case = CASES[name]
    padding = " ".join(TOPICS[i % len(TOPICS)] for i in range(case.prompt_words))
    texts = [f"{case.ask.format(TOPICS[i % len(TOPICS)])} {padding}".strip() for i in range(count)]
    return [{"messages": [{"role": "user", "content": text}]} for text in texts]


def variety(prompts: Any, completions: Any, **_: Any) -> list[float]:
    """The reward of both sides: how many different words there are."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(len(set(text.split()))) for text in texts]


def ours(policy: str, name: str, steps: int, precision: str, port: int) -> dict[str, Any]:
    """Seconds of each step, from the end of one to the end of the next."""
    import train
    from reinforce.run.run import Run

    case = CASES[name]
    imports = peak()
    ends: list[float] = []
    longest: list[int] = []
    finished = Run.finished

    def noted(run: Run, made: Any) -> None:
        finished(run, made)
        ends.append(time.perf_counter())
        longest.append(int(made.batch.rollout.length.max()))

    Run.finished = noted  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "prompts.jsonl"
        data.write_text(
            "".join(json.dumps(line) + "\n" for line in lines(name, case.prompts * (steps + 1)))
        )
        run = f"{folder}/run"
        # the last token may be an end token: the length is the same
        least = ("--min-new-tokens", str(case.tokens - 1)) if case.forced else ()
        sys.argv = [
            "train.py",
            *("--policy", policy, "--train-data", str(data), "--log-dir", run),
            *("--rm-host", "127.0.0.1", "--rm-port", str(port), "--lr", "1e-30"),
            *("--num-rollout-samples", str(case.prompts), "--num-rollouts-per-prompt", str(K)),
            *("--max-new-tokens", str(case.tokens), *least, "--precision", precision),
            *("--max-steps", str(steps + 1), "--save-interval", "99", "--save-top-k", "0"),
        ]
        try:
            train.main()
        except SystemExit as end:
            if end.code:
                raise
        metrics = [json.loads(line) for line in (Path(run) / "metrics.jsonl").open()]
    parts = ("rollout", "reward", "reference", "update")
    return {
        "seconds": [b - a for a, b in itertools.pairwise(ends)],
        "length": statistics.fmean(line["response_length"] for line in metrics[1:]),
        "longest": statistics.fmean(longest[1:]),
        "static": imports + held(policy, precision == "bf16", halved_reference=True),
        "parts": {p: statistics.median(line[f"time_{p}"] for line in metrics[1:]) for p in parts},
    }


def trl(policy: str, name: str, steps: int, precision: str, batch: int) -> dict[str, Any]:
    """The same for TRL."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    from reinforce.run.allocator import keep_freed_memory

    case = CASES[name]
    keep_freed_memory()  # as train.py does
    imports = peak()
    ends: list[float] = []
    lengths: list[float] = []
    longest: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "completions/mean_length" in logs:
                lengths.append(logs["completions/mean_length"])
                longest.append(logs["completions/max_length"])

    with tempfile.TemporaryDirectory() as folder:
        args = RLOOConfig(
            output_dir=folder,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=case.prompts * K // batch,
            num_generations=K,
            max_completion_length=case.tokens,
            generation_kwargs={"min_new_tokens": case.tokens} if case.forced else None,
            temperature=1.0,
            top_k=0,
            beta=0.05,
            learning_rate=0.0,
            max_steps=steps + 1,
            gradient_checkpointing=False,
            bf16=precision == "bf16",
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            seed=0,
            model_init_kwargs={"dtype": "float32"},
        )
        trainer = RLOOTrainer(
            model=policy,
            args=args,
            reward_funcs=variety,
            train_dataset=Dataset.from_list(
                [{"prompt": line.get("messages", line.get("prompt"))} for line in lines(name, 64)]
            ),
            processing_class=AutoTokenizer.from_pretrained(policy),
            callbacks=[Clock()],
        )
        trainer.train()
    return {
        "seconds": [b - a for a, b in itertools.pairwise(ends)],
        "length": statistics.fmean(lengths[1:]),
        "longest": statistics.fmean(longest[1:]),
        "static": imports + held(policy, precision == "bf16", halved_reference=False),
    }


def peak() -> float:
    """The most memory that this process has held, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def held(policy: str, bf16: bool, halved_reference: bool) -> float:
    """GiB that the weights and what belongs to them take: the formula at the top."""
    from safetensors import safe_open

    with safe_open(Path(policy) / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    embedding = sum(n for name, n in sizes.items() if "embed" in name or "lm_head" in name)
    linear = sum(n for name, n in sizes.items() if len(shapes[name]) == 2) - embedding
    weights = sum(sizes.values())
    reference = 4 * weights - 2 * linear * (bf16 and halved_reference)
    return (16 * weights + reference + 2 * linear * bf16) / 2**30


@contextlib.contextmanager
def reward_server(function: str) -> Iterator[str]:
    """serve_rm.py with a reward function FILE.py:NAME, until the block ends: its port."""
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready"
        command = [sys.executable, str(ROOT / "serve_rm.py"), "--reward-fn", function]
        server = subprocess.Popen([*command, "--ready-file", str(ready)], stdout=subprocess.DEVNULL)
        try:
            while not ready.exists():
                if server.poll() is not None:
                    raise RuntimeError(f"{' '.join(command)} ended with code {server.returncode}")
                time.sleep(0.1)
            yield ready.read_text().split()[1]
        finally:
            server.terminate()
            server.wait()


def measured(words: list[str]) -> dict[str, Any]:
    """One side in a process of its own."""
    command = [sys.executable, __file__, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def matrix_rate() -> str:
    """GFLOP/s of a product of SmolLM2's shapes, in both precisions."""
    import torch

    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(1024, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
        times = []
        for _ in range(20):
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        rates.append(2 * 1024 * 576 * 1536 / statistics.median(times) / 1e9)
    return f"matrix products: fp32 {rates[0]:.0f} GFLOP/s, bf16 {rates[1]:.0f} GFLOP/s"


def main() -> None:
    """Measure one side (--side), or both in turns."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", help="folder of the language model; the toy has its own")
    parser.add_argument("--case", choices=tuple(CASES), default="forced", help="what is sampled")
    parser.add_argument("--steps", type=int, default=2, help="steps of a process that count")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument(
        "--precisions", nargs="+", default=["fp32", "bf16"], help="tried for each side"
    )
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[4, 8, 16], help="per-device batches tried of TRL"
    )
    parser.add_argument(
        "--side", nargs="*", help="one measurement: ours PRECISION PORT, or trl ..."
    )
    args = parser.parse_args()
    if args.policy is None:
        if args.case != "toy":
            parser.error("--policy: missing")
        args.policy = str(toy.prepare() / "policy")
    if args.side:
        name, precision, number = args.side
        side = ours if name == "ours" else trl
        found = side(args.policy, args.case, args.steps, precision, int(number))
        found["peak"] = peak()
        print(json.dumps(found))
        return
    compare(args)


def compare(args: argparse.Namespace) -> None:
    """Find each side's fastest setting in one round, then alternate."""
    print(matrix_rate(), flush=True)
    case, rounds = args.case, args.rounds
    common = ["--policy", args.policy, "--case", case, "--steps", str(args.steps), "--side"]
    with reward_server(f"{__file__}:variety") as port:
        settings = {"ours": [["ours", p, port] for p in args.precisions]}
        settings["trl"] = [["trl", p, str(b)] for p in args.precisions for b in args.batches]
        best = {}
        for side, choices in settings.items():
            found = {}
            for choice in choices:
                result = measured([*common, *choice])
                found[tuple(choice)] = statistics.median(result["seconds"])
                print(" ".join(choice[:2] + choice[2:] * (side == "trl")), summary(result))
            best[side] = list(min(found, key=lambda choice: found[choice]))
        ratios, per_token, peaks, beyond = [], [], [], []
        for n in range(rounds):
            pair = {side: measured([*common, *choice]) for side, choice in best.items()}
            seconds = {side: statistics.median(r["seconds"]) for side, r in pair.items()}
            ratios.append(seconds["trl"] / seconds["ours"])
            per_token.append(ratios[-1] * pair["ours"]["length"] / pair["trl"]["length"])
            peaks.append(pair["ours"]["peak"] / pair["trl"]["peak"])
            more = {side: r["peak"] - r["static"] for side, r in pair.items()}
            beyond.append(more["ours"] / more["trl"])
            for side, result in pair.items():
                print(f"round {n + 1} {side} {best[side][1]} {summary(result)}", flush=True)
        print(
            f"{case}: TRL / ours {statistics.median(ratios):.2f} ({min(ratios):.2f} to "
            f"{max(ratios):.2f}), of a sampled token {statistics.median(per_token):.2f}; "
            f"peak memory ours / TRL {statistics.median(peaks):.2f}, "
            f"beyond the static {statistics.median(beyond):.2f}"
        )


def summary(result: dict[str, Any]) -> str:
    """Seconds, mean length, memory, and what the time went into."""
    seconds = statistics.median(result["seconds"])
    parts = " ".join(f"{name} {value:.2g}" for name, value in result.get("parts", {}).items())
    length, longest, most, static = (result[n] for n in ("length", "longest", "peak", "static"))
    return (
        f"{seconds:.3g} s, {length:.0f} tokens a response, {longest:.0f} the longest, "
        f"{most:.1f} GiB, {most - static:.1f} beyond {static:.1f} {parts}"
    )


if __name__ == "__main__":
    main()
