"""A checkpoint: a Hugging Face folder `checkpoints/step-000010` from which a run goes on, bitwise.

    model*.safetensors, config.json,   the float32 weights, gathered from all ranks,
        tokenizer                      tied weights once; with LoRA adapter_model.safetensors and
                                       adapter_config.json instead
    training/optimizer.safetensors     AdamW's two averages and step, by the parameter's name
    state.json                         step, validation reward, state of the baseline, precision,
                                       number of refused responses
    manifest.json                      size and sha256 of all of these

Prompt order, learning rate and random numbers are functions of the step: nothing else is kept.
A checkpoint is written to a folder of another name, flushed to the disk and renamed, so it is
complete once it has its name. Damage done later by the disk shows in the manifest. Left out:
shards written by every rank (one copy of the model must fit into rank 0's memory).
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

from reinforce import adapter
from reinforce.errors import ConfigError, FailedError
from reinforce.run import distributed, offload
from reinforce.run.folder import checkpoints_of

MANIFEST = "manifest.json"
# in a folder of its own: inference engines read every *.safetensors beside config.json
OPTIMIZER = "training/optimizer.safetensors"


def save(
    run: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    tokenizer: Any,
    state: dict[str, Any],
    keep_best: int,
    rewards: dict[int, float],
) -> Path:
    """Write the checkpoint of `step` finished steps, and remove older ones that are not kept.

    Kept are this one and, by the validation `rewards` after their steps, the `keep_best` best of
    the others. Every rank calls it, and rank 0 writes. Raises FailedError on all ranks if rank 0
    cannot write (the disk is full, for one); older checkpoints are then untouched.
    """
    adapted = adapter.tensors(model)  # empty without LoRA
    weights = dict(_gather_tensors((adapted or model.state_dict(keep_vars=True)).items()))
    moments = dict(_gather_tensors(_moments(model, optimizer)))

    def write() -> Path:
        parent = run / "checkpoints"
        folder, partial = parent / f"step-{step:06d}", parent / f".step-{step:06d}.partial"
        try:
            sweep(run)
            partial.mkdir(parents=True)
            if adapted:
                adapter.write(model, partial, weights)
            else:
                cast(Any, model).save_pretrained(partial, state_dict=weights)
            if moments:
                (partial / OPTIMIZER).parent.mkdir()
                save_file(moments, partial / OPTIMIZER)
            tokenizer.save_pretrained(partial)
            (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=2))
            share(partial)
            seal(partial)
            if folder.exists():  # a damaged checkpoint of the same step
                _remove(folder)
            partial.rename(folder)
            flush(parent)
        except Exception as error:  # Python, safetensors and tokenizers raise different kinds
            shutil.rmtree(partial, ignore_errors=True)
            needed = sum(t.nbytes for t in [*weights.values(), *moments.values()])
            free = shutil.disk_usage(run).free
            raise FailedError(
                f"the checkpoint of step {step} could not be written to {parent}: {error} "
                f"({needed / 2**20:.0f} MiB needed, {free / 2**20:.0f} MiB free). Earlier "
                f"checkpoints are untouched: remove the cause, then give the same command "
                f"with --log-dir {run}"
            ) from error
        try:
            _prune(folder, keep_best, rewards)
        except OSError as error:
            print(f"!! an older checkpoint could not be removed: {error}", file=sys.stderr)
        return folder

    return distributed.together(write, only_first=True)


def _gather_tensors(tensors: Any) -> Iterator[tuple[str, Tensor]]:
    """Named tensors without shards, on the CPU of rank 0; other ranks get none.

    A tensor with two names (tied weights) is gathered once: both names get the same object.
    """
    is_first, kept = distributed.rank() == 0, dict[int, Tensor | None]()
    for name, tensor in tensors:
        if id(tensor) not in kept:
            full = distributed.gather_tensor(tensor.detach())  # a collective call of all ranks
            kept[id(tensor)] = full.cpu().contiguous() if is_first else None
        value = kept[id(tensor)]
        if value is not None:
            yield name, value


def _moments(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> Iterator[tuple[str, Tensor]]:
    """What the optimizer keeps of each parameter; nothing before the first optimizer step."""
    for name, parameter in model.named_parameters():
        for key, value in (optimizer.state.get(parameter, {}) if optimizer else {}).items():
            yield f"{name}.{key}", value


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer its state at a checkpoint from which the model has been loaded already.

    Raises FailedError if the file names a parameter that the model does not have: averages that
    start from 0 would be another run.
    """
    # older versions wrote the file beside config.json
    candidates = [folder / OPTIMIZER, folder / Path(OPTIMIZER).name]
    path = next((path for path in candidates if path.exists()), None)
    if path is None:  # no optimizer step was ever made
        return
    parameters = dict(model.named_parameters())
    with safe_open(path, "pt") as file:
        saved = set(file.keys())
        foreign = sorted(name for name in saved if name.rpartition(".")[0] not in parameters)
        if foreign:
            raise FailedError(
                f"{path} names parameters that the model of this checkpoint does not have "
                f"({foreign[0]}, ...); move {folder} away to go on from an older checkpoint"
            )
        for name, parameter in parameters.items():
            values = dict[str, Tensor]()
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"{name}.{key}" in saved:
                    value = file.get_tensor(f"{name}.{key}").clone()  # else a page of the file
                    if key == "step":
                        values[key] = value.to(parameter.device)
                    else:
                        values[key] = distributed.shard_like(parameter, value)
            if values:
                optimizer.state[parameter] = values
                offload.park(optimizer, parameter)


def state(folder: Path) -> dict[str, Any]:
    """The state.json of a checkpoint."""
    return cast(dict[str, Any], json.loads((folder / "state.json").read_text()))


def seal(folder: Path) -> None:
    """Write the manifest of the files in a folder, and flush the whole folder to the disk."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in paths
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=2))
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def share(folder: Path) -> None:
    """Give the files of a folder the permissions that the umask leaves.

    safetensors writes files that their owner alone can read.
    """
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def flaw(folder: Path) -> str | None:
    """What is wrong with a checkpoint, by its manifest; None if nothing is wrong."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        for name, written in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != written["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {written['size']}"
            if sha256(path) != written["sha256"]:
                return f"{name} is not what was written (sha256)"
        if state(folder)["step"] != int(folder.name.removeprefix("step-")):
            return "state.json is of another step"
    except PermissionError as error:  # it is not damaged
        raise ConfigError(f"{error.filename}: cannot be read ({error.strerror})") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} or state.json cannot be used ({type(error).__name__}: {error})"
    return None


def newest(run: Path) -> Path | None:
    """The newest undamaged checkpoint; None if the run has no checkpoint.

    A damaged one is reported on stderr. Raises ConfigError if all are damaged.
    """
    found = checkpoints_of(run)
    for folder in reversed(found):
        reason = flaw(folder)
        if reason is None:
            return folder
        warning = f"!! {folder} is damaged: {reason}. Looking for an older one"
        print(warning, file=sys.stderr, flush=True)
    if found:
        raise ConfigError(
            f"{run}: all of its checkpoints ({len(found)}) are damaged; without {run}/checkpoints "
            "train.py starts this run again from step 0"
        )
    return None


def set_aside(run: Path, step: int) -> None:
    """Rename the checkpoints after `step`, from which a run goes on, to damaged-*.

    They are damaged, and must not be taken for the newest ones later.
    """
    for folder in checkpoints_of(run):
        if int(folder.name.removeprefix("step-")) > step:
            renamed = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(renamed, ignore_errors=True)
            folder.rename(renamed)


def sweep(run: Path) -> None:
    """Remove checkpoints that a killed process has left half-written or half-removed."""
    for folder in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(folder, ignore_errors=True)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Wait until the disk has the bytes of a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(folder: Path, keep_best: int, rewards: dict[int, float]) -> None:
    """Remove all checkpoints but this one and the `keep_best` best of the others."""

    def merit(other: Path) -> tuple[float, int]:
        """The validation reward; of two equal ones the newer checkpoint is better."""
        step = int(other.name.removeprefix("step-"))
        return rewards.get(step, float("-inf")), step

    others = [other for other in checkpoints_of(folder.parent.parent) if other != folder]
    for other in sorted(others, key=merit, reverse=True)[keep_best:]:
        _remove(other)


def _remove(folder: Path) -> None:
    """Remove a checkpoint under another name.

    A kill then leaves nothing half-removed that could be taken for a damaged checkpoint.
    """
    renamed = folder.with_name(f".{folder.name}.gone")
    folder.rename(renamed)
    shutil.rmtree(renamed)
