"""Which failures are results: no memory left and numbers that are not finite; a programming error is none."""

import jax


def is_out_of_memory(error: BaseException) -> bool:
    """True for an allocation that the device (or the host) refused."""
    if isinstance(error, MemoryError):
        return True
    text = str(error)
    return isinstance(error, jax.errors.JaxRuntimeError) and (
        "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()
    )


def as_status(error: BaseException) -> str:
    """ "oom" for running out of memory, "diverged" for numbers not finite; others are raised again."""
    if is_out_of_memory(error):
        return "oom"
    if isinstance(error, FloatingPointError):
        return "diverged"
    raise error
