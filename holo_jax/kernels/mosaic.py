"""Modules of Pallas' backend Mosaic GPU, imported by who uses them: older JAX lacks parts of them."""

import importlib
from typing import Any


def pallas() -> Any:
    """``jax.experimental.pallas.mosaic_gpu``."""
    return importlib.import_module("jax.experimental.pallas.mosaic_gpu")


def fragments() -> Any:
    """``jax.experimental.mosaic.gpu``: arrays in the registers of a warpgroup."""
    return importlib.import_module("jax.experimental.mosaic.gpu")


def utils() -> Any:
    """``jax.experimental.mosaic.gpu.utils``."""
    return importlib.import_module("jax.experimental.mosaic.gpu.utils")
