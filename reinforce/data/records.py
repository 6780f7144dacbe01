"""Records in: each line or row of a source, checked; a bad one is named, or left out."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

from reinforce.data.files import BadLineError, BadSourceError
from reinforce.data.sources import items
from reinforce.errors import ConfigError

__all__ = ["BadLineError", "columns", "must_be_unicode", "read_records"]

T = TypeVar("T")


def columns(record: dict[str, Any]) -> str:
    """The names in a record, as errors list them.

    >>> columns({"question": "2 + 2?", "answer": "4"})
    'it has "question", "answer"'
    """
    return "it has " + (", ".join(f'"{key}"' for key in record) or "nothing")


def must_be_unicode(key: str, value: Any) -> None:
    """Raise BadLineError on half of a surrogate pair, which JSON can spell and UTF-8 cannot.

    `value` is a text, or messages and whatever texts they hold.
    """
    try:
        json.dumps(value, ensure_ascii=False, skipkeys=True, default=str).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise BadLineError(f'"{key}" holds half of a surrogate pair, {half!r}') from error


def read_records(
    source: str,
    flag: str,
    check: Callable[[Any], T],
    skip_bad_lines: bool = False,
    what: str = "prompts",
) -> tuple[list[T], int]:
    """What `check` makes of each line or row, and how many bad ones were skipped.

    `sources` says what a source may be. A value that is null counts as absent. `check` raises
    BadLineError. Raises ConfigError naming file and line.
    """
    records: list[T] = []
    bad: list[str] = []
    try:
        for where, value in items(source, flag):
            try:
                records.append(check(present(value)))
            except BadLineError as error:
                bad.append(f"{where}: {error}")
                if not skip_bad_lines:
                    raise ConfigError(
                        f"{bad[0]} ({flag}; --skip-bad-lines leaves such lines out)"
                    ) from error
    except BadSourceError as error:
        raise ConfigError(f"{flag} {error}") from error
    if not records:
        reason = f"; all {len(bad)} lines are bad, the first: {bad[0]}" if bad else ""
        raise ConfigError(f"{flag} {source}: no {what} in it{reason}")
    return records, len(bad)


def present(value: Any) -> Any:
    """The value of a line without what is null, a table's empty cells. Raises BadLineError."""
    if isinstance(value, BadLineError):
        raise value
    if isinstance(value, dict):
        return {key: cell for key, cell in value.items() if cell is not None}
    return value
