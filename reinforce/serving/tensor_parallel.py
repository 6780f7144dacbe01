"""One reward model over several ranks, by transformers' own tensor-parallel plan of its family.

Each rank reads, keeps and multiplies its part of the weights, as DTensors: some heads of each
attention, some columns of each MLP. Two sums over the ranks a block put the parts together.

See "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism", Shoeybi
et al. (2019, arXiv 1909.08053).
"""

from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig

from reinforce.errors import ConfigError, first_line
from reinforce.hub import refuse_missing_path

FLAG = "--tensor-model-parallel-size"
OLDEST = "5.23"  # the first with DistributedConfig(tp_size=..., dp_replicate_size=...)


def check_version() -> None:
    """Raise ConfigError where transformers is too old for the flag."""
    if Version(transformers.__version__) < Version(OLDEST):
        raise ConfigError(
            f"{FLAG} needs transformers {OLDEST} or newer, and {transformers.__version__} is "
            "installed: upgrade it, or leave the flag out"
        )


def check_model(name: str, size: int, device: torch.device) -> None:
    """Raise ConfigError on a model that transformers cannot split over `size` ranks here."""
    refuse_missing_path(name, "--reward-model")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False).get_text_config()
    except Exception as error:  # a bad file makes transformers raise what it likes
        raise ConfigError(
            f"--reward-model {name}: no config.json that transformers can read "
            f"({first_line(error)})"
        ) from error
    if not getattr(config, "base_model_tp_plan", None):
        raise ConfigError(
            f"{FLAG} {size}: transformers has no tensor-parallel plan for {name} "
            f"({config.model_type}); use --data-parallel alone"
        )
    heads = config.num_attention_heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    for kind, count in (("query", heads), ("key-value", key_value_heads)):
        if count % size:
            raise ConfigError(f"{FLAG} {size} does not divide the {count} {kind} heads of {name}")
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
