"""A device without memory left, as PyTorch says it. A server without PyTorch never sees that."""

import sys
from typing import Any


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is PyTorch's: fewer texts at once may fit.

    >>> is_out_of_memory(ValueError("no"))
    False
    """
    kind = getattr(_torch(), "OutOfMemoryError", None)
    return kind is not None and isinstance(error, kind)


def empty_cache() -> None:
    """Give a GPU's freed memory back."""
    torch = _torch()
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _torch() -> Any:
    """PyTorch, if anything has imported it; a reward function alone may do without."""
    return sys.modules.get("torch")
