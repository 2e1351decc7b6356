"""Shared test set-up: CPU, eight fake devices, no silent rank promotion, checked shape annotations.

``HOLO_TEST_PLATFORM=cuda`` runs the same suite on a GPU.
"""

import os

_platform = os.environ.get("HOLO_TEST_PLATFORM", "cpu")
os.environ["JAX_PLATFORMS"] = _platform
if _platform == "cpu":
    _flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in _flags:
        os.environ["XLA_FLAGS"] = f"{_flags} --xla_force_host_platform_device_count=8".strip()

from jaxtyping import install_import_hook

install_import_hook("holo_jax.functional", "beartype.beartype")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
