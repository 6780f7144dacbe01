"""A line on the server's standard error, which nobody may read any more; never an exception."""

import contextlib
import os


def report(line: str) -> None:
    """Write it past `sys.stderr`, which a reward function may have put aside."""
    with contextlib.suppress(OSError):
        os.write(2, f"serve_rm.py: {line}\n".encode("utf-8", "backslashreplace"))
