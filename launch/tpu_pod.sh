#!/usr/bin/env bash
# Manages a Cloud TPU VM pod with gcloud: bash launch/tpu_pod.sh ACTION [OPTIONS] [-- COMMAND...]
#   create   create the TPU, unless it exists, and wait until it is ready
#   copy     copy the files tracked by git (their working-tree versions) to every worker, install, mount the bucket
#   run      run COMMAND (such as: sr3 train ...) on every worker, in ~/sr3_jax, and print the output of worker 0. Ctrl-C
#            does not stop it; `run` with the same --job follows it again
#   stop     send SIGTERM to running jobs: sr3 saves and exits with 143
#   logs     download the output of a job (default: the newest) from every worker to out/tpu/NAME
#   status   print the TPU's state and the jobs of each worker
#   delete   delete the TPU and its disks
#   all      create, copy, run; restart after 143, 1 or death by a signal, at most SR3_MAX_RESTARTS times (20);
#            a preempted TPU is created again
# Options, or environment variables:
#   --name SR3_TPU_NAME (default sr3)    --zone SR3_TPU_ZONE    --type SR3_TPU_TYPE, such as v5litepod-256
#   --version SR3_TPU_VERSION, the runtime, such as v2-alpha-tpuv5-lite
#   --bucket SR3_TPU_BUCKET, a Cloud Storage bucket, mounted as ~/sr3_jax/bucket on every worker
#   --job JOB, the job's name (default: the time)    --spot SR3_TPU_SPOT=1    --queued SR3_TPU_QUEUED=1
#   --dry-run, print every command and run none
# Project and account are those of gcloud. Exit code: that of COMMAND (2 if any worker's is 2), 2 for a user error.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
    echo "tpu_pod.sh: $1" >&2
    exit 2
}

action=${1:-}
case $action in
create | copy | run | stop | logs | status | delete | all) shift ;;
*) fail "ACTION must be create, copy, run, stop, logs, status, delete or all, got '$action'." ;;
esac
name=${SR3_TPU_NAME:-sr3} zone=${SR3_TPU_ZONE:-} type=${SR3_TPU_TYPE:-} version=${SR3_TPU_VERSION:-}
bucket=${SR3_TPU_BUCKET:-} spot=${SR3_TPU_SPOT:-} queued=${SR3_TPU_QUEUED:-} job='' dry_run=''
restarts=${SR3_MAX_RESTARTS:-20} poll=${SR3_TPU_POLL:-30}
while (($# > 0)); do
    option=$1
    shift
    case $option in
    --) break ;;
    --spot) spot=1 ;;
    --queued) queued=1 ;;
    --dry-run) dry_run=1 ;;
    --name | --zone | --type | --version | --bucket | --job)
        [[ -n ${1:-} && $1 != -* ]] || fail "$option needs a value."
        printf -v "${option#--}" %s "$1"
        shift
        ;;
    *) fail "unknown option '$option'; the command comes after '--'." ;;
    esac
done
[[ -n $zone ]] || fail "--zone is missing: give it, or set SR3_TPU_ZONE."
[[ $restarts =~ ^[0-9]+$ ]] || fail "SR3_MAX_RESTARTS must be an integer, got '$restarts'."
[[ $name$job =~ ^[a-zA-Z0-9-]+$ ]] || fail "--name and --job may contain letters, digits and '-', got '$name' and '$job'."
case $action in
create | all)
    [[ -n $type && -n $version ]] || fail "$action needs --type and --version (or SR3_TPU_TYPE and SR3_TPU_VERSION)."
    ;;
esac
case $action in
run | all)
    (($# > 0)) || fail "$action needs a command after '--'."
    job=${job:-$(date +%Y%m%d-%H%M%S)}
    ;;
*) (($# == 0)) || fail "$action takes no command, got '$*'." ;;
esac
if [[ -z $dry_run ]]; then
    command -v gcloud >/dev/null || fail "gcloud was not found: install the Google Cloud CLI, or use --dry-run."
    [[ -n $(gcloud auth list --filter=status:ACTIVE --format='value(account)' 2>/dev/null) ]] ||
        fail "gcloud is not logged in: run 'gcloud auth login', or use --dry-run."
fi

quoted() { # the words, quoted for a shell
    local word line='' quote="'\\''"
    for word in "$@"; do
        case $word in
        '' | *[!a-zA-Z0-9_./:=@%+,-]*) line+=" '${word//\'/$quote}'" ;;
        *) line+=" $word" ;;
        esac
    done
    echo "${line# }"
}

do_it() {
    if [[ -n $dry_run ]]; then
        quoted "$@"
    else
        "$@"
    fi
}

tpus() {
    do_it gcloud compute tpus "$@"
}

on_workers() { # on_workers COMMAND [OPTION...]: run a command on each worker
    tpus tpu-vm ssh "$name" --zone="$zone" --worker=all "${@:2}" --command "$1"
}

state_of() { # state_of tpu-vm|queued-resources: empty if it does not exist
    local field=state errors state
    if [[ $1 == queued-resources ]]; then field=state.state; fi
    if [[ -n $dry_run ]]; then return; fi
    errors=$(mktemp)
    if state=$(gcloud compute tpus "$1" describe "$name" --zone="$zone" --format="value($field)" 2>"$errors"); then
        echo "$state"
    elif ! grep -q NOT_FOUND "$errors"; then
        cat "$errors" >&2
        rm "$errors"
        return 1
    fi
    rm "$errors"
}

create() {
    local state extra=()
    state=$(state_of tpu-vm)
    case $state in
    READY)
        echo "tpu_pod.sh: $name already exists."
        return
        ;;
    PREEMPTED | TERMINATED) delete ;; # it cannot be restarted
    esac
    if [[ -n $spot ]]; then extra=(--spot); fi
    if [[ -z $queued ]]; then
        tpus tpu-vm create "$name" --zone="$zone" --accelerator-type="$type" --version="$version" \
            ${extra[@]+"${extra[@]}"}
        return
    fi
    state=$(state_of queued-resources)
    case $state in FAILED | SUSPENDED) delete && state='' ;; esac
    if [[ -z $state ]]; then
        tpus queued-resources create "$name" --node-id="$name" --zone="$zone" --accelerator-type="$type" \
            --runtime-version="$version" ${extra[@]+"${extra[@]}"}
    fi
    if [[ -n $dry_run ]]; then
        tpus queued-resources describe "$name" --zone="$zone" --format='value(state.state)'
        return
    fi
    while true; do
        state=$(state_of queued-resources)
        case $state in
        ACTIVE) return ;;
        '' | FAILED | SUSPENDED) fail "the queued resource $name is '$state': delete it and create it again." ;;
        esac
        echo "tpu_pod.sh: $(date +%H:%M) the queued resource $name is $state."
        sleep "$poll"
    done
}

copy() {
    local archive=out/tpu/sr3_jax.tar.gz
    [[ -e .git ]] || fail "copy sends the files tracked by git, but this is not a git repository: run 'git init' and 'git add .'."
    do_it mkdir -p out/tpu
    if [[ -n $dry_run ]]; then
        echo "git ls-files -z | tar -czf $archive --null -T -"
    else
        git ls-files -z | tar -czf "$archive" --null -T -
    fi
    tpus tpu-vm scp "$archive" "$name:sr3_jax.tar.gz" --zone="$zone" --worker=all
    on_workers "mkdir -p sr3_jax && tar -xzf sr3_jax.tar.gz -C sr3_jax && bash sr3_jax/launch/tpu_worker.sh install"
    if [[ -n $bucket ]]; then on_workers "bash sr3_jax/launch/tpu_worker.sh mount $(quoted "$bucket")"; fi
}

follow=''
unfollow() {
    if [[ -n $follow ]]; then kill "$follow" 2>/dev/null || true; fi
    follow=''
}
trap unfollow EXIT

run() { # run COMMAND..., as $job
    local folder=out/tpu/$name/$job code=0
    do_it mkdir -p "$folder"
    if [[ -z $dry_run ]]; then
        echo "tpu_pod.sh: job $job, output of every worker in $folder."
        rm -f "$folder"/*.log
        : >"$folder/0.log"
        tail -n +1 -F "$folder/0.log" 2>/dev/null &
        follow=$!
    fi
    on_workers "bash sr3_jax/launch/tpu_worker.sh run $(quoted "$job" "$@")" --output-directory="$folder" || code=$?
    if [[ -z $dry_run ]]; then
        sleep 0.5 # wait for the last lines
        unfollow
        # gcloud returns the code of one worker; the last line of each log has its own.
        if grep -qsx "tpu_worker.sh: exit code 2" "$folder"/*.log; then code=2; fi
        echo "tpu_pod.sh: job $job ended with exit code $code."
    fi
    return "$code"
}

logs() {
    local folder=out/tpu/$name/${job:-newest}
    do_it mkdir -p "$folder"
    on_workers "bash sr3_jax/launch/tpu_worker.sh log${job:+ $job}" --output-directory="$folder"
}

status() {
    tpus tpu-vm describe "$name" --zone="$zone" --format='value(state,health)'
    on_workers "bash sr3_jax/launch/tpu_worker.sh status"
}

delete() {
    local kind=tpu-vm extra=()
    if [[ -n $queued ]]; then kind=queued-resources extra=(--force); fi
    if [[ -n $dry_run || -n $(state_of "$kind") ]]; then
        tpus "$kind" delete "$name" --zone="$zone" ${extra[@]+"${extra[@]}"} --quiet
    else
        echo "tpu_pod.sh: $name does not exist."
    fi
}

all() {
    local restart=0 first=$job code state
    create
    copy
    while true; do
        code=0
        run "$@" || code=$?
        # Restart after 143 and other signals (137, 134), 1 (a lost machine) and 255 (a lost connection).
        ((code == 1 || code >= 129 && code != 130)) && ((restart < restarts)) || return "$code"
        ((++restart))
        echo "tpu_pod.sh: restart $restart of at most $restarts."
        while true; do
            state=$(state_of tpu-vm)
            case $state in '' | READY | PREEMPTED | TERMINATED) break ;; esac
            echo "tpu_pod.sh: $(date +%H:%M) $name is $state."
            sleep "$poll"
        done
        if [[ $state != READY ]]; then
            create
            copy
        elif ((code == 255)); then
            continue # the job may still be running: follow it
        fi
        job=$first-$restart
    done
}

case $action in
stop) on_workers "bash sr3_jax/launch/tpu_worker.sh stop" ;;
*) "$action" "$@" ;;
esac
