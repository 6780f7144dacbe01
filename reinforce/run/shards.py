"""A model of which a rank reads its own shards alone, as slices of the safetensors files.

    build   the model, its parameters on the meta device, where they have no memory
            (then `tensor_parallel.shard` and `distributed.wrap` cut them into shards)
    read    memory for this rank's shards, and their values from the files

That works where the files hold the model's parameters by name and shape, as `save_pretrained`
writes them. A checkpoint that transformers renames or merges, one with other safetensors files
beside the model's, and one that is no folder, is loaded whole instead.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from reinforce import attention
from reinforce.head import give_float32_logits
from reinforce.logprobs import Scorer
from reinforce.policy import without_dropout
from reinforce.run import distributed


def build(name: str) -> nn.Module | None:
    """The model of a folder without its weights; None if it must be loaded whole."""
    files = _files(Path(name))
    if not files:
        return None
    attention.use_for_models()
    with _parameters_on_meta():
        config = AutoConfig.from_pretrained(name)
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    needed = {key: list(parameter.shape) for key, parameter in model.named_parameters()}
    stored = dict[str, list[int]]()
    for path in files:
        with safe_open(path, "pt") as file:
            stored |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    buffers = model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False))
    if stored != needed or buffers:
        return None
    return give_float32_logits(without_dropout(model))


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a folder; none if transformers would not read exactly these."""
    found = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    read = {"model.safetensors"}
    if not (folder / "model.safetensors").exists() and index.exists():
        read = set(json.loads(index.read_text())["weight_map"].values())
    return found if {path.name for path in found} == read else []


def move(module: nn.Module, device: torch.device) -> None:
    """Move the module to `device`, but for what is on the meta device."""
    module._apply(lambda t: t if t.is_meta else t.to(device))


def read(scorer: Scorer, name: str, device: torch.device) -> None:
    """Read this rank's shards of a model of `build` into memory of `device`.

    One that was loaded whole stays as it is. So do adapters, which have their values.
    """
    missing = [key for key, parameter in scorer.model.named_parameters() if parameter.is_meta]
    if not missing:
        return
    distributed.give_memory(scorer, device)
    parameters = dict(scorer.model.named_parameters())
    # of a weight that stands for two, gate and up, a rank has a part of each
    packed = [key for key in missing if distributed.is_packed(parameters[key])]
    distributed.read_shards({key: parameters[key] for key in missing if key not in packed}, name)
    for path in _files(Path(name)):
        with safe_open(path, "pt") as file:
            for key in sorted(set(packed) & set(file.keys())):
                distributed.fill(parameters[key], file.get_tensor(key))


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """A block in which new parameters have no memory; buffers (tables of angles) are computed."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    cast(Any, nn.Module).register_parameter = on_meta
    try:
        yield
    finally:
        cast(Any, nn.Module).register_parameter = register
