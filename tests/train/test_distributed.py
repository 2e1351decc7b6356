"""Where a process stands: flags before the environment before the scheduler, and alone without any."""

import pytest

from train.distributed import Place, find_place
from train.errors import UsageError

HERE = "node7:1234"
SLURM = {"SLURM_STEP_NODELIST": "node[7-8]", "SLURM_NTASKS": "4"}


def test_nothing_given_is_a_process_on_its_own() -> None:
    assert find_place(None, None, None, {}) is None
    assert find_place(HERE, 1, 0, {}) is None
    # A batch script, or one task: nothing to join.
    assert find_place(None, None, None, {"SLURM_NTASKS": "4"}) is None
    assert find_place(None, None, None, SLURM | {"SLURM_NTASKS": "1"}) is None


def test_flags_come_before_the_environment() -> None:
    environment = {"JAX_COORDINATOR_ADDRESS": HERE, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    assert find_place(None, None, None, environment) == Place(HERE, 2, 1)
    assert find_place("other:1", 8, 0, environment) == Place("other:1", 8, 0)


def test_jax_asks_the_scheduler_for_what_is_not_given() -> None:
    assert find_place(None, None, None, SLURM) == Place(None, None, None)
    assert find_place(HERE, None, None, SLURM) == Place(HERE, None, None)
    mpi = {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2"}
    assert find_place(None, None, None, mpi) == Place(None, None, None)
    with pytest.raises(UsageError, match="process_id is 4; it must be from 0 to num_processes - 1 = 3"):
        find_place(None, None, 4, SLURM)


def test_numbers_in_the_environment_are_numbers() -> None:
    with pytest.raises(UsageError, match="JAX_PROCESS_ID is 'one'; it must be a whole number"):
        find_place(HERE, 2, None, {"JAX_PROCESS_ID": "one"})
