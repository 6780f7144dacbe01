"""Baselines side by side: the same prompts, seeds and number of generated tokens, several seeds each.

    ./launch.sh compare                                                                the toy, 6 baselines x 5 seeds
    ./launch.sh compare --policy SFT --train-data P.jsonl --rm-host HOST --rm-port PORT -- --lr 1e-5 --max-new-tokens 64

What follows -- goes to every train.py. ReMax pays for its greedy response: every curve is read at the same number of sampled
tokens, the greedy ones included, and the budget is what the shortest run used. Told are reward, KL and objective over the last
tenth of it with 95 % intervals over seeds (Student's t), the difference of the objective to RLOO's on the same seeds, and tokens
and seconds to a given reward. The noise of the gradient estimate is measured by itself, on one policy for all baselines: for a
step of P prompts, the trace of the estimate's covariance over the squared length of its mean. The initial policy and the last
one of the first RLOO run are measured, with every seed.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes import compare_plot, toy
from recipes.compare_plot import Lines, Noise
from recipes.intervals import student
from reinforce import own_baseline
from reinforce.baselines import BASELINES
from reinforce.errors import ConfigError, FailedError
from reinforce.flags import flag, parse, refuse
from reinforce.policy import load_policy
from reinforce.run import distributed, exits
from reinforce.run.actor import Actor
from reinforce.run.config import TrainConfig, baseline_name
from reinforce.run.folder import new_folder, new_run_folder
from reinforce.run.setup import set_up
from reinforce.text import Prompt
from train import judge

Numbers = dict[str, float | None]  # a run at the budget

ROOT = Path(__file__).resolve().parents[1]
NOISE_STEP, MEAN_STEP = -3, -4  # of the random numbers: no training step's


@dataclass(frozen=True)
class Config:
    """The flags."""

    policy: str | None = flag(None, "what", "as of train.py (default: the toy)")
    train_data: str | None = flag(None, "what", "as of train.py")
    rm_host: str | None = flag(None, "what", "as of train.py")
    rm_port: int | None = flag(None, "what", "as of train.py")
    baselines: tuple[str, ...] = flag(
        tuple(BASELINES),
        "what",
        "which ones; FILE.py:NAME is one of your own",
        nargs="+",
        type=baseline_name,
    )
    seeds: int = flag(5, "size", "runs of each baseline")
    max_steps: int = flag(100, "size", "steps of each run")
    noise_prompts: int = flag(
        64, "size", "prompts for the noise of the gradient (memory: 14 gradients); 0: not measured"
    )
    jobs: int = flag(1, "size", "runs at a time")
    target: float = flag(
        1.0, "report", "reward whose cost in tokens and seconds is told (mean of five steps)"
    )
    log_dir: str | None = flag(
        None, "report", "folder of runs, table and plot (default: a new runs/compare-TIME)"
    )

    def check(self) -> None:
        """Raise ConfigError on the first combination that cannot work."""
        refuse(self, positive=("seeds", "max_steps", "jobs"), not_negative=("noise_prompts",))
        if self.seeds < 2:
            raise ConfigError("--seeds must be 2 or more: one run has no interval")
        own = {
            "--policy": self.policy,
            "--train-data": self.train_data,
            "--rm-host": self.rm_host,
            "--rm-port": self.rm_port,
        }
        if None in own.values() and any(value is not None for value in own.values()):
            raise ConfigError(f"{', '.join(own)} come as a set (none of them: the toy)")
        if "rloo" not in self.baselines:
            raise ConfigError("--baselines needs rloo, to which the others are compared")
        if len(set(map(label, self.baselines))) < len(self.baselines):
            raise ConfigError("--baselines has the same name twice")


def label(baseline: str) -> str:
    """How a baseline is called in folders, table and plot: of FILE.py:NAME it is the name."""
    return baseline.rpartition(":")[2]


def train_all(config: Config, common: list[str], folder: Path) -> None:
    """Every baseline with every seed, as train.py runs of their own. Raises FailedError."""
    jobs = [(b, s) for s in range(config.seeds) for b in config.baselines]
    threads = max(1, (os.cpu_count() or 1) // config.jobs)

    def one(job: tuple[str, int]) -> str:
        baseline, seed = job
        run = folder / f"{label(baseline)}-{seed}"
        size = [
            "--max-steps",
            str(config.max_steps),
            "--save-interval",
            str(config.max_steps),
            "--save-top-k",
            "0",
        ]
        command = [
            sys.executable,
            str(ROOT / "train.py"),
            "--baseline",
            baseline,
            "--seed",
            str(seed),
            "--log-dir",
            str(run),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(
            [*command, *size, *common], capture_output=True, text=True, env=environment
        )
        return "" if done.returncode == 0 else f"{run}: {done.stderr.strip().splitlines()[-1:]}"

    start = time.monotonic()
    with ThreadPoolExecutor(config.jobs) as pool:
        for n, ((baseline, seed), failure) in enumerate(
            zip(jobs, pool.map(one, jobs), strict=True), 1
        ):
            if failure:
                pool.shutdown(cancel_futures=True)
                raise FailedError(f"a run failed: {failure}")
            print(
                f"run {n}/{len(jobs)}  {label(baseline)}, seed {seed}  {time.monotonic() - start:.0f} s",
                flush=True,
            )


def read_run(folder: Path) -> Lines:
    """Lines of a run's metrics.jsonl, with the tokens and seconds up to each."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    tokens, seconds = 0, 0.0
    for line in lines:
        tokens += line["tokens"]
        seconds += sum(
            line[f"time_{part}"] for part in ("rollout", "reward", "reference", "update")
        )
        line["tokens_so_far"], line["seconds_so_far"] = tokens, seconds
    return lines


def at_budget(lines: Lines, budget: int, target: float) -> Numbers:
    """A run's numbers over the last tenth of the first `budget` tokens, and what `target` cost (None: never reached)."""
    within = [line for line in lines if line["tokens_so_far"] <= budget]
    late = [line for line in within if line["tokens_so_far"] > 0.9 * budget] or within[-1:]
    found: Numbers = {
        name: statistics.fmean(line[name] for line in late) for name in ("reward", "objective")
    }
    found["kl"] = (
        statistics.fmean(line["kl"] for line in late) if late[0]["kl"] is not None else None
    )
    found["steps"] = float(len(within))
    smooth = [
        statistics.fmean(line["reward"] for line in within[max(0, i - 4) : i + 1])
        for i in range(len(within))
    ]
    first = next(
        (
            line
            for line, mean in zip(within, smooth, strict=True)
            if mean >= target and line["step"] >= 5
        ),
        None,
    )
    found["tokens"] = None if first is None else float(first["tokens_so_far"])
    found["seconds"] = None if first is None else first["seconds_so_far"]
    return found


def gradient_noise(
    actor: Actor, prompts: list[Prompt], names: Sequence[str]
) -> dict[str, float | None]:
    """trace Cov(estimate of one step) / |E estimate|^2 of each baseline, all from the same responses to these prompts.

    With g_p the estimate from prompt p alone, trace Cov = sum_p |g_p - mean|^2 / (n - 1) and a step of P prompts has 1/P of it.
    |mean|^2 is too large by trace Cov / n, which is taken off; where nothing is left these prompts do not tell it: None.
    """
    config, k = actor.config, actor.config.num_rollouts_per_prompt
    out = actor.sample(prompts, NOISE_STEP)
    greedy = actor.sample_greedy(prompts, NOISE_STEP)
    other = actor.sample(prompts, MEAN_STEP)  # what a baseline with a state has seen before
    reward, past = (
        judge(actor, prompts, rows).objective.view(-1, k) for rows in (out, other)
    )  # (n, K) each
    valid = torch.ones_like(reward, dtype=torch.bool)  # (n, K)
    greedy_reward = judge(actor, prompts, greedy).objective  # (n,)
    advantages = []
    for name in names:
        baseline = own_baseline.make(name, ema_decay=0.0)
        if baseline.state is not None:
            baseline(past, valid)
        advantages.append(baseline(reward, valid, greedy_reward))
    advantage = torch.stack(advantages).float().to(actor.device)  # (baselines, n, K)

    weights = [w for w in actor.model.parameters() if w.requires_grad]
    total = torch.zeros(
        len(names), sum(w.numel() for w in weights), device=actor.device
    )  # (baselines, D)
    squares = torch.zeros(len(names), dtype=torch.float64)
    for p in range(len(prompts)):
        scores = []
        for row in range(p * k, (p + 1) * k):
            part = out.take([row])
            logp = actor.logp(part)
            scores.append(
                torch.cat([g.flatten() for g in torch.autograd.grad(logp.sum(), weights)])
            )
        g = advantage[:, p] @ torch.stack(scores) / k  # (baselines, D)
        total += g
        squares += g.double().square().sum(1).cpu()
    n = len(prompts)
    mean_square = (total / n).double().square().sum(1).cpu()  # (baselines,)
    covariance = (squares - n * mean_square) / (n - 1)  # (baselines,)
    signal = mean_square - covariance / n
    ratios = [
        (c / config.num_rollout_samples / s).item() if s > 0 else None
        for c, s in zip(covariance, signal, strict=True)
    ]
    return dict(zip(names, ratios, strict=True))


def measure_noise(settings: TrainConfig, config: Config, trained: Path) -> Noise:
    """Of the initial policy, and of a trained one: a dictionary a seed."""
    found: Noise = {"initial": [], "trained": []}
    for seed in range(config.seeds):
        actor, data = set_up(dataclasses.replace(settings, seed=seed))
        prompts = data.prompts
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
        some = [prompts[i] for i in order[: config.noise_prompts]]
        found["initial"].append(gradient_noise(actor, some, config.baselines))
        source = load_policy(str(trained), actor.tokenizer, actor.device)
        actor.model.load_state_dict(source.state_dict())
        found["trained"].append(gradient_noise(actor, some, config.baselines))
    return found


def told(values: Sequence[float | None], form: str) -> str:
    """Mean and half interval, or how many runs never had the number."""
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return f"{len(known)} of {len(values)} runs"
    mean, half = student(known)
    return f"{mean:{form}} ± {half:{form.lstrip('+')}}"


def write_table(config: Config, runs: dict[str, list[Numbers]], noise: Noise, budget: int) -> str:
    """The comparison in Markdown."""
    lines = [
        "| baseline | reward | KL, nats | objective | objective − RLOO's | steps | tokens to reward "
        f"{config.target:g} | seconds | noise, initial | noise, trained |",
        "|" + "---|" * 10,
    ]
    rloo = [run["objective"] for run in runs["rloo"]]
    for name in config.baselines:
        own = runs[name]
        column = {key: [run[key] for run in own] for key in own[0]}
        gain = [(a or 0.0) - (b or 0.0) for a, b in zip(column["objective"], rloo, strict=True)]
        measured = [
            told([one[name] for one in noise[where]], ".2f") if noise[where] else "–"
            for where in ("initial", "trained")
        ]
        cells = [
            label(name),
            told(column["reward"], ".3f"),
            told(column["kl"], ".2f"),
            told(column["objective"], ".3f"),
            "–" if name == "rloo" else told(gain, "+.3f"),
            told(column["steps"], ".0f"),
            told(column["tokens"], ".0f"),
            told(column["seconds"], ".1f"),
            *measured,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(
        [
            *lines,
            "",
            f"{config.seeds} seeds, the first {budget} sampled tokens of each run; intervals are of 95 %.",
        ]
    )


def main() -> None:
    """Train, measure, tell."""
    argv = sys.argv[1:]
    split = argv.index("--") if "--" in argv else len(argv)
    config, extra = parse(Config, __doc__, argv[:split]), argv[split + 1 :]
    given = data_flags(config, (config.rm_host or "127.0.0.1", config.rm_port or 1))
    settings = parse(TrainConfig, "", [*given, *extra])  # refuse now, not in thirty runs
    settings = settings.filled(toy.DEFAULTS) if config.policy is None else toy.filled(settings)
    for name in config.baselines:
        own_baseline.check(name, settings.num_rollouts_per_prompt)
    taken = {
        "--baseline",
        "--seed",
        "--log-dir",
        "--max-steps",
        "--save-interval",
        "--skip-refused",
    }
    if own := taken & {word.partition("=")[0] for word in extra}:
        raise ConfigError(
            f"{', '.join(sorted(own))} after --: the comparison sets them itself (--help)"
        )
    if config.noise_prompts and (settings.truncated == "drop" or settings.loss_norm != "sequence"):
        raise ConfigError(
            "the noise of the gradient is measured for the default norm and all rows: add --noise-prompts 0"
        )
    if config.log_dir is not None:
        new_folder(config.log_dir, "--log-dir")
    folder = new_run_folder(config.log_dir, "compare")
    with ExitStack() as stack:
        if config.policy is None:
            prepared = toy.prepare()
            address = stack.enter_context(toy.server())
            config = dataclasses.replace(
                config, policy=str(prepared / "policy"), train_data=str(prepared / "train.jsonl")
            )
        else:
            address = (str(config.rm_host), int(config.rm_port or 0))
        common = [*data_flags(config, address), *extra]
        train_all(config, common, folder)
        curves = {
            name: [read_run(folder / f"{label(name)}-{seed}") for seed in range(config.seeds)]
            for name in config.baselines
        }
        report(
            config, curves, {"initial": [], "trained": []}, folder
        )  # kept if what follows needs more memory than there is
        if config.noise_prompts:
            print("noise of the gradient estimates ...", flush=True)
            last = sorted((folder / "rloo-0/checkpoints").glob("step-*"))[-1]
            report(
                config,
                curves,
                measure_noise(toy.filled(parse(TrainConfig, "", common)), config, last),
                folder,
            )
    print(f"\n{(folder / 'compare.md').read_text()}")
    print(f"table {folder}/compare.md · plot {folder}/compare.png · numbers {folder}/compare.json")
    distributed.stop()


def report(config: Config, curves: dict[str, list[Lines]], noise: Noise, folder: Path) -> None:
    """compare.md, compare.json and compare.png."""
    budget = min(run[-1]["tokens_so_far"] for runs in curves.values() for run in runs)
    results = {
        name: [at_budget(run, budget, config.target) for run in runs]
        for name, runs in curves.items()
    }
    (folder / "compare.md").write_text(write_table(config, results, noise, budget) + "\n")
    (folder / "compare.json").write_text(
        json.dumps({"budget": budget, "runs": results, "noise": noise}, indent=2)
    )
    labels = {name: label(name) for name in curves}
    compare_plot.draw(curves, labels, noise, budget, folder / "compare.png")


def data_flags(config: Config, address: tuple[str, int]) -> list[str]:
    """train.py's flags for policy, prompts and reward."""
    flags = {
        "--policy": config.policy,
        "--train-data": config.train_data,
        "--rm-host": address[0],
        "--rm-port": address[1],
    }
    return [word for name, value in flags.items() for word in (name, str(value))]


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    sys.exit(exits.run(main, name="recipes/compare.py"))
