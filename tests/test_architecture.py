"""Imports go down the layers only, and only when needed; public modules are documented."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Lower layers first. A module may import from its own entry and from any entry above it in this list.
LAYERS = (
    "holo_jax.array_types",
    "holo_jax.precision",
    "holo_jax.target",
    "holo_jax.exchange",
    "holo_jax.parallel",
    "holo_jax.ordered_sums",
    "holo_jax.residual",
    "holo_jax.functional",
    "holo_jax.kernels.call",
    "holo_jax.kernels.capability",
    "holo_jax.kernels.mosaic",
    "holo_jax.kernels.phasor_features",
    "holo_jax.kernels.instructions",
    "holo_jax.kernels.ensemble",
    "holo_jax.kernels.hadamard",
    "holo_jax.kernels.outer",
    "holo_jax.kernels.hopper",
    "holo_jax.kernels.block",
    "holo_jax.kernels.products",
    "holo_jax.kernels.decode",
    "holo_jax.kernels",
    "holo_jax.config",
    "holo_jax.layers",
    "holo_jax.sequence",
    "holo_jax.mixers",
    "holo_jax.blocks",
    "holo_jax.model",
    "holo_jax.generate",
    "holo_jax.state_io",
    "holo_jax.optional",
    "holo_jax.manifest",
    "holo_jax.tokenizers",
    "holo_jax.text_stream",
    "holo_jax.pretrained",
    "holo_jax",
    "train",
    "eval",
    "configs",
)
# Beside the order above: configurations are data, read by the entry points alone.
MAY_IMPORT_CONFIGS = ("train.main", "train.plan", "eval", "tests", "configs")


def layer(module: str) -> int:
    """Index of the most specific layer that holds ``module``."""
    fitting = [i for i, name in enumerate(LAYERS) if module == name or module.startswith(name + ".")]
    exact = [i for i in fitting if LAYERS[i] != "holo_jax"] or fitting
    return exact[0] if exact else -1


def sources() -> list[Path]:
    return sorted(p for top in ("holo_jax", "train", "eval", "configs") for p in (ROOT / top).rglob("*.py"))


def target(package: str, name: str) -> str:
    """What ``from package import name`` loads: the submodule if there is one, else the package."""
    inside = ROOT.joinpath(*package.split("."), name)
    return f"{package}.{name}" if inside.is_dir() or inside.with_suffix(".py").is_file() else package


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(target(node.module, alias.name) for alias in node.names)
    return {n for n in names if n.split(".")[0] in ("holo_jax", "train", "eval", "configs")}


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    name = module_name(path)
    for other in imported(path):
        if other.startswith("configs") and not name.startswith(MAY_IMPORT_CONFIGS):
            pytest.fail(f"{name} imports {other}; configurations are read by entry points only")
        if other.startswith("configs"):
            continue
        assert layer(other) <= layer(name), (
            f"{name} (layer {layer(name)}) imports {other} (layer {layer(other)})"
        )


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_say_what_they_do(path: Path) -> None:
    tree = ast.parse(path.read_text())
    if tree.body:
        assert ast.get_docstring(tree), f"{path} has no docstring"


def test_layer_check_can_fail() -> None:
    assert (
        layer("holo_jax.functional.memory")
        < layer("holo_jax.kernels.block.norms")
        < layer("holo_jax.kernels")
        < layer("holo_jax.model")
        < layer("train.loop")
        < layer("eval.recall")
    )


def test_names_are_imported_when_asked_for() -> None:
    """What needs no jax does not wait for it: tokenizers, manifests and the workers of ``train.prepare``."""
    program = (
        "import sys, holo_jax, train.prepare; assert not {'jax', 'flax'} & set(sys.modules); "
        "assert {getattr(holo_jax, name) is not None for name in holo_jax.__all__} == {True}; "
        "assert set(holo_jax.__all__) <= set(dir(holo_jax)); holo_jax.what_is_not_there"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == (
        "AttributeError: module 'holo_jax' has no attribute 'what_is_not_there'"
    )
