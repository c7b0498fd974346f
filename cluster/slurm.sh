#!/usr/bin/env bash
# Pretraining on 1..N nodes of 8 GPUs. From the checkout, on a file system that all nodes share:
#
#   sbatch [--nodes=4] [--time=...] [--partition=...] cluster/slurm.sh base corpus=/shared/corpus \
#       init.text=/shared/xlm-roberta-base init.vision=/shared/vit-base-patch16-224 [path=value ...]
#
# The same line again resumes. Runs go to $POLYGLANCE_RUNS, or runs/ of the checkout.
# Five minutes before the time limit the run saves and ends with code 143; so it does by
# `scancel --batch --signal=TERM JOB` (scancel alone kills it). A job that Slurm requeues goes on by itself.
#SBATCH --job-name=polyglance
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
# symmetric-run ends with `ray stop`, which stops every Ray process of yours on a node: no other job may be there
#SBATCH --exclusive
# B: to this script alone, which passes it on; without, every process of Ray gets it, and the cluster is gone first
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

recipe=${1:?usage: sbatch cluster/slurm.sh RECIPE [path=value ...]}
shift
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}"
source .venv/bin/activate

nodes=$SLURM_JOB_NUM_NODES
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=${hosts[0]}:6379
export PYTHONPATH=$PWD # workers on other nodes import the checkout
export POLYGLANCE_RUNS=${POLYGLANCE_RUNS:-$PWD/runs}
mkdir -p "$POLYGLANCE_RUNS"

# one token for all nodes, gone with the job
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$POLYGLANCE_RUNS/.token-$SLURM_JOB_ID
trap 'rm -f "$RAY_AUTH_TOKEN_PATH" "$RAY_AUTH_TOKEN_PATH.code" "$RAY_AUTH_TOKEN_PATH.pid"' EXIT
export POLYGLANCE_STOP_SECONDS=${POLYGLANCE_STOP_SECONDS:-300} # that a save may take: as --signal says
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH")
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300 # seconds for the slowest node
export RAY_USAGE_STATS_ENABLED=0

# RAY_ADDRESS for the command only: `ray start` may not see it. One task a node, with all its cores. The command's exit
# code is kept in a file: srun's is also that of nodes which are told to end, and symmetric-run's is 0 if no head came up.
srun --ntasks="$nodes" --cpus-per-task="$SLURM_CPUS_ON_NODE" --cpu-bind=none --wait=20 \
	ray symmetric-run --address "$address" --min-nodes "$nodes" --num-gpus=8 --disable-usage-stats -- \
	bash -c 'RAY_ADDRESS=$0 python -m pretrain "$@" & echo $! >"$RAY_AUTH_TOKEN_PATH.pid"
		wait $!; echo $? >"$RAY_AUTH_TOKEN_PATH.code"' \
	"$address" "$recipe" "workers=$((8 * nodes))" "$@" &
# a notice goes to the run's driver, which is on this node, the first one: srun would answer it by SIGKILL
trap '[ -s "$RAY_AUTH_TOKEN_PATH.pid" ] && kill -TERM "$(cat "$RAY_AUTH_TOKEN_PATH.pid")" || true' TERM USR1
while kill -0 $! 2>/dev/null; do wait $! || true; done
[ -s "$RAY_AUTH_TOKEN_PATH.code" ] || { echo "error: the Ray cluster did not start, or its head was lost; see above" >&2; exit 1; }
exit "$(cat "$RAY_AUTH_TOKEN_PATH.code")"
