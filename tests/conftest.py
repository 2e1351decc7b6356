"""Shared test set-up: CPU, eight fake devices, no silent rank promotion, checked shape annotations.

``HOLO_TEST_PLATFORM=cuda,cpu`` runs the same suite on a GPU, with float32 products in full precision
(tolerances are for float32, and a GPU's default is shorter) and operations in a fixed order (some tests
compare bits). Tests marked ``devices`` need that many and are skipped with fewer; ``cpu`` marks what is said
of CPUs only. Compiled programs are kept in ``.pytest_cache/jax`` and, on the CPU, compiled without costly
optimisation: the suite runs many tiny programs once.
"""

import gc
import os
from pathlib import Path

from tests.compiling import flags

ROOT = Path(__file__).parents[1]
_platform = os.environ.get("HOLO_TEST_PLATFORM", "cpu")
os.environ["JAX_PLATFORMS"] = _platform
if _platform == "cpu":
    _flags = os.environ.get("XLA_FLAGS", "")
    for _flag in flags(8).split():
        if _flag.split("=")[0] not in _flags:
            _flags = f"{_flags} {_flag}"
    os.environ["XLA_FLAGS"] = _flags.strip()
else:
    _flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"
    os.environ["XLA_FLAGS"] = f"{_flags} --xla_gpu_enable_triton_gemm=false".strip()
    # By the environment: children, whose bits are compared with ours, must not round products to fewer.
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    # Many processes share one card.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Where an operation was traced is asked for every one of them: 9% of a test's time, read by nobody.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

from jaxtyping import install_import_hook

install_import_hook("holo_jax.functional", "beartype.beartype")

import jax
import pytest

# Traces make many objects and little garbage: one collection in thirty of them is enough.
gc.freeze()
gc.set_threshold(20_000, 20, 20)

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests of more devices than there are, or of another platform; files with slow ones come first.

    So that the last ones, for which only some processes are left, are short. A file stays in one piece, as
    ``--dist loadfile`` gives it to a process: what its tests share is compiled once.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    for item in items:
        if item.get_closest_marker("cpu") and _platform != "cpu":
            item.add_marker(pytest.mark.skip(reason="is about CPUs"))
        marker = item.get_closest_marker("devices")
        if marker and jax.device_count() < marker.args[0]:
            item.add_marker(
                pytest.mark.skip(reason=f"needs {marker.args[0]} devices, has {jax.device_count()}")
            )
