# shellcheck shell=bash
# on_ray COMMAND...: one Ray over the nodes of a Slurm job, and the command on the first of them, with its exit status. The .sbatch files source it.
# Variables: RAYSYS_ENV, a virtual environment with raysys that every node sees (python3.11 -m venv; pip install -c constraints.txt '.[gs,hf,s3]').
# Also HEAD, the first node's address, where `hostname -I` does not begin with the one that the others reach. Files: $HOME on every node.
: "${RAYSYS_ENV:?set RAYSYS_ENV to a virtual environment with raysys that every node sees}"
: "${SLURM_JOB_ID:?start this with sbatch}"
if [[ ! -x $RAYSYS_ENV/bin/ray ]]; then
  echo "RAYSYS_ENV=$RAYSYS_ENV holds no bin/ray: it must be a virtual environment with raysys that every node sees" >&2
  exit 2
fi

threads_per_gpu() { # CPUs of a node for each of its GPUs, less $1 for other work; at least 1
  local threads=$((${SLURM_CPUS_ON_NODE:?} / ${SLURM_GPUS_ON_NODE:?ask for GPUs, as --gpus-per-node=8} - $1))
  echo $((threads > 1 ? threads : 1))
}

on_ray() {
  local nodes=${SLURM_JOB_NUM_NODES:?} cpus=${SLURM_CPUS_ON_NODE:?} gpus=${SLURM_GPUS_ON_NODE:-0} status=0 step ended
  HEAD=${HEAD:-$(hostname -I | cut -d ' ' -f 1)} # this script runs on the first node
  export PATH="$RAYSYS_ENV/bin:$PATH" RAY_USAGE_STATS_ENABLED=0
  export RAY_TMPDIR="/tmp/ray-$SLURM_JOB_ID" # on each node; short, for sockets lie there
  export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600 # s until all nodes must be up
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$HOME/.ray/raysys-$SLURM_JOB_ID.token"
  unset RAY_ADDRESS RAY_AUTH_TOKEN # of another cluster
  ended="$RAY_AUTH_TOKEN_PATH.ended"
  (
    umask 077
    mkdir -p "$HOME/.ray"
    rm -f "$ended"
    python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH"
  )
  # shellcheck disable=SC2064 # the paths of now
  trap "rm -f '$RAY_AUTH_TOKEN_PATH' '$ended'" EXIT
  trap 'echo "the time is up: queued again"; scontrol requeue "$SLURM_JOB_ID"' USR1 # --signal; Slurm itself requeues what it preempts

  # symmetric-run says 0 where the head does not come up: the file tells that the command ended well.
  # shellcheck disable=SC2016 # $0 and $@ are the inner shell's
  srun --no-kill --ntasks-per-node=1 --cpus-per-task="$cpus" \
    ray symmetric-run --address "$HEAD:6379" --min-nodes "$nodes" --num-cpus "$cpus" --num-gpus "$gpus" -- \
    env RAY_ADDRESS="$HEAD:6379" bash -c '"$@" && touch "$0"' "$ended" "$@" &
  step=$!
  wait "$step" || true # USR1 ends this one early
  wait "$step" || status=$?
  if ((status == 0)) && [[ ! -e $ended ]]; then
    echo "Ray did not come up on $HEAD" >&2
    status=1
  fi
  if ((status == 0)); then # else Ray's logs stay there, to be read
    srun --no-kill --ntasks-per-node=1 --time=2 rm -rf "$RAY_TMPDIR" || true
  fi
  return "$status"
}
