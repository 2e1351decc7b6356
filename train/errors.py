"""Errors of a training run and the exit codes they end in.

====  =======================================================================================
code  meaning
====  =======================================================================================
0     finished
1     failed: the message says why; what was committed before is intact. A stall that the
      watchdog ends (all stacks on stderr) also exits with 1.
2     bad usage: a flag, configuration, data set or run directory is wrong; no work was started
75    preempted: a signal asked to stop, everything is saved, the same command goes on (EX_TEMPFAIL)
130   a second Ctrl-C: exited at once, the last committed checkpoint is intact
====  =======================================================================================
"""

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130


class TrainError(RuntimeError):
    """A run cannot go on. The message is complete in one line."""

    exit_code = EXIT_FAILED
    known_to_all = False  # whether every process of the run raises it, see ``train.processes``


class UsageError(TrainError):
    """The request is wrong; nothing was started or written."""

    exit_code = EXIT_USAGE


class ConfigError(UsageError):
    """A configuration field is unknown, missing, of the wrong type or out of range."""


class MeshError(UsageError):
    """Devices, mesh axes, batch and parameters do not fit together."""


class ResumeError(UsageError):
    """A run directory holds another configuration, data set or tokenizer than the one asked for."""


class LockError(UsageError):
    """Another process works on the run directory."""


class CheckpointError(TrainError):
    """A checkpoint could not be written, or none can be read."""


class StorageError(TrainError):
    """The run directory cannot be written: no space, read-only, or gone."""


class DivergedError(TrainError):
    """Too many non-finite steps in a row, and the rollbacks are used up."""
