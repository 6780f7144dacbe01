"""Freed memory stays with the process: a later step's tensor needs no new pages."""

import ctypes

import pytest
from conftest import script

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="glibc's mallopt")

FAULTS = """
import resource, sys, torch
from reinforce.run.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
faults = []
for step in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones((100 - step) * 2**18)  # about 100 MiB, freed at once
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[1:]) * resource.getpagesize() // 2**20)
"""


def test_a_tensor_that_takes_the_place_of_a_freed_one_needs_no_new_pages():
    keep, plain = (int(script("-c", FAULTS, word).stdout) for word in ("keep", "as it is"))
    assert keep < 10 and plain > 90, (keep, plain)


END = """
import ctypes
from reinforce.run.allocator import keep_freed_memory
keep_freed_memory()
libc = ctypes.CDLL(None)
for name, takes in (("malloc", ctypes.c_size_t), ("sbrk", ctypes.c_ssize_t), ("free", ctypes.c_void_p)):
    getattr(libc, name).restype, getattr(libc, name).argtypes = ctypes.c_void_p, [takes]
block = libc.malloc(3 * 2**30)  # no page of it is touched
full = libc.sbrk(0)
libc.free(block)
print(full - libc.sbrk(0))
"""


def test_no_size_of_the_heap_is_given_back():
    assert int(script("-c", END).stdout) == 0  # bytes
