"""The folder of a LoRA adapter, in the form of the PEFT library.

    adapter_config.json           rank, alpha, names of the layers, name of the base model
    adapter_model.safetensors     A and B of each layer, float32

The weights of the base model are not in it: the base must stay where it is. See
https://huggingface.co/docs/peft. Left out: PEFT's other methods and LoRA's variants in it.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reinforce import lora
from reinforce.errors import ConfigError, first_line

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# what a checkpoint of plain LoRA leaves empty
VARIANTS = """
    use_dora use_rslora rank_pattern alpha_pattern modules_to_save lora_bias layer_replication
    target_parameters trainable_token_indices
""".split()  # noqa: SIM905


def is_adapter(name: str) -> bool:
    """Whether a policy's name is an adapter's folder, which has no config.json of a model."""
    folder = Path(name)
    return (folder / CONFIG).is_file() and not (folder / "config.json").exists()


def base_of(name: str, flag: str = "--policy") -> str:
    """The base model of an adapter's folder; any other name as it is. Raises ConfigError."""
    if not is_adapter(name):
        return name
    base = _settings(name, flag).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{flag} {name}: its {CONFIG} names no base_model_name_or_path")
    if os.path.isabs(base) and not Path(base).is_dir():
        raise ConfigError(
            f"{flag} {name}: an adapter of {base}, which is no folder here; "
            f"put the base model there, or its new path into {CONFIG}"
        )
    if is_adapter(base):
        raise ConfigError(f"{flag} {name}: an adapter of another adapter, {base}; merge that first")
    return base


def refuse(name: str, flag: str) -> None:
    """Raise ConfigError on an adapter's folder where an ordinary model is needed."""
    if is_adapter(name):
        raise ConfigError(
            f"{flag} {name}: an adapter of {base_of(name, flag)}; make an ordinary folder of it "
            f"first: python recipes/merge.py --policy {name} --out FOLDER"
        )


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """A and B of each adapter of the model, by PEFT's names."""
    found = lora.adapters(model).items()
    return {
        f"{PREFIX}{name}.lora_{side}.weight": value
        for name, adapter in found
        for side, value in adapter.named_parameters()
    }


def write(model: nn.Module, folder: Path, values: dict[str, Tensor]) -> None:
    """Write an adapted model's adapter; `values` are its `tensors`, whole and on the CPU."""
    adapted = lora.adapters(model)
    one = next(iter(adapted.values()))
    base = str(model.name_or_path)
    last = {lora.last_name(name) for name in adapted}
    alike = {name for name, _ in model.named_modules() if lora.last_name(name) in last}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": os.path.abspath(base) if Path(base).is_dir() else base,
        "r": one.A.shape[0],
        "lora_alpha": one.alpha,
        "target_modules": sorted(last if alike == adapted.keys() else adapted),
        "fan_in_fan_out": one.transposed,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(settings, indent=2))
    save_file(values, folder / WEIGHTS, {"format": "pt"})


@torch.no_grad()
def read(model: nn.Module, name: str, flag: str = "--policy") -> None:
    """Give an adapted model the values of an adapter's folder. Raises ConfigError."""
    stored, wanted = _weights(name, flag), tensors(model)
    shapes = [{key: tuple(value.shape) for key, value in x.items()} for x in (stored, wanted)]
    if shapes[0] != shapes[1]:
        odd = min(dict(shapes[0].items() ^ shapes[1].items()))
        raise ConfigError(f"{flag} {name}: {odd} does not fit the base model's layer of this name")
    for key, value in wanted.items():
        value.copy_(stored[key])


def merge_into(model: nn.Module, name: str, flag: str) -> None:
    """Add an adapter's folder to the weights of its base model. Raises ConfigError."""
    settings, known = _settings(name, flag), dict(model.named_modules())
    found = {key.removeprefix(PREFIX).partition(".lora_")[0] for key in _weights(name, flag)}
    foreign = [layer for layer in sorted(found) if not isinstance(known.get(layer), lora.LINEAR)]
    if foreign:
        raise ConfigError(f"{flag} {name}: its base model has no linear layer {foreign[0]}")
    lora.add(model, sorted(found), settings["r"], settings["lora_alpha"], seed=0)
    read(model, name, flag)
    lora.merge(model)


def _settings(name: str, flag: str) -> dict[str, Any]:
    """The adapter's configuration. Raises ConfigError unless it is one of plain LoRA."""
    try:
        found: dict[str, Any] = json.loads((Path(name) / CONFIG).read_text())
        odd = [key for key in VARIANTS if found.get(key)]
        plain = found["peft_type"] == "LORA" and found.get("bias", "none") == "none" and not odd
        plain = plain and int(found["r"]) > 0 and float(found["lora_alpha"]) > 0
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{flag} {name}: its {CONFIG} cannot be used ({type(error).__name__}: {error})"
        ) from error
    if not plain:
        raise ConfigError(
            f"{flag} {name}: its {CONFIG} is not one of plain LoRA "
            f"({', '.join(odd) or 'peft_type, bias, r or lora_alpha'}); merge it with PEFT"
        )
    return found


def _weights(name: str, flag: str) -> dict[str, Tensor]:
    try:
        return load_file(Path(name) / WEIGHTS)
    except Exception as error:  # Python and safetensors raise different kinds
        raise ConfigError(
            f"{flag} {name}: its {WEIGHTS} cannot be read ({first_line(error)})"
        ) from error
