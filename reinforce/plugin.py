"""A function or object of one's own, named on the command line as FILE.py:NAME."""

import hashlib
import importlib.util
import sys
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
    """Import the file, which may import its neighbours, and take the name out of it. Raises ConfigError."""
    path, colon, name = spec.rpartition(":")
    if not colon or name.endswith(".py"):
        raise ConfigError(f"{flag} {spec}: which name in it? Give {spec}:NAME")
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{flag} {spec}: no file {path!r}; give FILE.py:NAME")
    module_spec = importlib.util.spec_from_file_location(f"own_{file.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"{flag} {spec}: {path!r} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses look there
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # whatever the file does when it is imported
        raise ConfigError(f"{flag} {spec}: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        raise ConfigError(f"{flag} {spec}: no function {name!r} in {path}")
    return Named(
        name,
        getattr(module, name),
        hashlib.sha256(f"{name}/".encode() + file.read_bytes()).hexdigest(),
    )
