"""Which names the Hugging Face hub may be asked for: the path of a missing file is no hub id."""

import os
import re
from pathlib import Path

from reinforce.errors import ConfigError


def may_be_hub_id(name: str) -> bool:
    """Whether a name that is no file here has the hub's form, NAME or OWNER/NAME.

    A path has more slashes, begins with . or ~, or is in a folder that exists.

    >>> [may_be_hub_id(n) for n in ("gpt2", "org/model-1.5", "runs/x/policy", "./gpt2", "gpt2/")]
    [True, True, False, False, False]
    """
    owner, slash, _ = name.partition("/")
    like_an_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII) is not None
    return like_an_id and len(name) <= 96 and not (slash and Path(owner).exists())


def refuse_missing_path(name: str, flag: str) -> None:
    """Raise ConfigError on a model that is no folder here and that the hub cannot have either.

    A run folder is no model; its checkpoints are.
    """
    if os.path.isfile(name):  # pathlib's raises for a name that is too long
        raise ConfigError(f"{flag} {name}: a file; give the folder that holds config.json")
    if not os.path.isdir(name):
        if not may_be_hub_id(name):
            raise ConfigError(f"{flag} {name}: no such folder")
        return
    saved = sorted(Path(name).glob("checkpoints/step-*"))
    if saved and (Path(name) / "identity.json").exists():
        raise ConfigError(f"{flag} {name}: a run folder; give a policy that it saved, {saved[-1]}")
