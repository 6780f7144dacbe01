"""Text that a model wrote, made safe for a screen: a terminal would obey its control characters.

What is shown is one line or a few, of known width. Files keep the text as it is.
"""

import os
import sys
import unicodedata
from typing import TextIO

USUAL_COLUMNS = 80  # of what is no terminal, or a terminal that does not know its size


def columns_of(stream: TextIO) -> int:
    """Width of the terminal behind a stream, in cells."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or USUAL_COLUMNS
    except (OSError, ValueError):  # a pipe, a file, a buffer of a test
        return USUAL_COLUMNS


def escaped(text: str, encoding: str | None = None) -> str:
    r"""The text on one line: Python's escapes for what does not print or is not in the encoding.

    The encoding is standard output's unless it is given.

    >>> print(escaped("two\nlines, \x1b[31mred"))
    two\nlines, \x1b[31mred
    """
    encoding = encoding or sys.stdout.encoding or "utf-8"
    known = text.encode(encoding, "backslashreplace").decode(encoding)
    return "".join(c if _prints(c) else c.encode("unicode_escape").decode() for c in known)


def _prints(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"


def cells(text: str) -> int:
    """Columns of a terminal that a text takes: two a wide character, none a combining one.

    >>> cells("漢字"), cells("cafe\u0301")
    (4, 4)
    """
    return sum(_cells(character) for character in text)


def _cells(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def wrapped(text: str, columns: int, lines: int) -> list[str]:
    """An escaped text in at most so many lines of so many columns, each; "..." where it was cut.

    Lines are broken between words, and inside a word that is longer than a line.

    >>> wrapped("the crust was superb and the sauce was stale", 16, 2)
    ['the crust was', 'superb and th...']
    """
    rows: list[str] = []
    rest = text.strip(" ")
    while rest:
        row = _fitting(rest, columns)
        if len(row) < len(rest):
            if len(rows) == lines - 1:
                return [*rows, _fitting(rest, columns - 3) + "..."]
            between = (row + rest[len(row)]).rfind(" ")
            row = row[:between] if between > 0 else row
        rows.append(row.rstrip(" "))
        rest = rest[len(row) :].lstrip(" ")
    return rows


def _fitting(text: str, columns: int) -> str:
    """The longest beginning of so many columns; a heap of combining marks counts as well."""
    width, end = 0, 0
    for end, character in enumerate(text[: 2 * columns + 1]):
        width += _cells(character)
        if width > columns or end == 2 * columns:
            return text[: max(end, 1)]
    return text[: end + 1]
