"""A function or object of one's own, named on the command line as FILE.py:NAME.

The file's folder stands last in the search path, so the file may import its neighbours, when it is
loaded and later. No neighbour hides a module that is installed or part of Python.
"""

import difflib
import hashlib
import importlib.util
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from reinforce.errors import ConfigError

SHOWN = 300  # characters of an error's text


@dataclass(frozen=True)
class Named:
    """What FILE.py:NAME stands for."""

    name: str
    value: Any
    digest: str  # of the name and the file's text, wherever the file is
    file: Path


def load_named(spec: str, flag: str) -> Named:
    """Import the file and take the name out of it. Raises ConfigError."""
    path, colon, name = spec.rpartition(":")
    if not colon or name.endswith(".py"):
        path, name = spec, ""
    file = Path(path)
    if not os.path.isfile(file):
        raise ConfigError(f"{flag} {spec}: no file {path!r}; give FILE.py:NAME")
    source = _read(file, f"{flag} {spec}")
    module = _run(source, file, f"{flag} {spec}")
    names = _names(module)
    listed = f"it has {', '.join(names[:8])}" if names else "it has none"
    if not name:
        raise ConfigError(f"{flag} {spec}: which name in it? Give {path}:NAME ({listed})")
    if not hasattr(module, name):
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]}?" if close else listed
        raise ConfigError(f"{flag} {spec}: no function {name!r} in {path}; {hint}")
    digest = hashlib.sha256(f"{name}/".encode() + source).hexdigest()
    return Named(name, getattr(module, name), digest, file)


def _read(file: Path, what: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{what}: {str(file)!r} cannot be read ({error.strerror})") from error


def _run(source: bytes, file: Path, what: str) -> ModuleType:
    """The module of a file whose text is `source`.

    Not by the import system, which may take what it has compiled of an earlier text of the same
    length and time.
    """
    spec = importlib.util.spec_from_file_location(f"own_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{what}: {str(file)!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        exec(compile(source, spec.origin or file, "exec"), vars(module))
    except (Exception, SystemExit) as error:  # whatever the file does when it is imported
        raise ConfigError(f"{what}: {blame(error, file)}") from error
    return module


def _names(module: ModuleType) -> list[str]:
    """What can be called and was made in this file."""
    return [
        name
        for name, value in vars(module).items()
        if callable(value)
        and not isinstance(value, type)
        and not name.startswith("_")
        and getattr(value, "__module__", None) == module.__name__
    ]


def blame(error: BaseException, file: Path) -> str:
    """An error in one line that names the file's own last line on the way to it, but no folder.

    >>> blame(KeyError("answer"), Path("folder/rewards.py"))
    "rewards.py: KeyError: 'answer'"
    """
    frames = traceback.walk_tb(error.__traceback__)
    lines = [n for frame, n in frames if _same(frame.f_code.co_filename, file)]
    text = str(error)
    if isinstance(error, SyntaxError) and error.filename and _same(error.filename, file):
        lines, text = [error.lineno or 1], error.msg
    where = f"{file.name} line {lines[-1]}" if lines else file.name
    said = " ".join([f"{type(error).__name__}:", *text.split()])
    return f"{where}: {said if len(said) <= SHOWN else said[:SHOWN] + ' ...'}".rstrip(": ")


def _same(name: str, file: Path) -> bool:
    return Path(name).name == file.name and Path(name).resolve() == file.resolve()
