"""Going on with a run: which checkpoint it starts from, and whether it is the same run at all.

    --resume auto    the run that is in --log-dir, if it is this one; a new one if there is none
             must    the run that is there, or nothing
             never   a new run, or nothing

A run is what gives its update: data, initial policy, reward model, and every flag but those of
SOFT. All that is written to identity.json at the start; a command that differs in any of it is
refused with the differences, and never starts from scratch.
"""

import dataclasses
import datetime
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
SOFT = frozenset(
    (  # flags that may change from one part of a run to the next: how long, how often, where, and in what portions
        # what the data flags lead to, prompts and labels, is in the identity by its digest
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
    bf16: bool | None = None  # the precision so far; None: no step yet
    date: str | None = None  # the day that chat templates print; None: a run that began without one
    began_with: tuple[
        tuple[str, Any], ...
    ] = ()  # what this run was filled with where no flag was given
    refused: int = 0  # responses that the reward server refused and that were left out


def plan(run: Path | None, how: str) -> Start:
    """The start of the run in this folder (None: a new folder). Raises ConfigError if --resume does not allow it.

    A run that was killed before its first checkpoint has lost nothing yet, and starts at 0.
    """
    began = run is not None and any(
        (run / name).exists() for name in (*LOGS, "identity.json", "checkpoints")
    )
    if run is None or not began:
        if how == "must":
            raise ConfigError(
                f"--resume must: no run to go on with in --log-dir {run or '(none given)'}"
            )
        return Start(date=datetime.date.today().isoformat())
    if how == "never":
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
        if how == "must":
            raise ConfigError(f"--resume must: the run in --log-dir {run} has no checkpoint yet")
        return Start(date=date, began_with=began_with)
    state = checkpoint.state(folder)
    baseline = state.get("baseline", state.get("ema"))
    return Start(
        state["step"],
        folder,
        baseline,
        state.get("bf16"),
        date,
        began_with,
        state.get("refused", 0),
    )


def date_of(run: Path) -> str | None:
    """The day that chat templates print in this run; None if it began without one, or its identity cannot be read."""
    try:
        date = json.loads((run / "identity.json").read_text()).get("date")
        return datetime.date.fromisoformat(date).isoformat()
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def filled_of(run: Path) -> tuple[tuple[str, Any], ...]:
    """The run's own values of flags whose defaults depend on what is trained: other defaults today make it no other run."""
    try:
        found = json.loads((run / "identity.json").read_text())
        return tuple((name, found[name]) for name in LANGUAGE_MODEL if found.get(name) is not None)
    except (OSError, ValueError, TypeError, AttributeError):
        return ()


def identity(config: TrainConfig, **facts: Any) -> dict[str, Any]:
    """What makes a run this run, in JSON's types; `facts` are what no flag says, digests of data and models above all."""
    flags = {name: value for name, value in dataclasses.asdict(config).items() if name not in SOFT}
    return dict(json.loads(json.dumps({**flags, **facts})))


def canonical(identity: dict[str, Any]) -> dict[str, Any]:
    """The identity with the defaults that other flags give: a default that is spelled out is no other run."""
    same = dict(identity)
    rows = same["num_rollout_samples"] * same["num_rollouts_per_prompt"]
    same["global_batch_size"] = same["global_batch_size"] or rows
    same["min_lr"] = same["lr"] if same["min_lr"] is None else same["min_lr"]
    return same


def check_identity(run: Path, own: dict[str, Any]) -> None:
    """Raise ConfigError with the differences if the folder holds another run.

    A flag that is younger than the run in the folder counts as its default.
    """
    place = run / "identity.json"
    if not place.exists():
        return
    try:
        known = {**identity(TrainConfig()), **json.loads(place.read_text())}
        found = canonical(known)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"--log-dir {run}: its identity.json cannot be read ({error}); give a new folder"
        ) from error
    now = canonical(own)
    changed = [name for name in sorted({*found, *now}) if found.get(name) != now.get(name)]
    given = [
        name for name in changed if own.get(name) != known.get(name)
    ]  # without defaults that follow from others
    differences = [f"{name} was {known.get(name)}, is {own.get(name)}" for name in given or changed]
    if differences:
        raise ConfigError(
            f"--log-dir {run} holds another run: {'; '.join(differences)}. Give its own flags, or a new folder"
        )


def write_identity(run: Path, own: dict[str, Any]) -> None:
    """identity.json, whole or not at all; one that is there stays."""
    place = run / "identity.json"
    if place.exists():
        return
    partial = run / f".identity.{os.getpid()}"
    partial.write_text(json.dumps(own, indent=2))
    checkpoint.flush(partial)
    partial.replace(place)
    checkpoint.flush(run)


def cut_back(run: Path, step: int) -> None:
    """Drop what the logs say of later steps than this one, and a last line that a kill cut short; of no step at all: everything."""
    for name in LOGS:
        path = run / name
        if path.exists():
            with path.open("r+b") as file:
                file.truncate(_end(file, step))


def _end(lines: Any, step: int) -> int:
    """Number of bytes of the leading lines that are whole and of steps up to this one, 0 of them if the step is 0."""
    size = 0
    for line in lines if step else ():
        try:
            late = not line.endswith(b"\n") or json.loads(line)["step"] > step
        except (ValueError, KeyError, TypeError):
            late = True
        if late:
            break
        size += len(line)
    return size


def digest(values: Sequence[Any]) -> str:
    """A short digest of JSON values."""
    import hashlib

    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def weights(policy: str) -> str:
    """What stands for a policy's parameters: a digest of the config and weights of a folder, the name of a hub id."""
    files = sorted([*Path(policy).glob("*.safetensors"), *Path(policy).glob("config.json")])
    return digest([[f.name, checkpoint.sha256(f)] for f in files]) if files else policy
