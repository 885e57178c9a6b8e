#!/bin/bash
# Assemble and calibrate the model of a run whose experts are finished; add EVALUATE=yes to evaluate it as well:
#     sbatch slurm/assemble.sh
#     CONFIG=my.yaml OUTPUT_DIR=runs/mine EVALUATE=yes sbatch slurm/assemble.sh
# With cluster.min_experts in the settings it goes on without experts that are missing.

#SBATCH --job-name=assemble
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
##SBATCH --gpus-per-node=1
##SBATCH --partition=gpu
#SBATCH --time=120
#SBATCH --output=slurm-%x-%j.log
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail

CONFIG=${CONFIG:-}                            # empty: the settings of the run at OUTPUT_DIR, or configs/default.yaml
OUTPUT_DIR=${OUTPUT_DIR:-}                    # empty: as the settings say
EVALUATE=${EVALUATE:-no}
VIRTUAL_ENV=${VIRTUAL_ENV:-.venv}

cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"
node=("$VIRTUAL_ENV/bin/python" -u -m launcher.node)
options=(${CONFIG:+--config "$CONFIG"} ${OUTPUT_DIR:+--output-dir "$OUTPUT_DIR"})
"${node[@]}" assemble "${options[@]}"
if [ "$EVALUATE" = yes ]; then
    "${node[@]}" evaluate "${options[@]}"
fi
