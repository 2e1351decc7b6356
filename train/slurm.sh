#!/bin/bash
# A run on several nodes, one process a GPU:
#
#   sbatch --nodes=4 train/slurm.sh --config=configs/slimpajama.py --config.mesh.fsdp=8 \
#       --config.accumulation_steps=1 --config.eval.global_batch_size=32
#
# A batch divides over all GPUs and its parts, here 4 rows for each of 32, a held-out batch over all GPUs.
# Submit it in the root of the checkout; that, .venv, runs/ and the data lie where all nodes see them. JAX reads
# from SLURM who takes part, and gives each process the GPU of its rank on the node, so every process has to see
# all GPUs of its node. Three minutes before the time is up all save and stop, and the job queues again.
#SBATCH --job-name=holo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append

srun --gpu-bind=none "${PYTHON:-.venv/bin/python}" -m train.main "$@"
code=$?
if [ $code -eq 75 ]; then  # stopped, with everything saved: the same command goes on
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
