"""The command line of training. It parses flags and hands over to ``train.loop``.

python -m train.main --config=configs/quickstart.py [--config.num_steps=500] [--workdir=runs/mine]
python -m train.main --resume=runs/mine
"""

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from train.errors import EXIT_PREEMPTED, EXIT_USAGE, TrainError, UsageError
from train.run_config import RunConfig

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file; fields by --config.FIELD=VALUE."
)
_RESUME = flags.DEFINE_string("resume", None, "Run directory to go on with, from its own config.json.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory; runs/NAME by default.")
_ACCEPT = flags.DEFINE_list(
    "accept", [], "Fields or sections of the configuration that may differ on resume."
)


def _parse(arguments: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(arguments)
        if rest[1:]:
            raise UsageError(f"{rest[1]} is not expected; every argument is a --flag=value")
    except (
        flags.Error,
        UsageError,
        AttributeError,
        KeyError,
        OSError,
        SyntaxError,
        TypeError,
        ValueError,
    ) as error:
        _leave(error, EXIT_USAGE)
    return rest


def _leave(error: BaseException, code: int) -> None:
    print(f"train.main: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    sys.exit(code)


def _request() -> tuple[RunConfig, Path]:
    """The configuration and the run directory asked for."""
    if (_RESUME.value is None) == (_CONFIG.value is None):
        raise UsageError("give either --config=configs/NAME.py or --resume=RUN")
    if _RESUME.value is not None:
        if _WORKDIR.value is not None:
            raise UsageError("--workdir does not go with --resume, which names the run directory itself")
        return RunConfig.read(Path(_RESUME.value)), Path(_RESUME.value)
    config = RunConfig.from_dict(_CONFIG.value.to_dict())
    return config, Path(_WORKDIR.value or Path("runs") / config.name)


def main(_: list[str]) -> None:
    """Runs the training asked for and exits with the codes of ``train.errors``."""
    logging.set_verbosity(logging.WARNING)
    try:
        config, workdir = _request()
        from train.loop import train  # after the flags: importing jax takes seconds

        result = train(config, workdir, accept=_ACCEPT.value)
    except TrainError as error:
        _leave(error, error.exit_code)
    if result.stopped_by:
        sys.exit(EXIT_PREEMPTED)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
