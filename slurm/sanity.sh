#!/bin/bash
# Check nodes before spending GPU hours: python and torch, every GPU against the CPU, the network between all processes,
# then model, data and a short training. The job ends with 0 when all is well:
#     sbatch slurm/sanity.sh
#     CONFIG=my.yaml sbatch --nodes=4 --gpus-per-node=8 slurm/sanity.sh
#     TEST=m1 QUICK=yes sbatch slurm/sanity.sh

#SBATCH --job-name=sanity
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
##SBATCH --gpus-per-node=1
##SBATCH --partition=gpu
#SBATCH --time=10
#SBATCH --output=slurm-%x-%j.log

set -euo pipefail

CONFIG=${CONFIG:-}                            # empty: the settings of the run at OUTPUT_DIR, or configs/default.yaml
OUTPUT_DIR=${OUTPUT_DIR:-}                    # empty: as the settings say; prepared data there is checked too
TEST=${TEST:-all}                             # m0, m1, m2 or all
QUICK=${QUICK:-no}
PROCESSES=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}   # per node
VIRTUAL_ENV=${VIRTUAL_ENV:-.venv}

cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"
python=$VIRTUAL_ENV/bin/python
failed=0

# All nodes at once: torchrun on each, meeting at an address and port of this job.
meeting=$("$python" -c "from launcher.allocation import meeting_point
print(*meeting_point($SLURM_JOB_NUM_NODES, $SLURM_JOB_ID, ${SLURM_RESTART_COUNT:-0}))")
read -r address port <<< "$meeting"
# SLURM_NODEID is that of the node where srun starts the line, so it must not be replaced here.
# shellcheck disable=SC2016
srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c '
    exec "$0" -u -m modularforge.training.elastic --nnodes="$SLURM_JOB_NUM_NODES" --node-rank="$SLURM_NODEID" \
        --nproc-per-node="$1" --master-addr="$2" --master-port="$3" -m modularforge.sanity.node' \
    "$python" "$PROCESSES" "$address" "$port" || failed=1

options=(${CONFIG:+--config "$CONFIG"} --test "$TEST" ${OUTPUT_DIR:+--output-dir "$OUTPUT_DIR"})
if [ "$QUICK" = yes ]; then
    options+=(--quick)
fi
"$python" -u -m modularforge sanity "${options[@]}" || failed=1
exit $failed
