"""Where a number comes from: device, versions, commit, command, time."""

import datetime
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parent.parent


def device() -> dict[str, str | int]:
    """The default JAX device and the host."""
    first = jax.devices()[0]
    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "count": jax.device_count(),
        "host": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def versions() -> dict[str, str]:
    """Versions of everything that can change a number."""
    found = {"python": platform.python_version()}
    for package in ("jax", "jaxlib", "flax", "optax", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    try:
        found["holo_jax"] = metadata.version("holo-jax")
    except metadata.PackageNotFoundError:
        found["holo_jax"] = "checkout"
    return found


def commit() -> str:
    """Commit of the checkout, with "+changes" when tracked code differs from it.

    ``HOLO_COMMIT`` overrides it where the code was copied without its history; "unknown" otherwise.
    """
    if os.environ.get("HOLO_COMMIT"):
        return os.environ["HOLO_COMMIT"]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()

    try:
        changed = git(
            "status", "--porcelain", "--untracked-files=no", "--", "holo_jax", "train", "eval", "configs"
        )
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def command(module: str, argv: list[str] | None = None) -> str:
    """The command line that repeats this run from the checkout."""
    return " ".join(["python", "-m", module, *map(_quote, sys.argv[1:] if argv is None else argv)])


def _quote(argument: str) -> str:
    """Quoted for a shell; tuples of names keep their single quotes and stay readable."""
    if "'" in argument and not set(argument) & set('"$`\\!'):
        name, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        return f'{name}{equals}"{value}"'
    return shlex.quote(argument)


def now() -> str:
    """Coordinated universal time in ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
