#!/bin/bash
# One training run on Slurm: `sbatch slurm.sh [ray-ctrl train arguments]`, with ray-ctrl installed on the nodes.
# Before the time limit it writes a checkpoint and queues itself again; sent again, it continues from the last one.
# Change: partition, nodes, GPUs a node, and the two folders below.
#SBATCH --job-name=ray-ctrl
#SBATCH --partition=gpu
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --mem=128G
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=ray-ctrl-%j.log

set -euo pipefail

SHARED=${RAY_CTRL_SHARED:-$HOME/ray-ctrl}                # reachable from all nodes: model files and run folders
export STORE=${RAY_CTRL_STORE:-${TMPDIR:-/tmp}/ray-ctrl} # on each node's own disk: the outcome store
RUN=$SHARED/runs/${RAY_CTRL_RUN:-job-$SLURM_JOB_ID}
export HF_HOME=$SHARED/models OMP_NUM_THREADS=1
# For nodes that only this job uses; on shared nodes set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN.
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-disabled}

CPUS=${SLURM_CPUS_PER_TASK:-1}
GPUS=${SLURM_GPUS_ON_NODE:-0}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$((20000 + SLURM_JOB_ID % 20000)) # jobs that share a node keep apart
export CPUS GPUS HEAD PORT
# One GPU is for the driver, which runs the model to profile the device.
RUNNERS=${RAY_CTRL_RUNNERS:-$((SLURM_JOB_NUM_NODES * GPUS - 1))}

mkdir -p "$SHARED/runs" "$SHARED/models"
# shellcheck disable=SC2016  # expanded on the nodes
srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$CPUS" bash -c '
    mkdir -p "$STORE"
    if [ "$SLURM_NODEID" = 0 ]; then
        exec ray start --head --port="$PORT" --num-cpus="$CPUS" --num-gpus="$GPUS" --block
    fi
    until (exec 3<>"/dev/tcp/$HEAD/$PORT") 2>/dev/null; do sleep 1; done
    exec ray start --address="$HEAD:$PORT" --num-cpus="$CPUS" --num-gpus="$GPUS" --block' &
RAY=$!
trap 'kill -TERM "$RAY" 2>/dev/null || true' EXIT
until (exec 3<>"/dev/tcp/$HEAD/$PORT") 2>/dev/null; do
    kill -0 "$RAY" # Ray did not start: leave
    sleep 1
done

ADDRESS=(runners.address="$HEAD:$PORT" runners.connect_timeout_s=600)
if [ -f "$RUN/run.json" ]; then
    ARGUMENTS=(--resume --run-dir "$RUN" "${ADDRESS[@]}")
else
    ARGUMENTS=(--run-dir "$RUN" "${ADDRESS[@]}" store.path="$STORE/outcomes.sqlite")
    if [ $# -gt 0 ]; then
        ARGUMENTS+=("$@")
    else
        ARGUMENTS+=(--preset molmoe-1b runners.count="$RUNNERS" grpo.groups_per_iteration=$((8 * RUNNERS)))
    fi
fi
ray-ctrl train "${ARGUMENTS[@]}" &
TRAIN=$!
trap 'kill -TERM "$TRAIN" 2>/dev/null || true' TERM
STATUS=0
wait "$TRAIN" || STATUS=$?
if kill -0 "$TRAIN" 2>/dev/null; then # the signal ended the wait: the run is still writing its checkpoint
    STATUS=0
    wait "$TRAIN" || STATUS=$?
fi
if [ "$STATUS" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$STATUS"
