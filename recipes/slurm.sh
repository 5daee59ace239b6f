#!/bin/bash
# Several nodes under Slurm, one task a GPU. Words behind the script are keys of dpo-train:
#
#     OUTPUT_DIR=/shared/runs/a sbatch recipes/slurm.sh data=jsonl data.train=/shared/pairs.jsonl
#
#SBATCH --job-name=dpo
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8 # one a GPU
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300 # to every task, 300 s before the limit: the run saves and exits with 75
#SBATCH --requeue # also after a lost node and a preemption
#SBATCH --output=dpo-%j.log
#SBATCH --open-mode=append # one log for all attempts
set -euo pipefail

# On storage that every node sees. A requeued job keeps its id, so resume=auto finds the checkpoints.
output_dir=${OUTPUT_DIR:-$PWD/outputs/slurm-$SLURM_JOB_ID}

# --gpu-bind=none: a task sees every GPU of its node and takes the one of its own number (SLURM_LOCALID).
# --wait: when a task has ended, the others get 600 s to end.
code=0
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --gpu-bind=none --wait=600 \
  dpo-train engine="${ENGINE:-ddp}" save_every=100 \
  output_dir="$output_dir" resume=auto "$@" || code=$?

# 75: stopped by a signal, with a checkpoint saved. Every other code stays as it is.
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
