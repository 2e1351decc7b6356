"""Packages that only some functions need."""

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Imports a module of an optional dependency.

    Raises:
      ImportError: if it is not installed, naming the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not error.name or not f"{module}.".startswith(f"{error.name}."):
            raise  # it is installed, and lacks something itself
        raise ImportError(f"{module} is not installed; run: pip install 'holo-jax[{extra}]'") from None
