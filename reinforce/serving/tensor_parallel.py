"""One reward model over several ranks, by transformers' own tensor-parallel plan of its family.

Each rank reads, keeps and multiplies its part of the weights, as DTensors: some heads of each
attention, some columns of each MLP. Two sums over the ranks a block put the parts together.

See "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism", Shoeybi
et al. (2019, arXiv 1909.08053).
"""

import importlib.util
from typing import Any

import torch
from transformers import AutoConfig

from reinforce.errors import ConfigError, first_line
from reinforce.tensor_plan import FLAG, refuse_model


def check_model(name: str, size: int, device: torch.device) -> None:
    """Raise ConfigError on a model that transformers cannot split over `size` ranks here."""
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # a bad file makes transformers raise what it likes
        raise ConfigError(
            f"--reward-model {name}: no config.json that transformers can read "
            f"({first_line(error)})"
        ) from error
    refuse_model(config, size, f"--reward-model {name}", "--data-parallel alone")
    if importlib.util.find_spec("accelerate") is None:  # transformers loads a plan through it
        raise ConfigError(f"{FLAG} {size} needs the package accelerate: pip install accelerate")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and accelerator.type != device.type:
        raise ConfigError(
            f"--device {device.type}: transformers splits a model over the {accelerator.type} "
            f"devices that it sees; hide them, or leave {FLAG} out"
        )


def split(size: int, copies: int) -> Any:
    """transformers' configuration of `copies` copies of a model, each on `size` ranks."""
    from transformers.distributed import DistributedConfig

    class Copies(DistributedConfig):  # type: ignore[misc]
        """Copies that never speak to each other; transformers would wrap each of them in FSDP."""

        dp_size = 1

    return Copies(tp_size=size, dp_replicate_size=copies)
