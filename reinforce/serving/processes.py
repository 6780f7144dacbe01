"""Which of the server's processes this is, by torchrun's environment; one alone without it."""

import os


def rank() -> int:
    """This process's number; 0 answers HTTP."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's number on its machine, and that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def processes() -> int:
    """Number of processes of the server."""
    return int(os.environ.get("WORLD_SIZE", "1"))
