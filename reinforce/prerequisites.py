"""Imported first by the scripts: ends them in one sentence where Python or a package is missing.

Without it an old Python ends in the middle of an import, with a page of traceback.
"""

import importlib.util
import sys

PACKAGES = ("torch", "transformers", "datasets", "numpy", "tqdm", "matplotlib", "tensorboard")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
FIRST = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt"

if sys.version_info < (3, 10):  # noqa: UP036
    found = ".".join(map(str, sys.version_info[:2]))
    print(f"{sys.argv[0]}: this is Python {found}; 3.10 or newer is needed", file=sys.stderr)
    sys.exit(2)
if MISSING:
    print(f"{sys.argv[0]}: no {', '.join(MISSING)} in {sys.executable}: {FIRST}", file=sys.stderr)
    sys.exit(2)
