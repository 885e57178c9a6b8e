#!/bin/bash
# Train experts of a run whose data and backbone are finished, one array task each:
#     sbatch slurm/train_experts.sh
#     sbatch --array=3,7 slurm/train_experts.sh                    # only these
#     CONFIG=my.yaml OUTPUT_DIR=runs/mine sbatch slurm/train_experts.sh
# A preempted task, or one near its time limit, saves a checkpoint and goes back to the queue. Submit it again at any
# time: finished experts are skipped, and the others continue.

#SBATCH --job-name=train-experts
#SBATCH --array=0-4%32
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
##SBATCH --gpus-per-node=1
##SBATCH --partition=gpu
#SBATCH --time=120
#SBATCH --output=slurm-%x-%A_%a.log
# Two minutes before the limit the training is warned. The log goes on where a requeued job left it.
#SBATCH --signal=USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail

CONFIG=${CONFIG:-}                            # empty: the settings of the run at OUTPUT_DIR, or configs/default.yaml
OUTPUT_DIR=${OUTPUT_DIR:-}                    # empty: as the settings say
PROCESSES=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}   # per node
VIRTUAL_ENV=${VIRTUAL_ENV:-.venv}
FIRST_EXPERT=${FIRST_EXPERT:-0}               # expert of array task 0, for more experts than one array holds

cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"
exec "$VIRTUAL_ENV/bin/python" -u -m launcher.node expert ${CONFIG:+--config "$CONFIG"} \
    ${OUTPUT_DIR:+--output-dir "$OUTPUT_DIR"} --processes "$PROCESSES" --offset "$FIRST_EXPERT"
