"""Memory that inference gives back is kept for the next request."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h of glibc
_KEEP, _PAD = 1 << 30, 64 << 20


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory in this process -> whether it did; elsewhere nothing changes.

    An attention over 500 candidates and 50 history items makes tensors of several MiB. glibc maps each from the system
    and returns it, and the kernel fills every page with zeros again: two thirds of the time of such a request.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    settings = {_M_MMAP_THRESHOLD: _KEEP, _M_TRIM_THRESHOLD: _KEEP, _M_TOP_PAD: _PAD}
    return all(mallopt(name, value) == 1 for name, value in settings.items())
