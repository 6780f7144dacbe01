"""What may be asked for on the Hugging Face hub: a path that is missing here is no hub id."""

import re
from pathlib import Path

from reinforce.errors import ConfigError


def may_be_hub_id(name: str) -> bool:
    """Whether a name has the form `name` or `owner/name` of the hub, and its owner is no folder here.

    >>> [may_be_hub_id(n) for n in ("gpt2", "org/model-1.5", "runs/x/policy", "./gpt2", "gpt2/", "~/m")]
    [True, True, False, False, False, False]
    """
    part = r"\w[\w.-]*"
    return bool(re.fullmatch(f"{part}(/{part})?", name)) and not (
        "/" in name and Path(name).parent.is_dir()
    )


def refuse_missing_path(name: str, flag: str) -> None:
    """Raises ConfigError on a model that is no folder here and that the hub cannot have either."""
    if Path(name).is_file():
        raise ConfigError(f"{flag} {name}: a file; give the folder that holds config.json")
    if not Path(name).is_dir() and not may_be_hub_id(name):
        raise ConfigError(f"{flag} {name}: no such folder")
