"""The commit record of a checkpoint; it lives in the library, which reads checkpoints too."""

from holo_jax.manifest import (
    MANIFEST_FILE,
    DamageError,
    read_manifest,
    sync_directory,
    verify,
    write_manifest,
)

__all__ = ["MANIFEST_FILE", "DamageError", "read_manifest", "sync_directory", "verify", "write_manifest"]
