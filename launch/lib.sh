# shellcheck shell=bash
# Shared by the batch scripts: they source it and call `train`. Usage: docs/how-to/slurm.md
#
# Settings, all optional, from the environment of sbatch:
#   ROADWORK_DIST_HOME                folder that contains launch/ (default: the one sbatch was called in)
#   ACCELERATE_CONFIG                 accelerate's config: a file, or a name in accelerate_configs/
#   ROADWORK_DIST_PROCESSES_PER_NODE  default: one per GPU, or 1 if the job has no GPUs
#   ROADWORK_DIST_HEAD                address of the first node (default: the one SLURM reports)
#   ROADWORK_DIST_LOGS                folder of the nodes' logs (default: logs)
#   ROADWORK_DIST_GRACE               seconds to wait for the checkpoint when asked to stop (default: 90)
#   ROADWORK_DIST_ENTRY               Python script to train with (default: launch/pretrain.py)

# Checked by the script that sources this file.
home=${home:?set by the script that sources lib.sh}
EXIT_USAGE=2
EXIT_INTERRUPTED=75 # sysexits.h: try again later
# Seconds that other nodes, and the other ranks of the failed node, get to fail by themselves. (A rank that
# waits for a dead one in NCCL does not.)
FAILURE_GRACE=10

say() { printf '%(%F %T)T %s\n' -1 "$*"; }

die() { # message, exit code
    say "ERROR: $1" >&2
    exit "${2:-$EXIT_USAGE}"
}

# train SETTINGS...: train on all nodes of this job, and exit with the result of the training.
train() {
    job=$SLURM_JOB_ID
    # For an array's last task the bare job number means the whole array to `scancel` and `scontrol`.
    [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    start=${SLURM_RESTART_COUNT:-0}
    logs=$(mkdir -p "${ROADWORK_DIST_LOGS:-logs}" && cd "${ROADWORK_DIST_LOGS:-logs}" && pwd)/$SLURM_JOB_NAME-$job
    signs=$logs/.start-$start # files by which the nodes signal this shell
    mkdir -p "$signs"
    rm -rf "${signs:?}"/* # left over if the job number was used before
    find_python
    read_topology
    choose_engine
    choose_entry
    describe "$@"

    asked="" cancelled=""
    trap 'on_request "SLURM sent USR1: preemption, the time limit is near, or scancel --batch"' USR1
    trap 'cancelled=1; say "SLURM ends this job (TERM): scancel, the time limit, or preemption"' TERM
    start_tasks "$@"
    wait_for_tasks
    finish
}

# output_dir DEFAULT SETTINGS...: print the output folder given by the settings.
output_dir() {
    local folder=$1
    shift
    while (($#)); do
        case $1 in
            --output_dir=*) folder=${1#*=} ;;
            --output_dir) folder=${2:-$folder} ;;
        esac
        shift
    done
    printf '%s' "$folder"
}

# Sets `settings` to those of this array task. {task} in them is replaced by the task's number. If none contains
# {task}, the number becomes the seed and each task gets a folder below output_dir.
settings_of_array_task() {
    settings=("${@//\{task\}/$SLURM_ARRAY_TASK_ID}")
    [[ "${settings[*]}" == "$*" ]] || return 0
    settings+=("--seed=$SLURM_ARRAY_TASK_ID")
    settings+=("--output_dir=$(output_dir "runs/$SLURM_JOB_NAME" "$@")/task-$SLURM_ARRAY_TASK_ID")
}

find_python() {
    if [[ -z ${VIRTUAL_ENV:-} && -x $home/.venv/bin/accelerate ]]; then PATH=$home/.venv/bin:$PATH; fi
    command -v accelerate >/dev/null || die "no 'accelerate' on PATH of $(hostname): activate the environment \
that roadwork-dist is installed in before sbatch, or run 'make install' in $home"
}

# Nodes, processes, and the address of the rendezvous.
read_topology() {
    nodes=$SLURM_JOB_NUM_NODES
    gpus=${SLURM_GPUS_ON_NODE:-0}
    per_node=${ROADWORK_DIST_PROCESSES_PER_NODE:-$((gpus > 0 ? gpus : 1))}
    [[ $per_node =~ ^[1-9][0-9]*$ ]] ||
        die "ROADWORK_DIST_PROCESSES_PER_NODE is '$per_node', expected a whole number from 1"
    processes=$((nodes * per_node))
    local cpus=${SLURM_CPUS_ON_NODE:-1}
    threads=${OMP_NUM_THREADS:-$((cpus > per_node ? cpus / per_node : 1))}
    ((cpus >= per_node)) || say "WARNING: $cpus CPU(s) a node for $per_node processes is slow: \
sbatch --cpus-per-gpu=8, --cpus-per-task=$((8 * per_node)) or --exclusive"

    local first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # The name may not resolve on other nodes; the address that SLURM itself uses is reachable.
    head=${ROADWORK_DIST_HEAD:-$(scontrol show node "$first" | grep -oP 'NodeAddr=\K\S+' || true)}
    head=${head:-$first}
    # Jobs and array tasks on the same node have different numbers. Ports are below the ephemeral range (32768).
    # This shell runs on the first node, so it can check whether a port is in use.
    port=$((10000 + SLURM_JOB_ID % 20000))
    while (: </dev/tcp/127.0.0.1/"$port") 2>/dev/null; do port=$((port + 1)); done
}

# Accelerate's config; by default data parallel with one process per GPU (or CPU process).
choose_engine() {
    engine=${ACCELERATE_CONFIG:-}
    if [[ -z $engine ]]; then
        # Written explicitly, because accelerate would otherwise read the one in the user's home.
        engine=$logs/accelerate.yaml
        local kind=MULTI_GPU # also on CPUs: other types start a single process there
        ((processes > 1)) || kind="'NO'"
        printf '%s\n' "compute_environment: LOCAL_MACHINE" "distributed_type: $kind" "mixed_precision: 'no'" \
            "use_cpu: false" >"$engine"
    elif [[ ! -f $engine ]]; then
        local named=$home/accelerate_configs/$engine.yaml
        [[ -f $named ]] || die "ACCELERATE_CONFIG is '$engine': there is neither such a file nor $named"
        engine=$named
    fi
}

choose_entry() {
    entry=("${ROADWORK_DIST_ENTRY:-$home/launch/pretrain.py}")
    if [[ -f ${entry[0]} ]]; then return; fi
    [[ -z ${ROADWORK_DIST_ENTRY:-} ]] || die "ROADWORK_DIST_ENTRY is '$ROADWORK_DIST_ENTRY': no such file in $PWD"
    entry=(--module roadwork_dist.cli.main pretrain) # installed without a clone
}

describe() {
    say "job $job ($SLURM_JOB_NAME), start $start: $processes processes on $nodes node(s) ($SLURM_JOB_NODELIST), \
$gpus GPUs a node, meeting at $head:$port"
    say "engine $engine"
    say "settings: ${*:-(none: the demo preset)}"
    say "output of each node: $logs/start-$start-task-*.log"
}

start_tasks() {
    local options=(
        --config_file "$engine" --num_machines "$nodes" --num_processes "$processes"
        --main_process_ip "$head" --main_process_port "$port" --same_network
        --num_cpu_threads_per_process "$threads" --tee 3 --log_dir "$signs/ranks"
    )
    export ROADWORK_DIST_SIGNS=$signs
    export PYTHONUNBUFFERED=1
    # shellcheck disable=SC2016  # expanded by torchrun
    export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[rank ${rank}] '
    # SLURM signals every process of a task. torchrun (inside accelerate) would end its ranks on TERM
    # and would be killed by USR1, so it must ignore both; the ranks get them directly, and save. Then
    # PET_SHUTDOWN_TIMEOUT limits only how long ranks outlive one that failed.
    export PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT PET_SHUTDOWN_TIMEOUT=$FAILURE_GRACE
    # Otherwise the one task per node, with all its ranks and loader processes, is bound to a single core.
    local unbound=()
    if scontrol show config | grep -qE '^TaskPlugin .*(affinity|cgroup)'; then unbound=(--cpu-bind=none); fi
    # In single quotes, because $SLURM_NODEID is set per task. In this shell it is always 0.
    # shellcheck disable=SC2016
    srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 "${unbound[@]}" \
        --open-mode=append --output="$logs/start-$start-task-%t-%N.log" bash -c '
            trap "touch \"$ROADWORK_DIST_SIGNS/asked\"" USR1
            trap : TERM
            (trap "" USR1 TERM && exec accelerate launch --machine_rank "$SLURM_NODEID" "$@") &
            while code=0; wait $! || code=$?; kill -0 $! 2>/dev/null; do :; done
            ((code == 0)) || echo "$SLURMD_NODENAME" >"$ROADWORK_DIST_SIGNS/failed-$SLURM_NODEID"
            if ((code != 0)) && [[ -e $ROADWORK_DIST_SIGNS/asked ]]; then
                echo "Asked to stop: ranks with exit code 75 have saved. torchrun reports that as a failure (above)."
            fi
            exit "$code"
        ' task "${options[@]}" "${entry[@]}" "$@" &
    tasks=$!
}

on_request() { # why
    [[ -z $asked ]] || return 0
    asked=$SECONDS
    say "$1"
    say "asking all ranks to save after the current step and to stop within $((${ROADWORK_DIST_GRACE:-90})) s"
    # Signals the job steps, not this shell.
    scancel --signal=USR1 "$job" || say "WARNING: scancel --signal=USR1 $job failed"
}

wait_for_tasks() {
    local failed=""
    while kill -0 "$tasks" 2>/dev/null; do
        sleep 0.5
        if [[ -z $failed ]] && compgen -G "$signs/failed-*" >/dev/null; then failed=$SECONDS; fi
        if [[ -n $failed ]] && ((SECONDS - failed > FAILURE_GRACE)); then
            say "killing the ranks that outlive the failed one"
            scancel --signal=KILL "$job" || true
            failed=$SECONDS
        elif [[ -n $asked ]] && ((SECONDS - asked > ${ROADWORK_DIST_GRACE:-90})); then
            say "WARNING: the ranks have not stopped within ${ROADWORK_DIST_GRACE:-90} s: resuming from the \
previous checkpoint"
            scancel --signal=KILL "$job" || true
            asked=$SECONDS
        fi
    done
    code=0
    wait "$tasks" || code=$?
    # Signals that do not reach this shell: scancel --signal=USR1 JOB, or preemption without a user signal.
    if [[ -z $asked && -e $signs/asked ]]; then asked=$SECONDS; fi
    if scontrol show job "$job" | grep -qP 'PreemptTime=(?!None)'; then asked=${asked:-$SECONDS}; fi
}

finish() {
    if ((code == 0)); then
        rm -rf "$signs" # with torchrun's copies of the ranks' output
        say "done"
        exit 0
    elif [[ -n $cancelled ]]; then
        say "ended by SLURM; submit again to resume from the newest checkpoint"
        exit "$EXIT_INTERRUPTED"
    elif [[ -n $asked ]]; then
        local saved
        saved=$(rank_output | grep 'state saved' | head -n 1 || true)
        say "all ranks have stopped (srun reports that as an error): ${saved:-WARNING: none reported a save, see \
$logs/start-$start-task-*.log}"
        trap '' TERM
        say "requeueing: resumes from the newest checkpoint when SLURM restarts the job, after minutes at the earliest"
        if scontrol requeue "$job"; then sleep 60; fi # until SLURM ends this shell
        say "NOT requeued (--no-requeue?): submit again to resume from the newest checkpoint"
        exit "$EXIT_INTERRUPTED"
    fi
    tell_failure
    exit "$code"
}

# Report the nodes that failed, and each rank's last error; ranks that only lost a peer come last.
tell_failure() {
    say "FAILED with exit code $code"
    local sign
    for sign in "$signs"/failed-*; do
        [[ -e $sign ]] || continue # no match: all were killed (out of memory, scancel)
        local log=("$logs/start-$start-task-${sign##*-}"-*.log)
        # torchrun's report on the first rank that failed on that node.
        say "failed on $(<"$sign"): $(awk '/Root Cause/ { n = 1 } n && /rank +:|exitcode +:/ { $1 = $1; print }' \
            "${log[@]}" | paste -sd ' '), see ${log[*]}"
    done
    local errors peers='LostPeerError|gloo|NCCL|TCPStore|DistNetworkError|onnection (closed|reset|refused)'
    # torch repeats the rank in front of exceptions.
    errors=$(rank_output | sed -E 's/^(\[rank [0-9]+\]) \[rank[0-9]+\]: /\1 /' |
        grep -E '^\[rank [0-9]+\] ([A-Za-z_.]*(Error|Exception)\b|error:|terminate called)' |
        awk '{ last[$2] = $0 } END { for (rank in last) print last[rank] }' | sort -V || true)
    { grep -vE "$peers" <<<"$errors" || true; grep -E "$peers" <<<"$errors" || true; } | head -n 16
}

rank_output() { cat "$logs/start-$start-task"-*.log 2>/dev/null; }
