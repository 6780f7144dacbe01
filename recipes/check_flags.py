"""Check the flags of serve_rm.py and train.py before the launcher prepares anything.

    python recipes/check_flags.py SERVER FLAGS -- TRAIN FLAGS

The flags that the launcher adds (models, data, the server's address) may be missing.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from reinforce.flags import parse  # noqa: E402
from reinforce.run.config import TrainConfig  # noqa: E402
from reinforce.run.exits import run  # noqa: E402
from reinforce.serving.config import ServeConfig  # noqa: E402


def main() -> None:
    """Raise ConfigError on the first flag that is wrong."""
    middle = sys.argv.index("--")
    parse(ServeConfig, "", sys.argv[1:middle])
    added = ["--policy", "x", "--train-data", "x", "--rm-host", "x", "--rm-port", "1"]
    parse(TrainConfig, "", [*added, *sys.argv[middle + 1 :]])


if __name__ == "__main__":
    sys.exit(run(main, name="launch.sh"))
