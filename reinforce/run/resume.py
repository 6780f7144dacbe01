"""Going on with a run: which checkpoint it starts from, and whether it is the same run at all.

    --resume auto    the run that is in --log-dir, if it is this one; a new one if there is none
             must    the run that is there, or nothing
             never   a new run, or nothing

A run is what gives its update: data, initial policy, reward model, and every flag but those of SOFT. All that is written to
identity.json at the start; a command that differs in any of it is refused with the differences, and never starts from scratch.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinforce.errors import ConfigError
from reinforce.run import checkpoint
from reinforce.run.config import TrainConfig

LOGS = ("metrics.jsonl", "rollouts.jsonl", "validation.jsonl")
SOFT = frozenset((  # flags that may change from one part of a run to the next: how long, how often, where, and in what portions
    "preset", "policy", "train_data", "val_data", "skip_bad_lines", "rm_host", "rm_port", "rm_wait", "rm_fingerprint",
    "max_epochs", "max_steps", "val_check_interval", "save_interval", "save_top_k", "log_dir", "resume", "max_time_per_run",
    "micro_batch_size", "micro_batch_tokens", "rollout_micro_batch_size", "forward_micro_batch_size",
    "val_rollout_micro_batch_size", "gradient_checkpointing", "parallel", "device", "deterministic",
))  # fmt: skip


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    step: int = 0  # finished steps
    folder: Path | None = None  # the checkpoint of that step
    baseline: Any = None  # the state of a baseline that has one
    bf16: bool | None = None  # the precision so far; None: no step yet


def plan(run: Path | None, how: str) -> Start:
    """The start of the run in this folder (None: a new folder). Raises ConfigError if --resume does not allow it.

    A run that was killed before its first checkpoint has lost nothing yet, and starts at 0.
    """
    began = run is not None and any((run / name).exists() for name in (*LOGS, "identity.json", "checkpoints"))
    if run is None or not began:
        if how == "must":
            raise ConfigError(f"--resume must: no run to go on with in --log-dir {run or '(none given)'}")
        return Start()
    if how == "never":
        raise ConfigError(f"--log-dir {run} holds another run, and --resume is never; give an empty or new folder")
    if not (run / "identity.json").exists():
        raise ConfigError(f"--log-dir {run} holds another run, without identity.json; give an empty or new folder")
    folder = checkpoint.newest(run)
    if folder is None:
        if how == "must":
            raise ConfigError(f"--resume must: the run in --log-dir {run} has no checkpoint yet")
        return Start()
    state = checkpoint.state(folder)
    return Start(state["step"], folder, state.get("baseline", state.get("ema")), state.get("bf16"))


def identity(config: TrainConfig, **facts: Any) -> dict[str, Any]:
    """What makes a run this run, in JSON's types; `facts` are what no flag says, digests of data and models above all."""
    flags = {name: value for name, value in dataclasses.asdict(config).items() if name not in SOFT}
    return dict(json.loads(json.dumps({**flags, **facts})))


def admit(run: Path, own: dict[str, Any]) -> None:
    """Write identity.json, or raise ConfigError with the differences if another one is there.

    A flag that is younger than the run that is there counts as its default.
    """
    place = run / "identity.json"
    if place.exists():
        try:
            there = {**identity(TrainConfig()), **json.loads(place.read_text())}
        except (ValueError, TypeError) as error:
            raise ConfigError(f"--log-dir {run}: its identity.json cannot be read ({error}); give a new folder") from error
        differences = [f"{name} was {there.get(name)}, is {own.get(name)}" for name in sorted({*there, *own})
                       if there.get(name) != own.get(name)]  # fmt: skip
        if differences:
            raise ConfigError(f"--log-dir {run} holds another run: {'; '.join(differences)}. Give its own flags, or a new folder")
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
