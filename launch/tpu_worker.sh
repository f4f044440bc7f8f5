#!/usr/bin/env bash
# The part of launch/tpu_pod.sh that runs on each worker of a TPU VM: bash launch/tpu_worker.sh ACTION
#   install              create .venv with the [tpu] extra; installs Python 3.12 if the machine's is older than 3.11
#   mount BUCKET         mount a Cloud Storage bucket as bucket/
#   run JOB COMMAND...   start JOB, or follow it if it was started before; returns its exit code. The job does not
#                        depend on the connection: gcloud repeats a command after a lost one, and must find the same job
#   stop                 send SIGTERM to running jobs, and mark them as stopped, so that they are not restarted
#   log [JOB]            print the output of JOB (default: the newest job)
#   status               list the jobs
set -euo pipefail
cd "$(dirname "$0")/.."
jobs=$HOME/sr3_jobs # one folder per job: pid, log, code once it has ended, stopped if by `stop`

fail() {
    echo "tpu_worker.sh: $1" >&2
    exit 2
}

suitable() {
    "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

install() {
    if ! suitable python3.13 && ! suitable python3.12 && ! suitable python3.11 && ! suitable python3; then
        python3 -m pip install --user --quiet uv
        "$HOME/.local/bin/uv" python install --quiet 3.12
        SR3_PYTHON=$("$HOME/.local/bin/uv" python find 3.12)
        export SR3_PYTHON
    fi
    bash launch/setup_venv.sh tpu
}

mount() {
    if mountpoint -q bucket; then return; fi
    command -v gcsfuse >/dev/null || fail "gcsfuse is not installed: see docs/pods.md."
    mkdir -p bucket
    # Without the second option a folder is not renamed in a bucket without hierarchical namespace, which checkpoints need.
    gcsfuse --implicit-dirs --rename-dir-limit=1000000 "$1" bucket
}

running() { # running JOB
    [[ -s $jobs/$1/pid && ! -e $jobs/$1/code ]] && kill -0 "$(<"$jobs/$1/pid")" 2>/dev/null
}

names() { # all jobs, newest first
    if [[ -d $jobs ]]; then ls -t "$jobs"; fi
}

run() {
    local job=$1 folder=$jobs/$1 other code
    mkdir -p "$jobs"
    exec 9>"$HOME/.sr3_jobs_lock"
    flock 9
    if [[ ! -e $folder ]]; then
        for other in $(names); do
            if running "$other"; then fail "job $other is running: stop it, or follow it with --job $other."; fi
        done
        join
        mkdir "$folder"
        # In its own session, so that it survives the connection.
        setsid bash launch/tpu_worker.sh keep "$@" >"$folder/log" 2>&1 </dev/null 9>&- &
        disown
        until [[ -s $folder/pid ]]; do sleep 0.1; done
    fi
    exec 9>&-
    if running "$job"; then
        tail -n +1 -s 0.2 -F --pid="$(<"$folder/pid")" "$folder/log" 2>/dev/null
        for _ in {1..20}; do # the code is written shortly after the process has ended
            if [[ -e $folder/code ]]; then break; fi
            sleep 0.1
        done
    else
        cat "$folder/log"
    fi
    code=137 # not written: the machine went down
    if [[ -e $folder/code ]]; then code=$(<"$folder/code"); fi
    if [[ -e $folder/stopped ]]; then echo "tpu_worker.sh: stopped"; fi
    echo "tpu_worker.sh: exit code $code"
    return "$code"
}

metadata() { # an attribute of this Cloud TPU VM
    curl -sSf -H 'Metadata-Flavor: Google' "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

join() { # set up jax.distributed; the coordinator is on the first worker
    local endpoints first
    endpoints=$(metadata worker-network-endpoints) # HOST,HOST,... or NAME:ID:HOST,...
    first=${endpoints%%,*}
    JAX_COORDINATOR_ADDRESS=${first##*:}:8482
    JAX_NUM_PROCESSES=$(tr ',' '\n' <<<"$endpoints" | wc -l)
    JAX_PROCESS_ID=$(metadata agent-worker-number)
    export JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES JAX_PROCESS_ID
}

keep() { # keep JOB COMMAND...: run it and record its pid and exit code
    local folder=$jobs/$1 code=0
    PATH=$PWD/.venv/bin:$PATH "${@:2}" &
    echo $! >"$folder/pid"
    wait $! || code=$?
    echo "$code" >"$folder/code.part"
    mv "$folder/code.part" "$folder/code"
}

stop() {
    local job
    for job in $(names); do
        if running "$job"; then
            touch "$jobs/$job/stopped"
            kill -TERM "$(<"$jobs/$job/pid")"
        fi
    done
}

log() {
    local all job
    all=$(names)
    job=${1:-${all%%$'\n'*}}
    [[ -e $jobs/$job/log ]] || fail "job '$job' does not exist."
    cat "$jobs/$job/log"
}

status() {
    local job
    for job in $(names); do
        if running "$job"; then
            echo "$(hostname) $job is running: $(tail -n 1 "$jobs/$job/log")"
        else
            echo "$(hostname) $job ended with exit code $(cat "$jobs/$job/code" 2>/dev/null || echo 137)"
        fi
    done
}

case ${1:-} in
install | mount | run | keep | stop | log | status) "$@" ;;
*) fail "unknown action '${1:-}'." ;;
esac
