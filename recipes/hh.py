"""HH-RLHF preference pairs made ready: train.jsonl, test.jsonl and validation.jsonl, split by opening message.

    python recipes/hh.py PAIRS.jsonl.gz

Every recipe and train.py read these files as they are: SFT learns the chosen replies, the reward
model the pairs, REINFORCE takes what both replies answer. No conversation of test.jsonl opens as
one that anything was trained on. Reward-model accuracy and the final evaluation use test.jsonl;
validation.jsonl holds a few prompts of the training side, for the curve.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from reinforce.data.preferences import Preference, read_pairs, split_by_opening  # noqa: E402
from reinforce.errors import ConfigError  # noqa: E402
from reinforce.run.exits import run  # noqa: E402

HELD_OUT = 1 / 3
VALIDATION = 32


def write(path: Path, pairs: list[Preference]) -> None:
    """One pair a line, as chat messages."""
    with path.open("w") as file:
        for pair in pairs:
            replies = {"chosen": pair.chosen, "rejected": pair.rejected}
            record = {
                "prompt": pair.prompt,
                **{k: [{"role": "assistant", "content": text}] for k, text in replies.items()},
            }
            file.write(json.dumps(record) + "\n")


def prepare(source: str, skip_bad_lines: bool = False) -> Path:
    """The folder with the three files, made if it is missing; the same pairs have the same folder. Raises ConfigError."""
    pairs, odd = read_pairs(source, "PAIRS", skip_bad_lines)
    for reason, count in odd.items():
        print(f"{source}: {count} {reason}", file=sys.stderr)
    train, test = split_by_opening(pairs, HELD_OUT)
    count = min(VALIDATION, len(train) // 10)
    train, validation = train[: len(train) - count], train[len(train) - count :]
    print(
        f"{source}: {len(train)} pairs to train on, {count} for validation, {len(test)} held out",
        file=sys.stderr,
    )
    if not validation or not test:
        raise ConfigError(
            f"{source}: too few pairs, or too few different openings, to hold some out"
        )
    content = json.dumps(
        [[dataclasses.astuple(pair) for pair in part] for part in (train, validation, test)]
    )
    folder = ROOT / "cache" / f"hh-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
    if folder.is_dir():
        return folder
    partial = folder.with_name(f".{folder.name}-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, part in (("train", train), ("validation", validation), ("test", test)):
        write(partial / f"{name}.jsonl", part)
    partial.rename(folder)
    return folder


def main() -> None:
    """Prepare, and print the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "pairs",
        metavar="PAIRS",
        help="chosen and rejected: jsonl(.gz), json, csv, parquet, folder or hub id",
    )
    parser.add_argument(
        "--skip-bad-lines", action="store_true", help="leave out malformed lines and count them"
    )
    args = parser.parse_args()
    print(prepare(args.pairs, args.skip_bad_lines))


if __name__ == "__main__":
    sys.exit(run(main, name="recipes/hh.py"))
