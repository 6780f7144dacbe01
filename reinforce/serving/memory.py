"""A device without memory left, or lost, as PyTorch says it.

A server without PyTorch never sees either.
"""

import gc
import sys
from typing import Any

FOREIGN = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is PyTorch's: fewer texts at once may fit.

    Where another process has taken a GPU's memory, CUDA and cuBLAS say it in words of their own.

    >>> is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    True
    """
    kind = getattr(_torch(), "OutOfMemoryError", None)
    if kind is not None and isinstance(error, kind):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in FOREIGN)


def is_lost(error: BaseException) -> bool:
    """Whether a GPU has failed in a way after which it answers this process nothing any more."""
    kind = getattr(_torch(), "AcceleratorError", None)
    return kind is not None and isinstance(error, kind) and not is_out_of_memory(error)


def empty_cache() -> None:
    """Give a GPU's freed memory back, and what only a cycle of objects holds."""
    gc.collect()
    torch = _torch()
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _torch() -> Any:
    """PyTorch, if anything has imported it; a reward function alone may do without."""
    return sys.modules.get("torch")
