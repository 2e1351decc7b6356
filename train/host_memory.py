"""Settings of the C library's allocator for steps that run on the host's own cores."""

import ctypes

# Numbers of glibc's malloc.h: parameter -> value.
_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD, _ARENA_MAX = -4, -1, -2, -8
_SETTINGS = {
    _ARENA_MAX: 1,  # an arena of a thread ends at 64 MiB, and what does not fit is mapped anew each time
    _MMAP_MAX: 0,
    _TRIM_THRESHOLD: 2**31 - 1,
    _TOP_PAD: 2**28,
}


def keep_freed_memory() -> bool:
    """Makes the allocator reuse large blocks instead of returning them to the system.

    XLA on CPUs allocates the temporary memory of every step anew. By default each such block is mapped,
    zeroed page by page as it is touched, and unmapped: a fifth of the quick start's processor time. The
    process then holds its peak until it ends. Threads that exist already keep arenas of their own, so it has
    to be called before JAX starts its devices.

    Returns:
      False where the C library is not glibc: nothing is changed then.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(parameter, value) == 1 for parameter, value in _SETTINGS.items())
