"""Baselines side by side: the same prompts, the same number of generated tokens, several seeds.

    ./launch.sh compare                                        the toy, 6 baselines x 5 seeds
    ./launch.sh compare --policy SFT --train-data P.jsonl --rm-host HOST --rm-port PORT -- --lr 1e-5

The flags after -- go to every train.py. ReMax pays for its greedy response: every curve is read at
the same number of sampled tokens, the greedy ones included. That budget is the number of the
shortest run. The table has, for each baseline:

- reward, KL and objective over the last tenth of the budget, with 95 % intervals over seeds
  (Student's t);
- the difference of the objective to that of RLOO on the same seeds;
- tokens and seconds to a given reward;
- the noise of the gradient estimate: for a step of P prompts, the trace of the estimate's
  covariance over the squared length of its mean.

The noise is measured apart from the runs, on one policy for all baselines. With every seed, the
initial policy and the last policy of the first RLOO run are measured.
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
from reinforce.run.folder import checkpoints_of, new_folder, new_run_folder
from reinforce.run.loading import set_up
from reinforce.text import Prompt
from train import judge

Numbers = dict[str, float | None]  # of one run, at the budget

ROOT = Path(__file__).resolve().parents[1]
# flags of train.py that the comparison sets
TAKEN = {
    *("--baseline", "--seed", "--log-dir"),
    *("--max-steps", "--save-interval", "--skip-refused"),
}
# steps in the seeds of the random numbers: no training step has them
NOISE_STEP, EARLIER_STEP = -3, -4


@dataclass(frozen=True)
class Config:
    """The flags of recipes/compare.py."""

    policy: str | None = flag(
        None,
        "what",
        "SFT'd causal language model to train: Hugging Face folder or hub id (default: the toy)",
    )
    train_data: str | None = flag(
        None, "what", "training prompts, in any form that train.py reads (default: the toy's)"
    )
    rm_host: str | None = flag(
        None, "what", "host of serve_rm.py (default for the toy: a server is started)"
    )
    rm_port: int | None = flag(
        None, "what", "port of serve_rm.py (default for the toy: a server is started)"
    )
    baselines: tuple[str, ...] = flag(
        tuple(BASELINES),
        "what",
        "baselines to compare; FILE.py:NAME is a function of your own",
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
        1.0, "report", "reward whose cost in tokens and seconds is reported (mean of five steps)"
    )
    log_dir: str | None = flag(
        None, "report", "folder of runs, table and plot (default: a new runs/compare-TIME)"
    )

    def check(self) -> None:
        """Raise ConfigError on the first combination that cannot work."""
        refuse(self, positive=("seeds", "max_steps", "jobs"), not_negative=("noise_prompts",))
        if self.noise_prompts == 1:
            raise ConfigError("--noise-prompts must be 2 or more, or 0: one prompt has no variance")
        if self.seeds < 2:
            raise ConfigError("--seeds must be 2 or more: one run has no interval")
        flags = ("--policy", "--train-data", "--rm-host", "--rm-port")
        values = (self.policy, self.train_data, self.rm_host, self.rm_port)
        if None in values and any(value is not None for value in values):
            raise ConfigError(
                f"{', '.join(flags)} come as a set: give all four (or none of them: the toy)"
            )
        if "rloo" not in self.baselines:
            raise ConfigError("--baselines needs rloo, to which the others are compared: add it")
        if len(set(map(label, self.baselines))) < len(self.baselines):
            raise ConfigError("--baselines has the same name twice: give every name once")


def label(baseline: str) -> str:
    """The name of a baseline in folders, table and plot: of FILE.py:NAME the part NAME."""
    return baseline.rpartition(":")[2]


def train_all(config: Config, common: list[str], folder: Path) -> None:
    """Run train.py for every baseline with every seed. Raises FailedError."""
    jobs = [(b, s) for s in range(config.seeds) for b in config.baselines]
    threads = max(1, (os.cpu_count() or 1) // config.jobs)

    def one(job: tuple[str, int]) -> str:
        baseline, seed = job
        run = folder / f"{label(baseline)}-{seed}"
        steps = str(config.max_steps)
        command = [
            *(sys.executable, str(ROOT / "train.py")),
            *("--baseline", baseline, "--seed", str(seed), "--log-dir", str(run)),
            *("--max-steps", steps, "--max-epochs", steps),  # an epoch has a step or more
            *("--save-interval", steps, "--save-top-k", "0"),
            *common,
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        return "" if done.returncode == 0 else f"{run}: {done.stderr.strip().splitlines()[-1:]}"

    start = time.monotonic()
    with ThreadPoolExecutor(config.jobs) as pool:
        ended = zip(jobs, pool.map(one, jobs), strict=True)
        for n, ((baseline, seed), failure) in enumerate(ended, 1):
            if failure:
                pool.shutdown(cancel_futures=True)
                raise FailedError(f"a run failed: {failure}")
            seconds = time.monotonic() - start
            progress = f"run {n}/{len(jobs)}  {label(baseline)}, seed {seed}  {seconds:.0f} s"
            print(progress, flush=True)


def read_run(folder: Path) -> Lines:
    """Lines of a run's metrics.jsonl, each with the tokens and seconds of the run so far."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    parts = ("rollout", "reward", "reference", "update")
    tokens, seconds = 0, 0.0
    for line in lines:
        tokens += line["tokens"]
        seconds += sum(line[f"time_{part}"] for part in parts)
        line["tokens_so_far"], line["seconds_so_far"] = tokens, seconds
    return lines


def at_budget(lines: Lines, budget: int, target: float) -> Numbers:
    """A run's numbers over the last tenth of the first `budget` tokens.

    `tokens` and `seconds` are the cost of a mean reward of `target` over five steps, None if the
    run never reached it.
    """
    within = [line for line in lines if line["tokens_so_far"] <= budget]
    within = within or lines[:1]  # a first step that is longer than the shortest run
    late = [line for line in within if line["tokens_so_far"] > 0.9 * budget] or within[-1:]
    numbers: Numbers = {
        name: statistics.fmean(line[name] for line in late) for name in ("reward", "objective")
    }
    has_kl = late[0]["kl"] is not None
    numbers["kl"] = statistics.fmean(line["kl"] for line in late) if has_kl else None
    numbers["steps"] = float(len(within))
    numbers["tokens"] = numbers["seconds"] = None
    for i, line in enumerate(within):
        recent = within[max(0, i - 4) : i + 1]
        if line["step"] >= 5 and statistics.fmean(x["reward"] for x in recent) >= target:
            numbers["tokens"] = float(line["tokens_so_far"])
            numbers["seconds"] = line["seconds_so_far"]
            break
    return numbers


def gradient_noise(
    actor: Actor, prompts: list[Prompt], names: Sequence[str]
) -> dict[str, float | None]:
    """trace Cov(estimate of one step) / |E estimate|^2 of each baseline.

    All baselines have the same responses to these prompts. With g_p the estimate from prompt p
    alone, trace Cov = sum_p |g_p - mean|^2 / (n - 1), and a step of P prompts has 1/P of it.
    |mean|^2 is too large by trace Cov / n, which is taken off. None if nothing is left: then these
    prompts are too few.
    """
    config, k = actor.config, actor.config.num_rollouts_per_prompt
    out = actor.sample(prompts, NOISE_STEP)
    greedy = actor.sample_greedy(prompts, NOISE_STEP)
    # what a baseline with a state has seen before
    earlier = actor.sample(prompts, EARLIER_STEP)
    reward = judge(actor, prompts, out).objective.view(-1, k)  # (n, K)
    past = judge(actor, prompts, earlier).objective.view(-1, k)  # (n, K)
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
    size = sum(w.numel() for w in weights)
    total = torch.zeros(len(names), size, device=actor.device)  # (baselines, D)
    squares = torch.zeros(len(names), dtype=torch.float64)  # (baselines,)
    for p in range(len(prompts)):
        scores = []
        for row in range(p * k, (p + 1) * k):
            logp = actor.logp(out.take([row]))  # (1, T)
            gradients = torch.autograd.grad(logp.sum(), weights)
            scores.append(torch.cat([gradient.flatten() for gradient in gradients]))  # (D,)
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
    """Noise of the gradient under the initial and a trained policy: a dictionary for each seed."""
    noise: Noise = {"initial": [], "trained": []}
    for seed in range(config.seeds):
        actor, data = set_up(dataclasses.replace(settings, seed=seed))
        prompts = data.prompts
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
        chosen = [prompts[i] for i in order[: config.noise_prompts]]
        noise["initial"].append(gradient_noise(actor, chosen, config.baselines))
        source = load_policy(str(trained), actor.tokenizer, actor.device)
        actor.model.load_state_dict(source.state_dict())
        noise["trained"].append(gradient_noise(actor, chosen, config.baselines))
    return noise


def with_interval(values: Sequence[float | None], form: str) -> str:
    """Mean and half the width of the interval, or how many runs have the number if some lack it."""
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return f"{len(known)} of {len(values)} runs"
    mean, half = student(known)
    return f"{mean:{form}} ± {half:{form.lstrip('+')}}"


def write_table(config: Config, runs: dict[str, list[Numbers]], noise: Noise, budget: int) -> str:
    """The comparison in Markdown."""
    heads = [
        *("baseline", "reward", "KL, nats", "objective", "objective − RLOO's", "steps"),
        *(f"tokens to reward {config.target:g}", "seconds", "noise, initial", "noise, trained"),
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * 10]
    rloo = [run["objective"] for run in runs["rloo"]]
    for name in config.baselines:
        column = {key: [run[key] for run in runs[name]] for key in runs[name][0]}
        gain = [(a or 0.0) - (b or 0.0) for a, b in zip(column["objective"], rloo, strict=True)]
        measured = [
            with_interval([seed[name] for seed in noise[policy]], ".2f") if noise[policy] else "–"
            for policy in ("initial", "trained")
        ]
        cells = [
            label(name),
            with_interval(column["reward"], ".3f"),
            with_interval(column["kl"], ".2f"),
            with_interval(column["objective"], ".3f"),
            "–" if name == "rloo" else with_interval(gain, "+.3f"),
            with_interval(column["steps"], ".0f"),
            with_interval(column["tokens"], ".0f"),
            with_interval(column["seconds"], ".1f"),
            *measured,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    budget_line = f"{config.seeds} seeds, the first {budget} sampled tokens of each run"
    return "\n".join([*lines, "", f"{budget_line}; intervals are of 95 %."])


def main() -> None:
    """Train every run, measure the noise, print the table and draw the plot."""
    argv = sys.argv[1:]
    split = argv.index("--") if "--" in argv else len(argv)
    config, extra = parse(Config, __doc__, argv[:split]), argv[split + 1 :]
    given = data_flags(config, (config.rm_host or "127.0.0.1", config.rm_port or 1))
    # a flag that train.py refuses is refused now, not in thirty runs
    settings = parse(TrainConfig, "", [*given, *extra])
    settings = settings.filled(toy.DEFAULTS) if config.policy is None else toy.filled(settings)
    for name in config.baselines:
        own_baseline.check(name, settings.num_rollouts_per_prompt)
    if refused := TAKEN & {word.partition("=")[0] for word in extra}:
        raise ConfigError(
            f"{', '.join(sorted(refused))} after --: the comparison sets them itself (--help)"
        )
    if config.noise_prompts:
        refuse_noise(settings)
    if config.log_dir is not None:
        new_folder(config.log_dir, "--log-dir")
    folder = new_run_folder(config.log_dir, "compare")
    with ExitStack() as stack:
        if config.policy is None:
            prepared = toy.prepare()
            address = stack.enter_context(toy.server())
            policy, prompts = str(prepared / "policy"), str(prepared / "train.jsonl")
            config = dataclasses.replace(config, policy=policy, train_data=prompts)
        else:
            address = (str(config.rm_host), int(config.rm_port or 0))
        common = [*data_flags(config, address), *extra]
        train_all(config, common, folder)
        curves = {
            name: [read_run(folder / f"{label(name)}-{seed}") for seed in range(config.seeds)]
            for name in config.baselines
        }
        # this report stays if the noise needs more memory than the machine has
        report(config, curves, {"initial": [], "trained": []}, folder)
        if config.noise_prompts:
            print("noise of the gradient estimates ...", flush=True)
            last = checkpoints_of(folder / "rloo-0")[-1]
            settings = toy.filled(parse(TrainConfig, "", common))
            report(config, curves, measure_noise(settings, config, last), folder)
    print(f"\n{(folder / 'compare.md').read_text()}")
    print(f"table {folder}/compare.md · plot {folder}/compare.png · numbers {folder}/compare.json")
    distributed.stop()


def refuse_noise(settings: TrainConfig) -> None:
    """Raise ConfigError on flags of train.py that `gradient_noise` does not know."""
    for name, given in (
        ("--truncated drop", settings.truncated == "drop"),
        (f"--loss-norm {settings.loss_norm}", settings.loss_norm != "sequence"),
        ("--lora-rank", settings.lora_rank),
        (f"--parallel {settings.parallel}", settings.parallel != "ddp"),
    ):
        if given:
            raise ConfigError(
                f"the noise of the gradient is not measured with {name}: add --noise-prompts 0"
            )


def report(config: Config, curves: dict[str, list[Lines]], noise: Noise, folder: Path) -> None:
    """Write compare.md, compare.json and compare.png."""
    budget = min(run[-1]["tokens_so_far"] for runs in curves.values() for run in runs)
    results = {
        name: [at_budget(run, budget, config.target) for run in runs]
        for name, runs in curves.items()
    }
    numbers = {"budget": budget, "runs": results, "noise": noise}
    (folder / "compare.md").write_text(write_table(config, results, noise, budget) + "\n")
    (folder / "compare.json").write_text(json.dumps(numbers, indent=2))
    labels = {name: label(name) for name in curves}
    compare_plot.draw(curves, labels, noise, budget, folder / "compare.png")


def data_flags(config: Config, address: tuple[str, int]) -> list[str]:
    """The flags of train.py for policy, prompts and reward."""
    host, port = address
    return [
        *("--policy", str(config.policy), "--train-data", str(config.train_data)),
        *("--rm-host", host, "--rm-port", str(port)),
    ]


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    sys.exit(exits.run(main, name="recipes/compare.py"))
