"""A frozen dataclass becomes a command line: each field is a flag with group, help and default."""

import argparse
import dataclasses
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, NoReturn, TypeVar

from reinforce.errors import ConfigError

C = TypeVar("C")
LARGEST = 2**63  # of a whole number, excluded
METAVAR: dict[Any, str] = {int: "N", float: "X"}  # what stands for a value in --help; else NAME


def flag(default: Any, group: str, help: str, **options: Any) -> Any:
    """A dataclass field that knows its help text.

    `options` go to argparse: choices, nargs, type.
    """
    return field(default=default, metadata={"group": group, "help": help, **options})


def refuse(
    config: Any,
    needed: Sequence[str] = (),
    positive: Sequence[str] = (),
    not_negative: Sequence[str] = (),
) -> None:
    """Raise ConfigError on a needed field that is None, or on a number out of its range.

    None is neither refused as `positive` nor as `not_negative`.
    """
    for name in needed:
        if getattr(config, name) is None:
            raise ConfigError(f"{spelled(name)} is missing (--help lists every flag)")
    for name in positive:
        value = getattr(config, name)
        if value is not None and not 0 < value < _bound(value):
            need = "be positive" + (f" and {_spoken(value)}" if value > 0 else "")
            raise ConfigError(f"{spelled(name)} is {value}; it must {need}")
    for name in not_negative:
        value = getattr(config, name)
        if value is not None and not 0 <= value < _bound(value):
            need = f"be {_spoken(value)}" if value > 0 else "not be negative"
            raise ConfigError(f"{spelled(name)} is {value}; it must {need}")


def _bound(value: float) -> float:
    return math.inf if isinstance(value, float) else LARGEST


def _spoken(value: float) -> str:
    return "finite" if isinstance(value, float) else "below 2^63"


def spelled(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    elsewhere: Mapping[str, str] = {}  # another script's flags -> where they belong

    def error(self, message: str) -> NoReturn:
        """One sentence, as a ConfigError, instead of a page of usage."""
        hint = "--help lists every flag"
        if unknown := re.match(r"unrecognized arguments: (--[^ =]+)", message):
            if unknown[1] in self.elsewhere:
                hint = self.elsewhere[unknown[1]]
            elif near := difflib.get_close_matches(unknown[1], self._option_string_actions, 1):
                hint = f"did you mean {near[0]}?"
        raise ConfigError(f"{message} ({hint})")


def parse(config: type[C], description: str, argv: Sequence[str] | None = None) -> C:
    """The dataclass, filled from a command line and checked. Raises ConfigError; --help exits.

    Without `argv` the command line is sys.argv. A dataclass with a field `preset` takes its
    defaults from the preset of that name in `PRESETS`. Its `ELSEWHERE` tells where a flag of
    another script belongs.
    """
    parser = _Parser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.elsewhere = getattr(config, "ELSEWHERE", {})
    groups: dict[str, Any] = {}
    for f in dataclasses.fields(config):  # type: ignore[arg-type]
        group = f.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        _add(groups[group], f)
    preset = getattr(parser.parse_args(argv), "preset", None)
    parser.set_defaults(**getattr(config, "PRESETS", {}).get(preset, {}))
    given = vars(parser.parse_args(argv))
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    parsed = config(**values)
    parsed.check()  # type: ignore[attr-defined]
    return parsed


def _add(group: Any, f: "dataclasses.Field[Any]") -> None:
    """Add a field's flag to a group of argparse."""
    text = f.metadata["help"].replace("%", "%%")
    if isinstance(f.default, bool):
        group.add_argument(spelled(f.name), action="store_true", help=text)
        return
    shown = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
    if shown not in (None, ""):
        text += f" (default: {shown})"
    options = {k: v for k, v in f.metadata.items() if k not in ("group", "help")}
    options.setdefault("type", _number(str(f.type)))
    if "choices" not in options:
        options.setdefault("metavar", METAVAR.get(options["type"], "NAME"))
    group.add_argument(spelled(f.name), default=f.default, help=text, **options)


def _number(annotation: str) -> type:
    return int if "int" in annotation else float if "float" in annotation else str
