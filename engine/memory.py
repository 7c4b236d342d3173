"""Freed memory is kept for the next step or request."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h of glibc
_KEEP, _PAD = 1 << 30, 64 << 20


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory in this process -> whether it did; elsewhere nothing changes.

    A batch of histories, or an attention over 500 candidates, makes tensors of several MiB. glibc maps each from the
    system and returns it, and the kernel fills every page with zeros again: a third of the time of a training step of
    DIN on one thread (22,600 rows a second without, 35,000 with), two thirds of that of a request.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    settings = {_M_MMAP_THRESHOLD: _KEEP, _M_TRIM_THRESHOLD: _KEEP, _M_TOP_PAD: _PAD}
    return all(mallopt(name, value) == 1 for name, value in settings.items())
