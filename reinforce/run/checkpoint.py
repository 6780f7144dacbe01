"""A checkpoint is an ordinary Hugging Face folder, `checkpoints/step-000010`, and what a run needs to go on from it, bitwise.

    model*.safetensors, config.json, tokenizer   the float32 weights, whole whatever the ranks and the wrapping, tied ones once
    training/optimizer.safetensors               AdamW's two averages and step of each parameter, by the parameter's name
    state.json                                   step, validation reward, state of the baseline, precision, refused responses
    manifest.json                                size and sha256 of all of these

Prompt order, learning rate and random numbers are functions of the step, so there is nothing else
to keep. It is written beside its place, flushed to the disk and renamed: a folder of that name is
whole, and what the disk does to it later shows in the manifest. Left out: shards written by every
rank (one copy of the model must fit rank 0's memory).
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from reinforce.errors import ConfigError, FailedError
from reinforce.run import distributed

MANIFEST = "manifest.json"
OPTIMIZER = "training/optimizer.safetensors"  # inference engines read every *.safetensors beside config.json


def save(
    run: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    tokenizer: Any,
    state: dict[str, Any],
    keep_best: int,
) -> Path:
    """Write the checkpoint of `step` finished steps; keep the last one and the `keep_best` best by state["val_reward"].

    Every rank calls it, rank 0 writes. Raises FailedError on all of them if the disk is full; older
    checkpoints are then untouched.
    """
    weights = dict(_whole(model.state_dict(keep_vars=True).items()))
    moments = dict(_whole(_moments(model, optimizer)))

    def write() -> Path:
        parent = run / "checkpoints"
        folder, partial = parent / f"step-{step:06d}", parent / f".step-{step:06d}.partial"
        try:
            sweep(run)
            partial.mkdir(parents=True)
            cast(Any, model).save_pretrained(partial, state_dict=weights)
            if moments:
                (partial / OPTIMIZER).parent.mkdir()
                save_file(moments, partial / OPTIMIZER)
            tokenizer.save_pretrained(partial)
            (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=2))
            share(partial)
            seal(partial)
            if folder.exists():  # a damaged one
                _remove(folder)
            partial.rename(folder)
            flush(parent)
        except Exception as error:  # Python's, safetensors' and tokenizers' own kinds
            shutil.rmtree(partial, ignore_errors=True)
            needed = sum(
                t.numel() * t.element_size() for t in [*weights.values(), *moments.values()]
            )
            free = shutil.disk_usage(run).free
            raise FailedError(
                f"the checkpoint of step {step} could not be written to {parent}: {error} ({needed / 2**20:.0f} MiB needed, "
                f"{free / 2**20:.0f} MiB free); earlier ones are untouched"
            ) from error
        _prune(folder, keep_best)
        return folder

    return distributed.together(write, only_first=True)


def _whole(tensors: Any) -> Iterator[tuple[str, Tensor]]:
    """Named tensors in full, on rank 0's CPU; one that comes under two names (tied weights), the same both times."""
    first, kept = distributed.rank() == 0, dict[int, Tensor | None]()
    for name, tensor in tensors:
        if id(tensor) not in kept:
            value = distributed.whole(tensor.detach())  # every rank takes part, and rank 0 keeps it
            kept[id(tensor)] = value.cpu().contiguous() if first else None
        own = kept[id(tensor)]
        if own is not None:
            yield name, own


def _moments(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        for key, value in (optimizer.state.get(parameter, {}) if optimizer else {}).items():
            yield f"{name}.{key}", value


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer its state at that checkpoint; the model is loaded from the same folder beforehand.

    Raises FailedError if the two do not name the same parameters: averages that start from 0 would
    be another run.
    """
    places = [folder / OPTIMIZER, folder / Path(OPTIMIZER).name]  # the second is an older version's
    place = next((place for place in places if place.exists()), None)
    if place is None:  # no optimizer step was ever made
        return
    with safe_open(place, "pt") as file:
        names = set(file.keys())
        own = {name for name, _ in model.named_parameters()}
        strange = sorted(name for name in names if name.rpartition(".")[0] not in own)
        if strange:
            raise FailedError(
                f"{folder}: its optimizer state names parameters that this model does not have ({strange[0]}, ...)"
            )
        for name, parameter in model.named_parameters():
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in names]
            values = {key: file.get_tensor(f"{name}.{key}") for key in keys}
            if values:
                placed = {
                    key: value.to(parameter.device)
                    if key == "step"
                    else distributed.shard(value, parameter)
                    for key, value in values.items()
                }
                optimizer.state[parameter] = placed


def state(folder: Path) -> dict[str, Any]:
    """The state.json of a checkpoint."""
    return cast(dict[str, Any], json.loads((folder / "state.json").read_text()))


def seal(folder: Path) -> None:
    """Write the manifest of the files in a folder and flush all of it to the disk."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in paths
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=2))
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def share(folder: Path) -> None:
    """Give the files the permissions that the umask leaves: safetensors writes them for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def flaw(folder: Path) -> str | None:
    """What is wrong with a checkpoint, by its manifest; None if nothing is."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        for name, want in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != want["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {want['size']}"
            if sha256(path) != want["sha256"]:
                return f"{name} is not what was written (sha256)"
        if state(folder)["step"] != int(folder.name.removeprefix("step-")):
            return "state.json is of another step"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} or state.json cannot be used ({type(error).__name__}: {error})"
    return None


def steps(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, good or not."""
    return sorted(run.glob("checkpoints/step-*"), key=lambda f: f.name)


def newest(run: Path) -> Path | None:
    """The newest checkpoint that verifies; None if there was never one. Raises ConfigError if none of them does."""
    found = steps(run)
    for folder in reversed(found):
        reason = flaw(folder)
        if reason is None:
            return folder
        print(
            f"!! {folder} is damaged: {reason}. Looking for an older one",
            file=sys.stderr,
            flush=True,
        )
    if found:
        raise ConfigError(
            f"--log-dir {run}: none of its {len(found)} checkpoints is whole; move checkpoints/ away to start again"
        )
    return None


def set_aside(run: Path, step: int) -> None:
    """Rename checkpoints of later steps than the one that a run goes on from: damaged, they must not pass for the newest."""
    for folder in steps(run):
        if int(folder.name.removeprefix("step-")) > step:
            place = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(place, ignore_errors=True)
            folder.rename(place)


def sweep(run: Path) -> None:
    """Remove what a killed process left half-written or half-removed."""
    for folder in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(folder, ignore_errors=True)


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """See that the disk has a file, or a folder's list of names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _prune(folder: Path, keep_best: int) -> None:
    """Remove all but this checkpoint and the best of the others."""

    def merit(other: Path) -> tuple[float, str]:
        try:
            value = state(other).get("val_reward")
        except (OSError, ValueError):
            value = None
        return float("-inf") if value is None else value, other.name  # of equal ones the newer

    others = [other for other in steps(folder.parent.parent) if other != folder]
    for other in sorted(others, key=merit, reverse=True)[keep_best:]:
        _remove(other)


def _remove(folder: Path) -> None:
    """Renamed first, so that what a kill leaves half-removed is not taken for a damaged checkpoint."""
    gone = folder.with_name(f".{folder.name}.gone")
    folder.rename(gone)
    shutil.rmtree(gone)
