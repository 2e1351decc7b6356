"""The command line of training. It parses flags and hands over to ``train.loop``.
python -m train.main --config=configs/quickstart.py [--config.num_steps=500] [--workdir=runs/mine]
python -m train.main --resume=runs/mine
Several processes: the same command in each, see ``train.distributed``.
"""

import sys
import traceback
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from train.distributed import find_place, join
from train.errors import EXIT_FAILED, EXIT_PREEMPTED, TrainError, UsageError
from train.processes import leave, sign
from train.run_config import RunConfig

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration; fields by --config.FIELD=VALUE.")
_RESUME = flags.DEFINE_string("resume", None, "Run directory to go on with, from its own config.json.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory; runs/NAME by default.")
_ACCEPT = flags.DEFINE_list(
    "accept", [], "Fields or sections of the configuration that may differ on resume."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, of several; all three go together."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes train together.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")


def _parse(arguments: list[str]) -> list[str]:
    try:
        return flags.FLAGS(arguments)
    except (flags.Error, AttributeError, KeyError, OSError, SyntaxError, TypeError, ValueError) as error:
        # ml_collections nests the text of one KeyError in another, which quotes it twice.
        raise UsageError(str(error).replace("\\n", ": ").translate({92: None, 39: None})) from error


def _request(rest: list[str]) -> tuple[RunConfig, Path]:
    resume, workdir = _RESUME.value, _WORKDIR.value
    if rest:
        raise UsageError(f"{rest[0]} is not expected; every argument is a --flag=value")
    if (resume is None) == (_CONFIG.value is None) or (resume and workdir):
        raise UsageError("give either --config=configs/NAME.py [--workdir=RUN], or --resume=RUN alone")
    if resume is not None:
        return RunConfig.read(Path(resume)), Path(resume)
    try:
        config = RunConfig.from_dict(_CONFIG.value.to_dict())
    except OSError as error:  # ml_collections reports a missing file at the first use
        raise UsageError(error) from error
    return config, Path(workdir or Path("runs") / config.name)


def main(arguments: list[str]) -> None:
    """Runs the training asked for and exits with the codes of ``train.errors``."""
    logging.set_verbosity(logging.FATAL)  # orbax's errors reach us as exceptions, said in one line
    config, workdir = _request(arguments[1:])
    place = find_place(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    from train.loop import train  # after the flags: a typo is answered without waiting for imports

    join(place, config.watchdog.startup_seconds)
    code = EXIT_PREEMPTED if train(config, workdir, accept=_ACCEPT.value).stopped_by else 0
    leave(code, alone=False)


if __name__ == "__main__":
    try:
        app.run(main, flags_parser=_parse)
    except TrainError as failure:
        print(f"train.main: {sign(failure)}", file=sys.stderr)
        leave(failure.exit_code, alone=not failure.known_to_all)
    except Exception:
        traceback.print_exc()
        leave(EXIT_FAILED, alone=True)
