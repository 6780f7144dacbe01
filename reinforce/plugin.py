"""A function or object of one's own, named on the command line as FILE.py:NAME."""

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinforce.errors import ConfigError


@dataclass(frozen=True)
class Named:
    """What FILE.py:NAME stands for."""

    name: str
    value: Any
    digest: str  # of the name and the file's text, wherever the file is


def load_named(spec: str, flag: str) -> Named:
    """Import the file and take the name out of it. Raises ConfigError."""
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        raise ConfigError(f"{flag} {spec}: no file {path!r}; give FILE.py:NAME")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"{flag} {spec}: {path!r} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        value = getattr(module, name)
    except AttributeError as error:
        raise ConfigError(f"{flag} {spec}: no function {name!r} in {path}") from error
    except Exception as error:  # whatever the file does when it is imported
        raise ConfigError(f"{flag} {spec}: {type(error).__name__}: {error}") from error
    return Named(name, value, hashlib.sha256(f"{name}/".encode() + Path(path).read_bytes()).hexdigest())
