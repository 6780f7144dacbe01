"""Evaluation: the trained policy against the initial one, on test prompts, by the reward server.

    python recipes/evaluate.py --run runs/latest                     a run on the toy
    python recipes/evaluate.py --run RUN --test-data test.jsonl --rm-host HOST --rm-port PORT

Both policies answer every prompt with the same random numbers. The table has the mean reward of
each policy, the difference with a paired bootstrap and the win rate with Wilson's interval (95 %),
the KL between the policies, the length of responses, the share that ends, and distinct-n. The run
folder gets evaluation.json, evaluation.jsonl (every pair of responses) and report.html, a page
without external resources. The reward is the one that was trained on, and it can be fooled: read
the samples, or give the server of another reward model.
"""

import base64
import dataclasses
import json
import statistics
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import transformers

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes import toy
from recipes.intervals import mean_interval, wilson
from reinforce import kl
from reinforce.errors import ConfigError
from reinforce.flags import flag, parse, refuse
from reinforce.logprobs import Scorer
from reinforce.objective import Judged
from reinforce.policy import load_policy, load_tokenizer
from reinforce.rm_client import RewardClient
from reinforce.rm_connection import read_token
from reinforce.run import checkpoint, exits, offload
from reinforce.run.actor import Actor
from reinforce.run.config import TrainConfig
from reinforce.run.folder import pinned
from reinforce.run.group import Group, make_groups
from reinforce.run.loading import set_up
from reinforce.run.metrics import distinct, mean_and_error, mean_reward, rewards_of
from reinforce.run.resume import date_of, weights
from reinforce.text import Prompt

# the run's settings that a flag of evaluation replaces
OVERRIDES = (
    *("temperature", "max_new_tokens", "seed"),
    *("rm_wait", "device", "precision", "offload_reference"),
    *("prompt_key", "label_key", "skip_bad_lines"),
)
NO_SERVER = (
    "--rm-host and --rm-port are missing: start serve_rm.py with the reward that is to judge, "
    "and give its address"
)
# the step in the seeds of evaluation's random numbers: neither training nor validation has it
STEP = -2


@dataclass(frozen=True)
class Config:
    """The flags of recipes/evaluate.py."""

    run: str | None = flag(
        "runs/latest",
        "what",
        "run folder, which has the settings and the last checkpoint, and gets the report",
    )
    policy: str | None = flag(
        None, "what", "trained policy: folder or hub id (default: the run's last checkpoint)"
    )
    initial_policy: str | None = flag(
        None,
        "what",
        "policy to compare with: folder or hub id (default: the one that the run began with)",
    )
    test_data: str | None = flag(
        None,
        "what",
        "test prompts, in any form that train.py reads (default: the run's validation prompts)",
    )
    prompt_key: str | None = flag(
        None, "what", "column of the prompt in --test-data (default: the run's)"
    )
    label_key: str | None = flag(
        None, "what", "column of the label in --test-data (default: the run's)"
    )
    skip_bad_lines: bool = flag(
        False, "what", "leave out malformed prompt lines and count them, instead of refusing"
    )
    max_prompts: int = flag(256, "what", "test prompts at most: the first ones")
    rm_host: str | None = flag(
        None, "reward server", "host of serve_rm.py (default for the toy: a server is started)"
    )
    rm_port: int | None = flag(
        None, "reward server", "port of serve_rm.py (default for the toy: a server is started)"
    )
    rm_wait: float = flag(0.0, "reward server", "seconds to wait for the reward server")
    temperature: float | None = flag(
        None, "sampling", "sampling temperature of both policies (default: the run's)"
    )
    greedy: bool = flag(
        False, "sampling", "take the likeliest token each time; no KL is measured then"
    )
    max_new_tokens: int | None = flag(
        None, "sampling", "tokens of a response at most (default: the run's)"
    )
    seed: int = flag(0, "sampling", "seed of every draw")
    device: str | None = flag(
        None, "hardware", "where to compute (default: the run's)", choices=("auto", "cpu", "cuda")
    )
    precision: str | None = flag(
        None,
        "hardware",
        "bf16: bfloat16 matrix products over float32 weights; auto: bf16 where it is fast "
        "(default: the run's)",
        choices=("auto", "fp32", "bf16"),
    )
    offload_reference: bool = flag(
        False,
        "hardware",
        "keep each policy in the host's memory, and on the GPU only while it samples or scores "
        "(default: the run's)",
    )

    def check(self) -> None:
        """Raise ConfigError on the first combination that cannot work."""
        refuse(self, needed=("run",), positive=("max_prompts", "temperature", "max_new_tokens"))
        if (self.rm_host is None) != (self.rm_port is None):
            raise ConfigError("--rm-host and --rm-port come together: give both")


def given(config: Config, name: str) -> bool:
    """Whether a flag replaces the setting of the run: 0 does, an absent switch does not."""
    value = getattr(config, name)
    return value is not None and value is not False


def settings_of(config: Config, stack: ExitStack) -> tuple[TrainConfig, Path, str]:
    """Settings of train.py, the run folder, and the trained policy. Raises ConfigError.

    The settings are those of the run, for the initial policy on the test prompts.
    """
    run = pinned(Path(str(config.run)))
    try:
        facts = json.loads((run / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--run {run} is no run folder of train.py ({error})") from error
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    facts = {name: fact for name, fact in facts.items() if name in names}
    values: dict[str, Any] = {
        name: tuple(fact) if isinstance(fact, list) else fact for name, fact in facts.items()
    }
    base = toy.filled(TrainConfig(**values))
    newest = None if config.policy else checkpoint.newest(run)
    if config.policy is None and newest is None:
        raise ConfigError(f"--run {run} has no checkpoints; give --policy")
    initial, test = config.initial_policy or base.policy, config.test_data or base.val_data
    host, port = config.rm_host, config.rm_port
    if config.initial_policy is None:
        refuse_another(str(initial), run)
    if test is None:
        raise ConfigError("--test-data is missing: the run had no validation prompts")
    if host is None and toy.is_toy(str(base.policy)):
        host, port = toys_server(run, stack)
    if host is None:
        raise ConfigError(NO_SERVER)
    replaced = [name for name in OVERRIDES if given(config, name)]
    changes: dict[str, Any] = {name: getattr(config, name) for name in replaced}
    base = dataclasses.replace(
        base,
        policy=initial,
        train_data=test,
        val_data=None,
        rm_host=host,
        rm_port=port,
        rm_fingerprint=None,
        log_dir=None,
        baseline="none",
        initial_policy_kl_penalty=0.0,
        lora_rank=0,
        lora_alpha=None,
        lora_targets=(),
        num_rollout_samples=1,
        global_batch_size=None,
        warmup_steps=0,
        constant_steps=0,
        parallel="ddp",
        tensor_model_parallel_size=1,
        resume="auto",
        **changes,
    )
    return base, run, config.policy or str(newest)


def identity(run: Path) -> dict[str, Any]:
    """What the run was; empty where that cannot be read."""
    try:
        found = json.loads((run / "identity.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def refuse_another(policy: str, run: Path) -> None:
    """Raise ConfigError if this is not the policy any more that the run began with."""
    began_with = identity(run).get("policy")
    if began_with is not None and weights(policy) != began_with:
        raise ConfigError(
            f"--run {run}: the policy that it began with, {policy}, is not there or is another one "
            "now; give it as --initial-policy"
        )


def toys_server(run: Path, stack: ExitStack) -> tuple[str, int] | tuple[None, None]:
    """Host and port of the toy's reward server, if the run was trained on the toy's reward."""
    host, port = stack.enter_context(toy.server())
    client = RewardClient(host, port, token=read_token())
    client.connect()
    return (host, port) if client.fingerprint == identity(run).get("reward_model") else (None, None)


def refuse_other_tokenizer(trained: str, initial: Any) -> None:
    """Raise ConfigError where the trained policy's tokenizer is not the initial policy's.

    Both policies read the same token ids.
    """
    if load_tokenizer(trained, "--policy").get_vocab() != initial.get_vocab():
        raise ConfigError(
            f"--policy {trained}: its tokenizer is not that of the initial policy; "
            "give --initial-policy, or a policy of the same tokenizer"
        )


def answer(
    actor: Actor, prompts: list[Prompt], greedy: bool, initial: Actor | None = None
) -> list[Group]:
    """One scored response to each prompt; with `initial`, also its KL to that policy, nats."""
    sampling = dataclasses.replace(actor.training, greedy=greedy)
    actor.idle.fetch()
    out = actor.respond(prompts, 1, STEP, sampling, actor.config.val_rollout_micro_batch_size)
    actor.idle.drop()
    reward, _ = actor.ask(prompts, out)  # (P,)
    distance = None
    if initial is not None and not greedy:
        initial.idle.fetch()
        token_kl = kl.k1(out.logp, initial.score(initial.scorer, out))  # (P, T)
        initial.idle.drop()
        distance = kl.per_response(token_kl, out.mask).double().cpu()  # (P,)
    groups = make_groups(actor.tokenizer, prompts, out, Judged(reward, distance, reward))
    return [
        dataclasses.replace(group, prompt=readable(prompt))
        for group, prompt in zip(groups, prompts, strict=True)
    ]


def readable(prompt: Prompt) -> str:
    """The prompt without the marks of its chat template."""
    if prompt.messages is None:
        return prompt.text
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt.messages)


def summary(groups: list[Group]) -> dict[str, Any]:
    """Reward, length, share of finished responses and distinct-n of one policy."""
    texts = [g.response[0] for g in groups]
    return {
        "reward": dict(zip(("mean", "error"), mean_reward(groups), strict=True)),
        "length": statistics.fmean(g.length[0] for g in groups),
        "finished": statistics.fmean(g.finished[0] for g in groups),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
    }


def win(before: Group, after: Group) -> float:
    """1 if the second response has the higher reward, 0 if the first has; 0.5 for a tie.

    The same reply twice is a tie, whatever the rounding of its two rewards.
    """
    (a,), (b,) = rewards_of([before]), rewards_of([after])
    same = (before.response, before.finished) == (after.response, after.finished)
    return 0.5 if same or a == b else float(b > a)


def compare(before: list[Group], after: list[Group]) -> dict[str, Any]:
    """The numbers of each policy, and those of the pair.

    Each list has one group of one response for every prompt, in the same order.
    """
    difference = [b - a for a, b in zip(rewards_of(before), rewards_of(after), strict=True)]
    wins = [win(a, b) for a, b in zip(before, after, strict=True)]
    divergence = None
    if after[0].kl:
        numbers = mean_and_error([group.kl[0] for group in after if group.kl])
        divergence = dict(zip(("mean", "error"), numbers, strict=True))
    return {
        "prompts": len(before),
        "initial": summary(before),
        "trained": summary(after),
        "difference": {"mean": statistics.fmean(difference), "interval": mean_interval(difference)},
        "win_rate": {"mean": statistics.fmean(wins), "interval": wilson(sum(wins), len(wins))},
        "kl": divergence,
    }


def table(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of (quantity, initial, trained) as text.

    A quantity of the pair has its value in the last column.
    """
    a, b = result["initial"], result["trained"]

    def interval(x: dict[str, Any], form: str) -> str:
        if x["interval"] is None:
            return f"{x['mean']:{form}}"
        low, high = x["interval"]
        return f"{x['mean']:{form}} [{low:{form}}, {high:{form}}]"

    first, second = (f"{x['reward']['mean']:.3f} ± {x['reward']['error']:.3f}" for x in (a, b))
    rows = [("reward", first, second)]
    rows.append(("reward, trained − initial", "", interval(result["difference"], "+.3f")))
    rows.append(("win rate", "", interval(result["win_rate"], ".3f")))
    if result["kl"]:
        divergence = f"{result['kl']['mean']:.2f} ± {result['kl']['error']:.2f}"
        rows.append(("KL(trained ‖ initial), nats a response", "", divergence))
    names = {
        "length": "tokens a response",
        "finished": "finished",
        "distinct_1": "distinct-1",
        "distinct_2": "distinct-2",
    }
    rows += [(name, f"{a[key]:.2f}", f"{b[key]:.2f}") for key, name in names.items()]
    return rows


def write_report(
    run: Path, title: str, result: dict[str, Any], before: list[Group], after: list[Group]
) -> None:
    """Write report.html and evaluation.jsonl.

    report.html has the table, the run's curves and every pair of responses, and needs no other
    file. evaluation.jsonl has the pairs.
    """
    samples = [
        {
            "prompt": a.prompt,
            "initial": a.response[0],
            "trained": b.response[0],
            "initial_reward": a.reward[0],
            "trained_reward": b.reward[0],
            "win": win(a, b),
        }
        for a, b in zip(before, after, strict=True)
    ]
    with (run / "evaluation.jsonl").open("w") as lines:
        lines.writelines(json.dumps(sample) + "\n" for sample in samples)
    curves, image = run / "curves.png", ""
    if curves.exists():
        image = f"data:image/png;base64,{base64.b64encode(curves.read_bytes()).decode()}"
    content = {"title": title, "table": table(result), "samples": samples, "curves": image}
    data = json.dumps(content).replace("<", "\\u003c")
    page = Path(__file__).with_name("report.html").read_text().replace("{{data}}", data)
    (run / "report.html").write_text(page)


def main() -> None:
    """Sample both policies, judge both, print the table and write the report."""
    config = parse(Config, __doc__)
    with ExitStack() as stack:
        settings, run, trained = settings_of(config, stack)
        initial, data = set_up(settings, "--initial-policy", "--test-data", date_of(run))
        refuse_other_tokenizer(trained, initial.tokenizer)
        prompts = data.prompts[: config.max_prompts]
        wanted = initial.config.offload_reference and initial.device.type == "cuda"
        idle = partial(offload.idle, device=initial.device, wanted=wanted)
        initial = dataclasses.replace(initial, idle=idle(initial.policy))
        before = answer(initial, prompts, config.greedy)
        model = load_policy(trained, initial.tokenizer, initial.device, flag="--policy")
        policy = Scorer(model, plain=True)
        actor = dataclasses.replace(initial, model=model, policy=policy, idle=idle(policy))
        after = answer(actor, prompts, config.greedy, initial)
    result = compare(before, after)
    print(f"\n{len(prompts)} prompts; trained: {trained}")
    print("± is one standard error, [ ] an interval of 95 %\n")
    for name, left, right in [("", "initial", "trained"), *table(result)]:
        print(f"{name:<40}{left:>18}{right:>28}")
    for a, b in list(zip(before, after, strict=True))[:5]:
        print(f"\nprompt  {a.prompt.strip()[-300:]}")
        print(f"initial {a.reward[0]:+.2f}  {a.response[0].strip()}")
        print(f"trained {b.reward[0]:+.2f}  {b.response[0].strip()}")
    (run / "evaluation.json").write_text(json.dumps(result, indent=2))
    title = f"{run.resolve().name}: {Path(trained).name} against the initial policy"
    write_report(run, title, result, before, after)
    print(f"\nreport {run}/report.html · {run}/evaluation.json · {run}/evaluation.jsonl")


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    sys.exit(exits.run(main, name="recipes/evaluate.py"))
