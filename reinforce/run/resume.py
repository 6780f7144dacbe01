"""Going on with a run: which checkpoint it starts from, and whether it is the same run at all.

    --resume auto    go on with the run in --log-dir if it is the same; start one if there is none
             must    go on with the run in --log-dir; an error if there is none
             never   start a new run; an error if there is one in --log-dir

A run is what determines its updates: data, initial policy, reward model, and every flag but those
in SOFT. All that is written to identity.json at the start. A command that differs in any of it is
refused with the differences. It never starts from scratch in the folder of another run.
"""

import dataclasses
import datetime
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinforce.errors import ConfigError
from reinforce.run import checkpoint
from reinforce.run.config import LANGUAGE_MODEL, TrainConfig

LOGS = ("metrics.jsonl", "rollouts.jsonl", "validation.jsonl", "refused.jsonl")
# Flags that may change from one part of a run to the next: its length, intervals, addresses and
# micro-batches. Prompts and labels, which the data flags name, are in the identity by a digest.
SOFT = frozenset(
    (
        "preset",
        "policy",
        "train_data",
        "val_data",
        "prompt_key",
        "label_key",
        "skip_bad_lines",
        "rm_host",
        "rm_port",
        "rm_wait",
        "rm_fingerprint",
        "skip_refused",
        "max_epochs",
        "max_steps",
        "val_check_interval",
        "save_interval",
        "save_top_k",
        "log_dir",
        "resume",
        "max_time_per_run",
        "micro_batch_size",
        "micro_batch_tokens",
        "rollout_micro_batch_size",
        "forward_micro_batch_size",
        "val_rollout_micro_batch_size",
        "gradient_checkpointing",
        "parallel",
        "offload_reference",
        "offload_optimizer",
        "tensor_model_parallel_size",
        "device",
        "deterministic",
    )
)


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    step: int = 0  # finished steps
    folder: Path | None = None  # the checkpoint of that step
    baseline: Any = None  # the state of a baseline that has one
    bf16: bool | None = None  # the precision of the run; None: no step was made yet
    # the day that chat templates print; None: the run began with a version that had no such day
    date: str | None = None
    # names and values of flags that were not given when the run began, and got these defaults
    began_with: tuple[tuple[str, Any], ...] = ()
    refused: int = 0  # responses that the reward server refused and that were left out


def find_start(run: Path | None, mode: str) -> Start:
    """Where the run in this folder starts (None: a new folder); `mode` is the value of --resume.

    A run that was killed before its first checkpoint has lost nothing yet, and starts at step 0.
    Raises ConfigError if --resume does not allow this start.
    """
    traces = (*LOGS, "identity.json", "checkpoints")
    if run is None or not any((run / name).exists() for name in traces):
        if mode == "must":
            raise ConfigError(
                f"--resume must: no run to go on with in --log-dir {run or '(none given)'}; "
                "give the folder of a run, or --resume auto"
            )
        return Start(date=datetime.date.today().isoformat())
    if mode == "never":
        raise ConfigError(
            f"--log-dir {run} holds another run, and --resume is never; give an empty or new folder"
        )
    if not (run / "identity.json").exists():
        raise ConfigError(
            f"--log-dir {run} holds another run, without identity.json; give an empty or new folder"
        )
    date, began_with = date_of(run), filled_of(run)
    folder = checkpoint.newest(run)
    if folder is None:
        if mode == "must":
            raise ConfigError(
                f"--resume must: the run in --log-dir {run} has no checkpoint yet; "
                "give --resume auto to start it again from step 0"
            )
        return Start(date=date, began_with=began_with)
    state = checkpoint.state(folder)
    return Start(
        step=state["step"],
        folder=folder,
        baseline=state.get("baseline", state.get("ema")),  # "ema": written by older versions
        bf16=state.get("bf16"),
        date=date,
        began_with=began_with,
        refused=state.get("refused", 0),
    )


def date_of(run: Path) -> str | None:
    """The day that chat templates print in this run, as YYYY-MM-DD.

    None if the run began without one, or if its identity cannot be read.
    """
    try:
        date = json.loads((run / "identity.json").read_text()).get("date")
        return datetime.date.fromisoformat(date).isoformat()
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def filled_of(run: Path) -> tuple[tuple[str, Any], ...]:
    """The run's values of the flags whose defaults depend on what is trained, or on other flags.

    Another default in today's version does not make it another run.
    """
    try:
        found = json.loads((run / "identity.json").read_text())
        names = (*LANGUAGE_MODEL, "val_temperature")
        return tuple((name, found[name]) for name in names if found.get(name) is not None)
    except (OSError, ValueError, TypeError, AttributeError):
        return ()


def identity(config: TrainConfig, **facts: Any) -> dict[str, Any]:
    """What makes a run this run, in the types of JSON.

    `facts` are what no flag says: digests of data and models above all.
    """
    flags = {name: value for name, value in dataclasses.asdict(config).items() if name not in SOFT}
    return dict(json.loads(json.dumps({**flags, **facts})))


def canonical(identity: dict[str, Any]) -> dict[str, Any]:
    """The identity with the defaults that follow from other flags filled in.

    To give such a default as a flag does not make another run.
    """
    full = dict(identity)
    rows = full["num_rollout_samples"] * full["num_rollouts_per_prompt"]
    full["global_batch_size"] = full["global_batch_size"] or rows
    full["min_lr"] = full["lr"] if full["min_lr"] is None else full["min_lr"]
    full["lora_alpha"] = full["lora_alpha"] or 2.0 * full["lora_rank"]
    full["lora_targets"] = sorted(set(full["lora_targets"]))
    return full


def check_identity(run: Path, current: dict[str, Any]) -> None:
    """Raise ConfigError with the differences if the folder holds another run than the current one.

    A flag that is younger than the run in the folder counts as its default.
    """
    path = run / "identity.json"
    if not path.exists():
        return
    try:
        younger = {**identity(TrainConfig()), "prompt_lines": current.get("prompt_lines")}
        recorded = {**younger, **json.loads(path.read_text())}
        if "rows" in recorded:  # its name before it was prompt_lines
            recorded["prompt_lines"] = recorded.pop("rows")
        before = canonical(recorded)
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(
            f"--log-dir {run}: its identity.json cannot be read ({error}); give a new folder"
        ) from error
    now = canonical(current)
    changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    # named are the flags themselves, and not the defaults that follow from them
    flags = [name for name in changed if current.get(name) != recorded.get(name)]
    differences = [
        f"{name} was {recorded.get(name)}, is {current.get(name)}" for name in flags or changed
    ]
    if differences:
        raise ConfigError(
            f"--log-dir {run} holds another run: {'; '.join(differences)}. "
            "Give the flags of that run, or a new folder"
        )


def write_identity(run: Path, identity: dict[str, Any]) -> None:
    """Write identity.json, completely or not at all, unless the folder has one."""
    path = run / "identity.json"
    if path.exists():
        return
    partial = run / f".identity.{os.getpid()}"
    partial.write_text(json.dumps(identity, indent=2))
    checkpoint.flush(partial)
    partial.replace(path)
    checkpoint.flush(run)


def truncate_logs(run: Path, step: int) -> None:
    """Cut off the lines of later steps, and a last line that a kill has cut short.

    A damaged line among them is left out, and said. At step 0 the logs become empty.
    """
    for name in LOGS:
        path = run / name
        if not path.exists():
            continue
        with path.open("rb") as file:
            lines = [(len(line), _is_up_to(step, line)) for line in file]
        while lines and not lines[-1][1]:
            lines.pop()
        damaged = [number for number, (_, good) in enumerate(lines, 1) if not good]
        os.truncate(path, sum(size for size, _ in lines))
        if damaged:
            print(f"!! {path}: left out {len(damaged)} damaged lines, first line {damaged[0]}")
            partial = run / f".{name}.{os.getpid()}"
            with path.open("rb") as file, partial.open("wb") as copy:
                copy.writelines(line for line in file if _is_up_to(step, line))
            checkpoint.flush(partial)
            partial.replace(path)


def drop_part_of_validation(run: Path, prompts: int) -> None:
    """Cut off the lines of a last validation that a kill has cut short: it is made again."""
    path = run / "validation.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    steps = [json.loads(line)["step"] for line in lines]
    last = steps.count(steps[-1]) if steps else 0
    if 0 < last < prompts:
        os.truncate(path, sum(map(len, lines[:-last])))


def _is_up_to(step: int, line: bytes) -> bool:
    """Whether a line of a log is complete, and of this step or one before."""
    try:
        return step > 0 and line.endswith(b"\n") and bool(json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError):
        return False


def digest(values: Sequence[Any]) -> str:
    """A digest of JSON values, 16 hexadecimal digits; of others, a table's times, of their text."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def weights(policy: str) -> str:
    """What stands for the parameters of a policy in the identity.

    Of a folder a digest of its config and weights, of a hub id its name.
    """
    files = sorted([*Path(policy).glob("*.safetensors"), *Path(policy).glob("config.json")])
    return digest([[f.name, checkpoint.sha256(f)] for f in files]) if files else policy
