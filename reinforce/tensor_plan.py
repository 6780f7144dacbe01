"""Whether a model can be cut over several ranks by transformers' own tensor parallel plan."""

from typing import Any

import transformers

from reinforce.errors import ConfigError

FLAG = "--tensor-model-parallel-size"
OLDEST = (5, 23)  # transformers before that has no plan for one axis of a mesh of ranks


def refuse_version(size: int) -> None:
    """Raise ConfigError where transformers is too old for the flag."""
    if tuple(int(n) for n in transformers.__version__.split(".")[:2]) < OLDEST:
        raise ConfigError(
            f"{FLAG} {size} needs transformers 5.23 or newer, and this is "
            f"{transformers.__version__}; install a newer one, or leave the flag out"
        )


def refuse_model(config: Any, size: int, where: str, instead: str) -> None:
    """Raise ConfigError if the model of this configuration cannot be cut over `size` ranks.

    `where` is the model's flag and value, `instead` another flag to take.
    """
    text = config.get_text_config()
    if not getattr(text, "base_model_tp_plan", None):
        raise ConfigError(
            f"{where}: transformers has no tensor parallel plan for a {text.model_type} model; "
            f"leave {FLAG} out, or take {instead}"
        )
    heads = text.num_attention_heads
    kinds = {"query heads": heads, "KV heads": getattr(text, "num_key_value_heads", None) or heads}
    for kind, count in kinds.items():
        if count % size:
            raise ConfigError(f"{FLAG} {size} does not divide the {count} {kind} of {where}")
