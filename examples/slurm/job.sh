# What sft.sbatch and grpo.sbatch share: one torchrun a task, logs, leaving in time, going on after a requeue.
#
# Set before `sbatch` (the environment is passed on):
#   PYTHON       interpreter of the environment with umer1; default .venv/bin/python
#   CONTAINER    image for pyxis/enroot (--container-image); empty: bare. MOUNTS: its --container-mounts, default $PWD:$PWD
#   LOGS         folder of log folders, default logs; a job writes to LOGS/JOB/RUN, RUN counting its requeues from 0
#   MASTER_ADDR, MASTER_PORT   the rendezvous; default the first node and a port made from the job's number

steps=() # process ids of srun, the training's first

# SIGUSR1 comes to this shell alone (--signal=B:USR1@...): srun hands it to the ranks, which save and leave. SIGTERM
# (preemption, scancel) comes to the ranks from Slurm; this shell only has to outlive them.
trap 'echo "time is nearly up: saving"; kill -USR1 "${steps[0]}"' USR1
trap 'echo "asked to leave: saving"' TERM

: "${PYTHON:=.venv/bin/python}" "${LOGS:=logs}" "${MOUNTS:=$PWD:$PWD}" "${CONTAINER:=}"
addresses() { # of the job's nodes, in order
    scontrol show node --oneliner "$SLURM_JOB_NODELIST" | sed -E 's/.* NodeAddr=([^ ]+).*/\1/'
}
: "${MASTER_ADDR:=$(addresses | head -n 1)}"
: "${MASTER_PORT:=$((20000 + SLURM_JOB_ID % 20000))}"
job=$SLURM_JOB_ID # of a job array this task alone: one task's number is the whole array's as well
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
folder=$LOGS/$SLURM_JOB_ID/${SLURM_RESTART_COUNT:-0}
[[ $folder = /* ]] || folder=$PWD/$folder
mkdir -p "$folder" || exit 2

# One math library thread a process unless told otherwise; on GPUs the CPU's work is decoding, which has processes.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# NCCL: a collective that hangs is given up after a while, with the stacks of all ranks in the log folder.
export TORCH_FR_BUFFER_SIZE=2000 TORCH_NCCL_DUMP_ON_TIMEOUT=1 TORCH_NCCL_DEBUG_INFO_TEMP_FILE=$folder/nccl-
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# NCCL_IB_HCA (which InfiniBand cards) and NCCL_SOCKET_IFNAME (which network for the rendezvous) are the cluster's:
# leave them unset where NCCL's own choice works, which `NCCL_DEBUG=INFO` shows.

# The program writes this file when it leaves early, with all of its work saved.
export UMER1_STOPPED_FILE=$folder/stopped
rm -f "$UMER1_STOPPED_FILE" # of a job that had the same number once

# step NAME SRUN-FLAGS... -- COMMAND...   starts a step in the background, its log in NAME-TASK.log
step() {
    local name=$1 flags=()
    shift
    while [ "$1" != -- ]; do flags+=("$1"); shift; done
    shift
    [ -z "$CONTAINER" ] || flags+=("--container-image=$CONTAINER" "--container-mounts=$MOUNTS" "--container-workdir=$PWD")
    srun --kill-on-bad-exit=1 --output="${folder//%/%%}/$name-%t.log" "${flags[@]}" "$@" &
    steps+=($!)
}

# train PROGRAM ARGUMENTS...   after `nodes=(SRUN-FLAGS...)`: one torchrun a task.
train() {
    # torchrun would kill its ranks 30 seconds after SIGTERM, saved or not, and itself on SIGUSR1: it ignores both here
    # (an ignored signal stays ignored over exec), and the ranks, which take them back, leave when they are done.
    step train "${nodes[@]}" -- bash -c '
        trap "" TERM USR1
        exec "$0" -m torch.distributed.run --signals-to-handle SIGINT,SIGHUP,SIGQUIT \
            --nnodes "$SLURM_STEP_NUM_TASKS" --node-rank "$SLURM_PROCID" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
            --master-addr "$1" --master-port "$2" "${@:3}"' \
        "$PYTHON" "$MASTER_ADDR" "$MASTER_PORT" "$@"
}

# Waits for the training and ends the job: with its status, or back into the queue where it was stopped before its end.
finish() {
    local status
    while kill -0 "${steps[0]}" 2> /dev/null; do wait "${steps[0]}"; done # a trapped signal ends `wait` early
    wait "${steps[0]}" # bash keeps the status of what has ended
    status=$?
    [ "${#steps[@]}" = 1 ] || kill "${steps[@]:1}" 2> /dev/null
    echo "training ended with status $status; logs are in $folder"
    # A job that leaves during a preemption's grace time counts as completed: it has to requeue itself. One that was
    # cancelled is not RUNNING any more, and stays out.
    if [ "$status" = 0 ] && [ -e "$UMER1_STOPPED_FILE" ]; then
        status=75 # without a requeue, which ends this shell, the job has failed: `afterok` dependents stay out
        trap - TERM
        if scontrol show job "$job" | grep -q JobState=RUNNING && scontrol requeue "$job"; then sleep 60; fi
    fi
    exit "$status"
}
