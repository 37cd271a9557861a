"""Keeping the allocators from holding what the process no longer needs."""

from __future__ import annotations

import ctypes

import pyarrow as pa

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_GIVEN_BACK = 1 << 20
"""Bytes of a block that is given back at once. Smaller ones are used again: a catch-up is a tenth quicker
than with glibc's 128 kB, and holds 20 MB more at its peak."""


def economise() -> None:
    """Set this process's allocators to give memory back; call it before threads are started.

    Arrow's own pool keeps what it once needed: 110 MB more at the peak of a catch-up, and no faster.
    glibc otherwise has an arena for each of eight threads per core, and stops giving large blocks back
    once it has seen larger ones.
    """
    pa.set_memory_pool(pa.system_memory_pool())
    if (libc := _glibc()) is not None:
        libc.mallopt(_M_ARENA_MAX, 2)
        libc.mallopt(_M_MMAP_THRESHOLD, _GIVEN_BACK)
        libc.mallopt(_M_TRIM_THRESHOLD, _GIVEN_BACK)


def give_back() -> None:
    """Return free memory to the system; takes milliseconds, so call it when there is nothing to do."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") else None
