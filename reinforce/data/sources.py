"""Where a data flag leads: a file, a folder, what `save_to_disk` wrote, or a data set of the hub.

    NAME                  a path or a hub id; of several splits, train
    NAME:SPLIT            another split, or a slice of one: data:test, data:train[:100]
    NAME:CONFIG:SPLIT     of a data set that has several configurations

`datasets` finds the files of a folder, and `files` reads them: an error then names file and line,
and a file that has changed is never served from a cache. `datasets` itself reads what a hub id
names, what it has saved, and forms that `files` does not know.
"""

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

from reinforce.data.files import ENDINGS, BadSourceError, Item, ending, first_line, read_file
from reinforce.hub import may_be_hub_id

Splits = dict[str, Callable[[], Iterator[Item]]]  # by name, how to read it


def items(source: str, flag: str) -> Iterator[Item]:
    """Every line or row of a source. Raises BadSourceError."""
    name, config, split = parse(source)
    if os.path.isfile(name):
        return select({"train": partial(read_file, name)}, name, config, split)
    if os.path.isdir(name):
        if is_saved(name):
            return select(saved(name), name, config, split)
        return select(folder(name, config), name, "", split)
    if os.path.exists(name):
        raise BadSourceError(f"{name}: neither a file nor a folder; save its lines to a file")
    if not is_hub_id(name):
        raise BadSourceError(f"{source}: no such file or folder")
    print(
        f"{flag} {source}: no such file here, asking the Hugging Face hub ...",
        file=sys.stderr,
        flush=True,
    )
    return hub(source, name, config, split)


def parse(source: str) -> tuple[str, str, str]:
    """Name, configuration, which may be empty, and split. The name is the longest path there is.

    >>> parse("openai/gsm8k:main:train[:100]")
    ('openai/gsm8k', 'main', 'train[:100]')
    """
    ends = [len(source), *(m.start() for m in re.finditer(":", source))]
    names = [source[:end] for end in sorted(ends, reverse=True)]
    name = next((name for name in names if os.path.exists(name)), names[-1])
    *config, split = re.split(r":(?![^\[]*\])", source[len(name) + 1 :])  # no colon of a slice
    if len(config) > 1:
        raise BadSourceError(f"{source}: give NAME, NAME:SPLIT or NAME:CONFIG:SPLIT")
    return name, "".join(config), split or "train"


def is_hub_id(name: str) -> bool:
    """Whether the hub may be asked for a name that is nothing here; never for a data file's.

    >>> is_hub_id("openai/gsm8k"), is_hub_id("data/x/y"), is_hub_id("x.csv")
    (True, False, False)
    """
    like_a_file = name.lower().endswith((*ENDINGS, ".gz", ".arrow", ".txt", ".zip"))
    return may_be_hub_id(name) and not like_a_file


def select(splits: Splits, name: str, config: str, split: str) -> Iterator[Item]:
    """The rows of a split, or of a slice such as train[:100]. Raises BadSourceError."""
    if not config and split in splits:
        return splits[split]()
    wanted = f"{config}:{split}" if config else split
    refusal = BadSourceError(f"{name}: no split {wanted} in it, only {', '.join(splits)}")
    if config:
        raise refusal
    import datasets

    rows = {key: list(read()) for key, read in splits.items() if key in split}
    try:
        sizes = {key: len(found) for key, found in rows.items()}
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        raise refusal from error
    return chain.from_iterable(rows[part.splitname][part.from_ : part.to] for part in parts)


def is_saved(name: str) -> bool:
    """Whether a folder bears the marks of `save_to_disk`."""
    marks = [("dataset_dict.json",), ("dataset_info.json", "state.json")]
    return any(all(os.path.isfile(f"{name}/{mark}") for mark in both) for both in marks)


def saved(name: str) -> Splits:
    """The splits of what `save_to_disk` wrote; a data set without splits is called train.

    Raises BadSourceError.
    """
    import datasets

    try:
        found = datasets.load_from_disk(name)
    except Exception as error:  # it raises what it likes
        raise BadSourceError(
            f"{name}: not what save_to_disk writes ({first_line(error)})"
        ) from error
    splits = found if isinstance(found, datasets.DatasetDict) else {"train": found}
    return {key: partial(table_rows, f"{name}:{key}", rows) for key, rows in splits.items()}


def folder(name: str, config: str) -> Splits:
    """The splits of a folder of data files, as the hub would find them. Raises BadSourceError."""
    import datasets

    place = os.path.abspath(name)  # else a folder that is called csv would be a form and no folder
    try:
        with tempfile.TemporaryDirectory() as cache:
            builder = datasets.load_dataset_builder(place, config or None, cache_dir=cache)
    except Exception as error:  # it raises what it likes
        raise BadSourceError(
            f"{name}: datasets cannot read this folder ({first_line(error)})"
        ) from error
    files = {str(key): list(paths) for key, paths in builder.config.data_files.items()}
    read = {os.path.basename(path) for paths in files.values() for path in paths}
    left = sorted(
        f
        for f in os.listdir(place)
        if ending(f) in ENDINGS and f not in read and not f.startswith("dataset_info")
    )
    if left and not config and os.environ.get("RANK", "0") == "0":
        print(f"{name}: not read, of another form: {', '.join(left[:3])}", file=sys.stderr)
    if all(
        ending(path) in ENDINGS and os.path.isfile(path)
        for paths in files.values()
        for path in paths
    ):
        return {key: partial(read_files, name, paths) for key, paths in files.items()}
    return {key: partial(streamed, name, place, config, key) for key in files}


def read_files(folder: str, paths: list[str]) -> Iterator[Item]:
    """The rows of a split's files, one file after the other."""
    for path in paths:
        yield from read_file(os.path.join(folder, os.path.relpath(path, folder)))


def streamed(name: str, place: str, config: str, split: str) -> Iterator[Item]:
    """The rows of a folder in a form that `datasets` alone knows, read past its cache."""
    import datasets

    with tempfile.TemporaryDirectory() as cache:
        how = {"split": split, "cache_dir": cache, "streaming": True}
        try:
            rows = datasets.load_dataset(place, config or None, **how)
        except Exception as error:  # it raises what it likes
            raise BadSourceError(
                f"{name}: datasets cannot read this folder ({first_line(error)})"
            ) from error
        yield from table_rows(f"{name}:{split}", rows)


def hub(source: str, name: str, config: str, split: str) -> Iterator[Item]:
    """The rows of a data set of the hub; `datasets` caches each version. Raises BadSourceError."""
    import datasets

    datasets.utils.logging.disable_progress_bar()
    try:
        rows = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # it raises what it likes
        raise BadSourceError(
            f"{source}: neither a file here nor a data set on the hub ({first_line(error)})"
        ) from error
    return table_rows(source, rows)


def table_rows(name: str, rows: Any) -> Iterator[Item]:
    """Rows that `datasets` reads. Raises BadSourceError."""
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            yield f"{name} row {number}", row
    except Exception as error:  # it raises what it likes
        raise BadSourceError(
            f"{name}: datasets cannot read it after row {number} ({first_line(error)})"
        ) from error
