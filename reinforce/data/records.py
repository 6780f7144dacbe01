"""Records in: a jsonl file (or .gz), a folder of data files or a data set of the Hugging Face hub, each record checked.

A bad line is named by file and line. Left out: CSV, and formats that `datasets` does not read.
"""

import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from reinforce.errors import ConfigError

T = TypeVar("T")


class BadLineError(ValueError):
    """One line or row that cannot be used."""


def _no_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise BadLineError("the same key twice")
    return dict(pairs)


def parse_line(line: bytes) -> Any:
    """The JSON value of one line. Raises BadLineError with the reason."""
    if line.startswith(b"\xef\xbb\xbf"):
        raise BadLineError("a byte order mark; save the file as UTF-8 without one")
    if line.endswith((b"\r", b"\r\n")):
        raise BadLineError(r"a line that ends in \r\n; save the file with \n line ends")
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=_no_duplicate_keys)
    except BadLineError:
        raise
    except (ValueError, RecursionError) as error:
        raise BadLineError(f"not JSON ({error})") from error


def read_records(
    source: str,
    flag: str,
    check: Callable[[Any], T],
    skip_bad_lines: bool = False,
    what: str = "prompts",
) -> tuple[list[T], int]:
    """What `check` makes of each line or row, and how many bad ones were skipped.

    `source` is a jsonl file, a folder that `datasets` reads, or a hub id; of the last two NAME:SPLIT takes another split than
    train. `check` raises BadLineError. Raises ConfigError naming file and line.
    """
    records, bad = [], 0
    try:
        for where, value in _items(source, flag):
            try:
                records.append(check(parse_line(value) if isinstance(value, bytes) else value))
            except BadLineError as error:
                if not skip_bad_lines:
                    raise ConfigError(
                        f"{where}: {error} ({flag}; --skip-bad-lines leaves such lines out)"
                    ) from error
                bad += 1
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{flag} {source}: cannot be read ({error})") from error
    if not records:
        raise ConfigError(f"{flag} {source}: no {what} in it")
    return records, bad


def _items(source: str, flag: str) -> Iterator[tuple[str, bytes | dict[str, Any]]]:
    """(place, line of a file or row of a data set) of everything in it."""
    path = Path(source)
    if path.is_file():
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                yield f"{source}:{number}", line.removesuffix(b"\n")
        return
    name, _, split = (source, "", "") if path.is_dir() else source.partition(":")
    local = Path(name).is_dir()
    if not local and (
        name.endswith((".jsonl", ".json", ".gz")) or name.startswith((".", "/", "~"))
    ):
        raise ConfigError(f"{flag} {source}: no such file")
    if not local:
        print(
            f"{flag} {source}: no such file here, asking the Hugging Face hub ...",
            file=sys.stderr,
            flush=True,
        )
    import datasets

    datasets.utils.logging.disable_progress_bar()
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # it raises what it likes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        place = (
            "datasets cannot read this folder"
            if local
            else "neither a file here nor a data set on the hub"
        )
        raise ConfigError(f"{flag} {source}: {place} ({reason})") from error
    for number, row in enumerate(rows, 1):
        yield (
            f"{source} row {number}",
            {key: value for key, value in row.items() if value is not None},
        )
