"""One data file in, its lines or rows out: JSON lines, a JSON list, CSV or parquet.

All but parquet may be packed with gzip. Each line or row comes with the words that name it in an
error. CSV is read by hand, since every cell is text: "007" stays "007". A file with any other
ending counts as JSON lines. Nothing is cached and nothing is written.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
DELIMITERS = {".csv": ",", ".tsv": "\t"}


class BadLineError(ValueError):
    """One line or row that cannot be used."""


class BadSourceError(ValueError):
    """A file, folder or data set that cannot be read at all; its text names the place."""


Item = tuple[str, Any]  # the name of a line or row, and its value, a BadLineError if it has none


def ending(path: str) -> str:
    """What tells the form of a file.

    >>> ending("data/Prompts.CSV.gz")
    '.csv'
    """
    return Path(path.lower().removesuffix(".gz")).suffix


def read_file(path: str) -> Iterator[Item]:
    """Everything in a file, in order. Raises BadSourceError."""
    form = ending(path)
    try:
        if form == ".parquet":
            yield from parquet_rows(path)
        elif form in DELIMITERS:
            yield from csv_rows(path, DELIMITERS[form])
        elif form == ".json":
            yield from json_rows(path)
        else:
            with opened(path) as file:
                yield from json_lines(path, file)
    except (OSError, EOFError, zlib.error) as error:
        raise BadSourceError(f"{path}: cannot be read ({error})") from error


def opened(path: str) -> IO[bytes]:
    """The bytes of a file, unpacked."""
    return cast(IO[bytes], gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb"))


def json_lines(path: str, file: Iterator[bytes] | IO[bytes]) -> Iterator[Item]:
    r"""One value a line; blank lines count, but hold nothing, and \r\n ends a line as \n does."""
    for number, line in enumerate(file, 1):
        if line.strip():
            yield f"{path} line {number}", parse_line(line.rstrip(b"\r\n"))


def parse_line(line: bytes) -> Any:
    """The JSON value of one line, or a BadLineError with the reason."""
    if line.startswith(b"\xef\xbb\xbf"):
        return BadLineError("a byte order mark; save the file as UTF-8 without one")
    try:
        return json.loads(line.decode(), object_pairs_hook=_no_duplicate_keys)
    except BadLineError as error:
        return error
    except (ValueError, RecursionError) as error:
        return BadLineError(f"not JSON ({error})")


def _no_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise BadLineError("the same key twice")
    return dict(pairs)


def json_rows(path: str) -> Iterator[Item]:
    """The objects of a JSON list; what is no list is read as JSON lines. Raises BadSourceError."""
    with opened(path) as file:
        content = file.read()
    if content.lstrip().startswith(b"["):
        yield from json_list(path, content)
        return
    lines = content.splitlines(keepends=True)
    if len(lines) > 1 and is_json_object(content):
        raise BadSourceError(
            f"{path}: one object; it must be a list of objects, or one object a line"
        )
    yield from json_lines(path, iter(lines))


def is_json_object(content: bytes) -> bool:
    """Whether a whole file is one JSON object."""
    try:
        return isinstance(json.loads(content), dict)
    except (ValueError, RecursionError):
        return False


def json_list(path: str, content: bytes) -> Iterator[Item]:
    """The elements of a list, decoded one by one: an error names its row. Raises BadSourceError."""
    twice: list[str] = []  # keys that an object of this row has twice

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            twice.append("")
        return value

    decoder = json.JSONDecoder(object_pairs_hook=checked)
    row = 0
    try:
        text = content.decode()
        end = _after_spaces(text, text.index("[") + 1)
        while text[end : end + 1] != "]":
            row += 1
            twice.clear()
            value, end = decoder.raw_decode(text, end)
            end = _after_spaces(text, end)
            if text[end : end + 1] == ",":
                end = _after_spaces(text, end + 1)
            elif text[end : end + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, end)
            yield f"{path} row {row}", BadLineError("the same key twice") if twice else value
        if text[end + 1 :].strip():
            raise json.JSONDecodeError("Extra data after the list", text, end + 1)
    except UnicodeDecodeError as error:
        raise BadSourceError(f"{path}: not UTF-8 ({error})") from error
    except (ValueError, RecursionError) as error:
        raise BadSourceError(f"{path} row {row}: not JSON ({error})") from error


def _after_spaces(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\r", "\n"):
        position += 1
    return position


def csv_rows(path: str, delimiter: str) -> Iterator[Item]:
    """Rows of a table whose first line names the columns. Raises BadSourceError."""
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is shorter than some conversations
    with opened(path) as file:
        # Excel begins a file with a byte order mark
        lines = (
            line.decode("utf-8" if number else "utf-8-sig") for number, line in enumerate(file)
        )
        table = csv.reader(lines, delimiter=delimiter, strict=True)
        columns: list[str] = []
        first = 1  # line of a row: its cells may hold further ones
        try:
            for cells in table:
                where, first = f"{path} line {first}", table.line_num + 1
                if not cells:  # a blank line
                    continue
                if not columns:
                    columns = cells
                    if len(set(columns)) < len(columns):
                        raise BadSourceError(f"{where}: the same column twice ({columns})")
                elif len(cells) != len(columns):
                    yield where, BadLineError(f"cells: {len(cells)}, but columns: {len(columns)}")
                else:
                    yield where, dict(zip(columns, cells, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise BadSourceError(f"{path} line {first}: not CSV in UTF-8 ({error})") from error
    if not columns:
        raise BadSourceError(f"{path}: empty; the first line of a CSV file names its columns")


def parquet_rows(path: str) -> Iterator[Item]:
    """Rows of a parquet file. Raises BadSourceError."""
    import pyarrow.parquet  # type: ignore[import-untyped]

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(1024):
                for value in batch.to_pylist():
                    row += 1
                    yield f"{path} row {row}", value
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # a date beyond Python's
        raise BadSourceError(
            f"{path}: not a parquet file, or a damaged one ({first_line(error)})"
        ) from error


def first_line(error: BaseException) -> str:
    """An error's text in one line: the libraries below write paragraphs."""
    text = " ".join(str(error).split()).partition(" Example of usage")[0]
    if text.startswith("Config name is missing"):
        text += ": NAME:CONFIG:SPLIT takes one"
    return text[:300] or type(error).__name__
