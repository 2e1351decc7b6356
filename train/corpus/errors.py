"""Typed errors of the data pipeline. Every message names the file or field and what would put it right."""

from train.errors import UsageError


class DataError(UsageError, ValueError):
    """Data that is missing, damaged, or not what was asked for."""


class SourceError(DataError):
    """A corpus that cannot be found, fetched or understood."""


class TokenizerError(DataError):
    """A tokenizer that cannot be found, read or trained."""


class BadInputError(DataError):
    """More bad documents or damaged files than allowed."""


class PlanError(DataError):
    """An output directory that was started with other options, or is not complete."""


class ManifestError(DataError):
    """A prepared directory without a usable manifest."""


class ShardError(DataError):
    """A shard that is missing, changed or damaged."""
