"""Check the flags of serve_rm.py and train.py before the launcher prepares anything.

    python recipes/check_flags.py SERVER FLAGS -- TRAIN FLAGS

The flags that the launcher adds (models, data, the server's address) may be missing.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from reinforce.errors import ConfigError  # noqa: E402
from reinforce.flags import parse  # noqa: E402
from reinforce.run.config import TrainConfig  # noqa: E402
from reinforce.serving.config import ServeConfig  # noqa: E402


def main() -> None:
    """Exit code 2 and one sentence for the first flag that is wrong."""
    middle = sys.argv.index("--")
    added = ["--policy", "x", "--train-data", "x", "--rm-host", "x", "--rm-port", "1"]
    try:
        parse(ServeConfig, "", sys.argv[1:middle])
        parse(TrainConfig, "", [*added, *sys.argv[middle + 1 :]])
    except ConfigError as error:
        print(f"launch.sh: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
