#!/bin/bash
# Train the backbone of a run whose data is prepared, on several nodes:
#     sbatch slurm/train_backbone.sh
#     CONFIG=my.yaml OUTPUT_DIR=runs/mine sbatch --nodes=4 slurm/train_backbone.sh
# A preempted job, or one near its time limit, saves a checkpoint and goes back to the queue. Submit it again at any
# time: it continues, on any number of nodes.

#SBATCH --job-name=train-backbone
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
##SBATCH --gpus-per-node=8
##SBATCH --partition=gpu
#SBATCH --time=1440
#SBATCH --output=slurm-%x-%j.log
# Two minutes before the limit the training is warned. The log goes on where a requeued job left it.
#SBATCH --signal=USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail

CONFIG=${CONFIG:-}                            # empty: the settings of the run at OUTPUT_DIR, or configs/default.yaml
OUTPUT_DIR=${OUTPUT_DIR:-}                    # empty: as the settings say
PROCESSES=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}   # per node: torchrun starts them with an address and port of this job
VIRTUAL_ENV=${VIRTUAL_ENV:-.venv}

cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"
exec "$VIRTUAL_ENV/bin/python" -u -m launcher.node backbone ${CONFIG:+--config "$CONFIG"} \
    ${OUTPUT_DIR:+--output-dir "$OUTPUT_DIR"} --processes "$PROCESSES"
