#!/bin/bash
# Two processes on this machine train the quick start as one, on the CPU:
#
#   bash train/two_processes.sh [--config.num_steps=100 ...]
#
# On two machines: the second command on the first, the first on the second, with the first one's address in
# place of localhost and a --workdir that both see.
export JAX_PLATFORMS=cpu JAX_COORDINATOR_ADDRESS=localhost:${PORT:-7411} JAX_NUM_PROCESSES=2
train=("${PYTHON:-python}" -m train.main --config=configs/quickstart.py --config.mesh.devices=0
    --workdir=runs/two-processes "$@")

JAX_PROCESS_ID=1 "${train[@]}" &
JAX_PROCESS_ID=0 "${train[@]}"
code=$?
wait $!
exit $code
