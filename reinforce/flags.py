"""A frozen dataclass becomes the command line: one field a flag, with its group, unit and default in --help."""

import argparse
import dataclasses
import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import field
from typing import Any, NoReturn, TypeVar

from reinforce.errors import ConfigError

C = TypeVar("C")


def flag(default: Any, group: str, help: str, **how: Any) -> Any:
    """A dataclass field that knows its help text; `how` goes to argparse (choices, nargs, type)."""
    return field(default=default, metadata={"group": group, "help": help, **how})


def refuse(
    config: Any,
    needed: Sequence[str] = (),
    positive: Sequence[str] = (),
    not_negative: Sequence[str] = (),
) -> None:
    """Raise ConfigError on a needed field that is None, or on a number out of its range; None passes the other two."""
    for name in needed:
        if getattr(config, name) is None:
            raise ConfigError(f"{spelled(name)} is missing (--help lists every flag)")
    for name in positive:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(
                f"{spelled(name)} is {value}; it must be positive{' and finite' if value == math.inf else ''}"
            )
    for name in not_negative:
        value = getattr(config, name)
        if value is not None and not 0 <= value < math.inf:
            raise ConfigError(
                f"{spelled(name)} is {value}; it must {'be finite' if value == math.inf else 'not be negative'}"
            )


def spelled(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence, as a ConfigError, instead of a page of usage."""
        near: list[str] = []
        if unknown := re.match(r"unrecognized arguments: (--[^ =]+)", message):
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, 1)
        hint = f"did you mean {near[0]}?" if near else "--help lists every flag"
        raise ConfigError(f"{message} ({hint})")


def parse(config: type[C], description: str, argv: Sequence[str] | None = None) -> C:
    """The dataclass, filled from a command line (sys.argv by default) and checked. Raises ConfigError; --help exits.

    A dataclass with a field `preset` has the defaults of each preset in `PRESETS`.
    """
    parser = _Parser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    groups: dict[str, Any] = {}
    for f in dataclasses.fields(config):  # type: ignore[arg-type]
        how = {k: v for k, v in f.metadata.items() if k not in ("group", "help")}
        if f.metadata["group"] not in groups:
            groups[f.metadata["group"]] = parser.add_argument_group(f.metadata["group"])
        group = groups[f.metadata["group"]]
        text = f.metadata["help"].replace("%", "%%")
        if isinstance(f.default, bool):
            group.add_argument(spelled(f.name), action="store_true", help=text)
            continue
        shown = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        if shown not in (None, ""):
            text += f" (default: {shown})"
        how.setdefault("type", _number(str(f.type)))
        how.setdefault(
            "metavar",
            None
            if "choices" in how
            else {int: "N", float: "X", str: "NAME"}.get(how["type"], "NAME"),
        )
        group.add_argument(spelled(f.name), default=f.default, help=text, **how)
    preset = getattr(parser.parse_args(argv), "preset", None)
    parser.set_defaults(**getattr(config, "PRESETS", {}).get(preset, {}))
    values = {
        k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args(argv)).items()
    }
    parsed = config(**values)
    parsed.check()  # type: ignore[attr-defined]
    return parsed


def _number(annotation: str) -> type:
    return int if "int" in annotation else float if "float" in annotation else str
