"""HH-RLHF preference pairs in three files: train.jsonl, test.jsonl and validation.jsonl.

    python recipes/hh.py PAIRS.jsonl.gz

Every recipe and train.py read these files as they are: SFT learns the chosen replies, the reward
model learns the pairs, and REINFORCE takes as prompt what both replies answer. Pairs are split by
their opening message: no conversation of test.jsonl opens like one that a model was trained on.
Reward-model accuracy and the final evaluation use test.jsonl. validation.jsonl holds a few prompts
of the training side, for the validation curve.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from reinforce.data.preferences import Preference, opening, read_pairs, split_by_opening  # noqa: E402
from reinforce.errors import ConfigError  # noqa: E402
from reinforce.run.exits import run  # noqa: E402

HELD_OUT = 1 / 3
VALIDATION = 32


def write(path: Path, pairs: list[Preference]) -> None:
    """Write one pair a line, as chat messages."""

    def reply(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    with path.open("w") as file:
        for pair in pairs:
            replies = {"chosen": reply(pair.chosen), "rejected": reply(pair.rejected)}
            file.write(json.dumps({"prompt": pair.prompt, **replies}) + "\n")


def prepare(source: str, skip_bad_lines: bool = False) -> Path:
    """The folder with the three files, made if it is missing. Raises ConfigError.

    The same pairs have the same folder.
    """
    pairs, odd = read_pairs(source, "PAIRS", skip_bad_lines)
    for reason, count in odd.items():
        print(f"{source}: {count} {reason}", file=sys.stderr)
    train, test = split_by_opening(pairs, HELD_OUT)
    count = min(VALIDATION, len(train) // 10)
    many = Counter(map(opening, train))
    seen: set[str] = set()  # the last openings, of as many pairs as it takes
    for pair in reversed(train):
        if sum(many[one] for one in seen) < count:
            seen.add(opening(pair))
    validation = [pair for pair in train if opening(pair) in seen]
    train = [pair for pair in train if opening(pair) not in seen]
    sizes = f"{len(validation)} for validation, {len(test)} held out"
    print(f"{source}: {len(train)} pairs to train on, {sizes}", file=sys.stderr)
    if not train or not validation or not test:
        raise ConfigError(
            f"{source}: too few pairs, or too few different openings, to hold some out"
        )
    parts = [[dataclasses.astuple(pair) for pair in part] for part in (train, validation, test)]
    content = json.dumps(parts)
    folder = ROOT / "cache" / f"hh-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
    if folder.is_dir():
        return folder
    partial = folder.with_name(f".{folder.name}-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, part in (("train", train), ("validation", validation), ("test", test)):
        write(partial / f"{name}.jsonl", part)
    try:
        partial.rename(folder)
    except OSError:  # another process has just made it
        shutil.rmtree(partial)
    return folder


def main() -> None:
    """Prepare the three files and print the name of their folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "pairs",
        metavar="PAIRS",
        help="pairs, chosen and rejected: jsonl(.gz), json, csv, parquet, folder or hub id",
    )
    parser.add_argument(
        "--skip-bad-lines", action="store_true", help="leave out malformed lines and count them"
    )
    args = parser.parse_args()
    print(prepare(args.pairs, args.skip_bad_lines))


if __name__ == "__main__":
    sys.exit(run(main, name="recipes/hh.py"))
