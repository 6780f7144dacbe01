"""A checkpoint is an ordinary Hugging Face folder, `checkpoints/step-000010`, plus state.json.

It is written beside its place, flushed to the disk and renamed, so a folder of that name is always whole. Weights are the
float32 ones, in safetensors.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any, cast

from torch import nn


def save(run: Path, step: int, model: nn.Module, tokenizer: Any, state: dict[str, Any], keep_best: int) -> Path:
    """Write the checkpoint of `step` finished steps; keep the last one and the `keep_best` best by state["val_reward"]."""
    parent = run / "checkpoints"
    folder, partial = parent / f"step-{step:06d}", parent / f".step-{step:06d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    cast(Any, model).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=2))
    for path in [*partial.iterdir(), partial]:
        _flush(path)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    _flush(parent)
    _prune(parent, keep_best)
    return folder


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _prune(parent: Path, keep_best: int) -> None:
    folders = sorted(parent.glob("step-*"))

    def reward(folder: Path) -> float:
        value = json.loads((folder / "state.json").read_text()).get("val_reward")
        return float("-inf") if value is None else value

    for folder in sorted(folders[:-1], key=reward, reverse=True)[keep_best:]:
        shutil.rmtree(folder)
