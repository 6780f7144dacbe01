"""The folder of a run: opened for this run alone, which its identity names."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
import transformers

from reinforce import own_baseline
from reinforce.errors import ConfigError
from reinforce.run import checkpoint, distributed, resume
from reinforce.run.config import TrainConfig
from reinforce.run.folder import new_run_folder, point_latest
from reinforce.run.setup import Inputs


def open_run_folder(inputs: Inputs, name: str) -> tuple[Path, dict[str, Any]]:
    """The run folder, the same on every rank, and the run's identity, which `begin_run` writes.

    `name` is part of the name of a new folder if there is no --log-dir. Writes config.json. The
    logs of a run that goes on are cut back to the step of its checkpoint, and half-written
    checkpoints of a killed process are removed. Raises ConfigError if the folder holds another run.
    """
    config = inputs.config

    def opened() -> tuple[Path, dict[str, Any]]:
        identity = identity_of(inputs)
        folder = new_run_folder(config.log_dir, name)
        resume.check_identity(folder, identity)
        facts = {
            **dataclasses.asdict(config),
            **_absolute(config),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        try:
            for log in resume.LOGS:
                if (folder / log).exists():
                    (folder / log).open("a").close()
            partial = folder / f".config.{os.getpid()}"
            partial.write_text(json.dumps(facts, indent=2))
            partial.replace(folder / "config.json")
            checkpoint.sweep(folder)
            checkpoint.set_aside(folder, inputs.start.step)
            resume.truncate_logs(folder, inputs.start.step)
            resume.drop_part_of_validation(folder, len(inputs.data.held_out))
        except (PermissionError, IsADirectoryError) as error:
            raise ConfigError(
                f"{error.filename}: cannot be written ({error.strerror}); give another --log-dir"
            ) from error
        return folder, identity

    return distributed.together(opened, only_first=True)


def _absolute(config: TrainConfig) -> dict[str, str]:
    """Policy and prompts of a run by their whole paths, for who reads them in another folder.

    A name that is no path here, such as a hub id, is left out.
    """
    named = {name: getattr(config, name) for name in ("policy", "train_data", "val_data")}
    return {
        name: str(Path(value).absolute())
        for name, value in named.items()
        if value is not None and (Path(value).exists() or Path(value.partition(":")[0]).exists())
    }


def identity_of(inputs: Inputs) -> dict[str, Any]:
    """What makes this run this run: its flags, and digests of what they name."""
    config, data = inputs.config, inputs.data
    total = data.total_steps(config.max_steps, config.max_epochs)
    constant = config.min_lr in (None, config.lr)  # else the rate depends on the last step
    return resume.identity(
        config,
        baseline=own_baseline.identity(config.baseline),
        policy=resume.weights(inputs.policy),
        date=inputs.start.date,
        reward_model=inputs.client.fingerprint,
        end_ids=inputs.end_ids,
        prompts=resume.digest([[p.ids, p.text, p.label] for p in data.prompts]),
        held_out=resume.digest([[p.ids, p.text, p.label] for p in data.held_out]),
        prompt_lines=resume.digest(
            [[p.index, p.messages] for p in [*data.prompts, *data.held_out]]
        ),
        total_steps=None if constant else total,
    )


def begin_run(folder: Path, identity: dict[str, Any]) -> None:
    """Let the folder hold this run from here on: the models have passed every check."""

    def begun() -> None:
        resume.write_identity(folder, identity)
        point_latest(folder)

    distributed.together(begun, only_first=True)
