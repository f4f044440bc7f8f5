#!/usr/bin/env bash
# Manages a Cloud TPU VM pod with gcloud: bash launch/tpu_pod.sh ACTION [OPTIONS] [-- COMMAND...]
#   create   create the TPU, unless it exists, and wait until it is ready; retry while the zone has no capacity
#   copy     copy the files tracked by git (their working-tree versions) to every worker, install, mount the bucket
#   run      run COMMAND (such as: sr3 train ...) on every worker, in ~/sr3_jax, and print the output of worker 0. Ctrl-C
#            does not stop it; `run` with the same --job follows it again
#   stop     send SIGTERM to running jobs: sr3 saves and exits with 143. Also ends an `all` in another terminal
#   logs     download the output of a job (default: the newest) from every worker to out/tpu/NAME
#   status   print the TPU's state and the jobs of each worker
#   delete   delete the TPU and its disks
#   all      create, copy and run, unattended, until COMMAND has ended: a preempted TPU is created again, a job is followed
#            after a lost connection, and restarted after 143, and after 1 or death by a signal at most SR3_MAX_RESTARTS
#            times (20)
# Options, or environment variables:
#   --name SR3_TPU_NAME (default sr3)    --zone SR3_TPU_ZONE    --project SR3_TPU_PROJECT (default: that of gcloud)
#   --type SR3_TPU_TYPE, such as v5litepod-256    --version SR3_TPU_VERSION, the runtime (default: the one for the type)
#   --bucket SR3_TPU_BUCKET, a Cloud Storage bucket with hierarchical namespace, mounted as ~/sr3_jax/bucket on every
#     worker; not needed for gs:// workdirs
#   --env NAME=VALUE, a variable of COMMAND's environment, such as WANDB_API_KEY=... or XLA_FLAGS=...; may be repeated.
#     TFDS_DATA_DIR is where the workers find TFDS data sets (default with --bucket: bucket/tensorflow_datasets)
#   --job JOB, the job's name (default: the time)    --spot SR3_TPU_SPOT=1    --queued SR3_TPU_QUEUED=1
#   --max-wait SR3_TPU_MAX_WAIT, minutes after which create and all stop waiting for a TPU, each time (default 1440)
#   --delete SR3_TPU_DELETE=1, with all: delete the TPU at the end, whatever the exit code; not after Ctrl-C
#   --dry-run, print every command and run none
#   --gcloud OPTION..., the last options: further ones for gcloud's create command, such as --network=NETWORK
#   --gcloud-ssh OPTION..., also last: for gcloud's ssh and scp, such as --internal-ip
# `all` and `run` first check that the data of `sr3 train` is in Cloud Storage, if it is to be there.
# Exit code: that of COMMAND (2 if any worker's is 2), 2 for a user error, 1 if no TPU was to be had.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
    echo "tpu_pod.sh: $1" >&2
    exit 2
}

say() {
    echo "tpu_pod.sh: $(date +%H:%M) $1"
}

action=${1:-}
case $action in
create | copy | run | stop | logs | status | delete | all) shift ;;
*) fail "ACTION must be create, copy, run, stop, logs, status, delete or all, got '$action'." ;;
esac
name=${SR3_TPU_NAME:-sr3} zone=${SR3_TPU_ZONE:-} project=${SR3_TPU_PROJECT:-}
type=${SR3_TPU_TYPE:-} version=${SR3_TPU_VERSION:-} bucket=${SR3_TPU_BUCKET:-}
spot=${SR3_TPU_SPOT:-} queued=${SR3_TPU_QUEUED:-} delete_after=${SR3_TPU_DELETE:-} job='' dry_run=''
restarts=${SR3_MAX_RESTARTS:-20} max_wait=${SR3_TPU_MAX_WAIT:-1440} poll=${SR3_TPU_POLL:-30}
create_options=() ssh_options=() environment=()
while (($# > 0)); do
    option=$1
    shift
    case $option in
    --) break ;;
    --spot) spot=1 ;;
    --queued) queued=1 ;;
    --delete) delete_after=1 ;;
    --dry-run) dry_run=1 ;;
    --name | --zone | --project | --type | --version | --bucket | --job | --max-wait)
        [[ -n ${1:-} && $1 != -* ]] || fail "$option needs a value."
        variable=${option#--}
        printf -v "${variable//-/_}" %s "$1"
        shift
        ;;
    --env)
        [[ ${1:-} =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "--env needs NAME=VALUE, got '${1:-}'."
        environment+=("$1")
        shift
        ;;
    --gcloud | --gcloud-ssh)
        words=()
        while (($# > 0)) && [[ $1 != -- && $1 != --gcloud && $1 != --gcloud-ssh ]]; do
            words+=("$1")
            shift
        done
        ((${#words[@]} > 0)) || fail "$option needs options of gcloud after it, up to '--'."
        if [[ $option == --gcloud ]]; then create_options=("${words[@]}"); else ssh_options=("${words[@]}"); fi
        ;;
    *) fail "unknown option '$option'; the command comes after '--'." ;;
    esac
done
[[ -n $zone ]] || fail "--zone is missing: give it, or set SR3_TPU_ZONE."
[[ $restarts =~ ^[0-9]+$ ]] || fail "SR3_MAX_RESTARTS must be an integer, got '$restarts'."
[[ $max_wait =~ ^[0-9]+$ ]] || fail "--max-wait must be a number of minutes, got '$max_wait'."
[[ $poll =~ ^[0-9]+$ ]] || fail "SR3_TPU_POLL must be a number of seconds, got '$poll'."
[[ $name$job =~ ^[a-zA-Z0-9-]+$ ]] || fail "--name and --job may contain letters, digits and '-', got '$name' and '$job'."
case $action in
create | all)
    [[ -n $type ]] || fail "$action needs --type (or SR3_TPU_TYPE), such as v5litepod-256."
    if [[ -z $version ]]; then
        case $type in
        v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
        v5litepod-*) version=v2-alpha-tpuv5-lite ;;
        v5p-*) version=v2-alpha-tpuv5 ;;
        v6e-*) version=v2-alpha-tpuv6e ;;
        *) fail "$action needs --version (or SR3_TPU_VERSION), the runtime for --type $type." ;;
        esac
    fi
    ;;
esac
case $action in
run | all)
    (($# > 0)) || fail "$action needs a command after '--'."
    job=${job:-$(date +%Y%m%d-%H%M%S)}
    ;;
*) (($# == 0)) || fail "$action takes no command, got '$*'." ;;
esac
case $action in
copy | all)
    [[ -e .git ]] || fail "$action copies the files tracked by git, but this is not a git repository: run 'git init' and 'git add .'."
    ;;
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
    do_it gcloud compute tpus "$@" ${project:+--project="$project"}
}

on_workers() { # on_workers COMMAND [OPTION...]: run a command on each worker
    tpus tpu-vm ssh "$name" --zone="$zone" --worker=all ${ssh_options[@]+"${ssh_options[@]}"} "${@:2}" --command "$1"
}

errors=$(mktemp) # of the latest call of gcloud whose errors matter

# --- The data, which must be there before a TPU is paid for

variable() { # variable NAME: its value in --env
    local pair
    for pair in ${environment[@]+"${environment[@]}"}; do
        if [[ $pair == "$1="* ]]; then echo "${pair#*=}"; fi
    done
}

data_sources() { # data_sources COMMAND...: the data of sr3 train, from its options, else from its preset
    local word option='' config='' training=preset held_out=preset
    for word in "$@"; do
        if [[ -n $option ]]; then word=$option=$word option=''; fi
        case $word in
        --config | --config.data.source | --config.data.eval_source) option=$word ;;
        --config=*) config=${word#*=} ;;
        --config.data.source=*) training=${word#*=} ;;
        --config.data.eval_source=*) held_out=${word#*=} ;;
        esac
    done
    config=${config%%:*}
    if [[ -f configs/$config.py ]]; then config=configs/$config.py; fi
    for word in "[^_]source $training" "eval_source $held_out"; do
        if [[ ${word#* } != preset ]]; then
            echo "${word#* }"
        elif [[ -f $config ]]; then # an assignment, or the command in its docstring
            sed -nE "s/.*${word%% *}\"?[=:] *\"?((tfds|folder|pairs):[^\" ]*).*/\1/p" "$config" | head -n 1
        fi
    done
}

check_data() { # check_data COMMAND...
    local source sources place pattern root
    sources=$(data_sources "$@")
    root=$(variable SR3_DATA_DIR)
    root=${root:-$(variable TFDS_DATA_DIR)}
    if [[ -z $root$bucket && $sources == *tfds:* ]]; then
        fail "the TPU's workers do not have the data ${sources//$'\n'/ and }: give --bucket BUCKET, with the data sets in gs://BUCKET/tensorflow_datasets, or --env TFDS_DATA_DIR=FOLDER."
    elif [[ -z $root && $sources == *tfds:* ]]; then
        root=bucket/tensorflow_datasets
        environment+=("TFDS_DATA_DIR=$root")
    fi
    for source in $sources; do
        case $source in
        tfds:*)
            place=${source#tfds:}
            place=${root%/}/${place%%:*} pattern='**.array_record*'
            ;;
        folder:*) place=${source#folder:} pattern='**' ;;
        *) continue ;;
        esac
        if [[ -n $bucket && $place == bucket/* ]]; then place=gs://$bucket/${place#*/}; fi
        if [[ $place != gs://* ]]; then continue; fi # a file system of the workers
        if [[ -n $dry_run ]]; then
            quoted gcloud storage ls "$place/$pattern" ${project:+--project="$project"}
        elif [[ -z $(gcloud storage ls "$place/$pattern" ${project:+--project="$project"} 2>"$errors" | head -n 1) ]]; then
            cat "$errors" >&2
            fail "$source is not in $place (files $pattern): copy it there, or correct --bucket, --env TFDS_DATA_DIR or config.data."
        fi
    done
}

# --- The TPU: its state, and how to get one

# Errors that waiting does not fix. Lack of quota can be one: before the first TPU it is, but the quota of a preempted TPU
# may be free only after a while.
hopeless='INVALID_ARGUMENT|PERMISSION_DENIED|UNAUTHENTICATED|unrecognized arguments|Invalid value'
had_one='' # whether this run of the script has had a TPU

is_hopeless() {
    grep -Eq "$hopeless" "$errors" || { [[ -z $had_one ]] && grep -Eiq 'quota' "$errors"; }
}

state_of() { # state_of tpu-vm|queued-resources: empty if it does not exist, UNKNOWN if gcloud fails; exits if hopeless
    local field=state state
    if [[ $1 == queued-resources ]]; then field=state.state; fi
    if [[ -n $dry_run ]]; then return; fi
    if state=$(tpus "$1" describe "$name" --zone="$zone" --format="value($field)" 2>"$errors"); then
        echo "$state"
    elif ! grep -q NOT_FOUND "$errors"; then
        cat "$errors" >&2
        if is_hopeless; then exit 2; fi
        echo UNKNOWN
    fi
}

stop_file=out/tpu/$name/stop # made by `stop`, for an `all` that waits for a TPU
stopping() {
    [[ $action == all && -e $stop_file ]]
}

pause() { # pause SECONDS, or until `stop`
    local end=$((SECONDS + $1))
    while ((SECONDS < end)) && ! stopping; do sleep 1; done
}

request() { # ask for the TPU once
    local words
    if [[ -n $queued ]]; then
        words=(queued-resources create "$name" --node-id="$name" --zone="$zone" --accelerator-type="$type"
            --runtime-version="$version")
    else
        words=(tpu-vm create "$name" --zone="$zone" --accelerator-type="$type" --version="$version")
    fi
    if [[ -n $spot ]]; then words+=(--spot); fi
    { tpus "${words[@]}" ${create_options[@]+"${create_options[@]}"} 2>&1 >&3 | tee "$errors" >&2; } 3>&1
}

fresh='' # whether the TPU was created after the last copy
create() { # return when the TPU is ready; 143 after `stop`, 1 after --max-wait
    local node queue='' began=$SECONDS delay=$poll text said='' failed
    if [[ -n $dry_run ]]; then
        request
        if [[ -n $queued ]]; then
            tpus queued-resources describe "$name" --zone="$zone" --format='value(state.state)'
        fi
        return
    fi
    while true; do
        if stopping; then return 143; fi
        failed=''
        # The queued resource first: the node of one that is ACTIVE exists.
        if [[ -n $queued ]]; then queue=$(state_of queued-resources) || exit; fi
        node=$(state_of tpu-vm) || exit
        case $node:$queue in
        READY: | READY:ACTIVE)
            if [[ -z $had_one$fresh ]]; then echo "tpu_pod.sh: $name already exists."; fi
            had_one=1
            return
            ;;
        STOPPED: | STOPPED:ACTIVE)
            fail "$name is STOPPED: delete it, or start it with 'gcloud compute tpus tpu-vm start $name --zone=$zone'."
            ;;
        UNKNOWN:* | *:UNKNOWN) text="the state of $name is unknown" failed=1 ;;
        :)
            if request; then
                fresh=1
                continue
            fi
            if is_hopeless; then fail "$name cannot be created: see gcloud's error above."; fi
            text="$name could not be created" failed=1
            ;;
        PREEMPTED:* | TERMINATED:* | *:FAILED | *:SUSPENDED | :ACTIVE) # none of them can be restarted
            text="$name was lost (node '$node'${queue:+, queued resource $queue})"
            if [[ $queue == FAILED ]]; then
                failed=1
                tpus queued-resources describe "$name" --zone="$zone" --format='value(state.failedData.error.message)' \
                    2>/dev/null | tee "$errors" || true
                if is_hopeless; then fail "the queued resource $name has FAILED: see the error above, then delete it."; fi
            fi
            # Refused while it is still being suspended or deleted.
            delete || failed=1
            ;;
        *) text="$name is ${node:-not there yet}${queue:+, the queued resource is $queue}" ;;
        esac
        if [[ $text != "$said" ]]; then say "$text."; fi
        said=$text
        if ((SECONDS - began >= max_wait * 60)); then
            say "no TPU after $max_wait minutes (--max-wait): giving up." >&2
            return 1
        fi
        pause "$delay"
        if [[ -z $failed ]]; then
            delay=$poll
        else
            delay=$((delay * 2 < poll * 20 ? delay * 2 : poll * 20))
        fi
    done
}

delete() {
    local kind force
    for kind in ${queued:+queued-resources} tpu-vm; do # the first deletes the node as well
        if [[ $kind == queued-resources ]]; then force=--force; else force=''; fi
        if [[ -n $dry_run || -n $(state_of "$kind") ]]; then
            tpus "$kind" delete "$name" --zone="$zone" ${force:+"$force"} --quiet
            return
        fi
    done
    echo "tpu_pod.sh: $name does not exist."
}

# --- Its workers

copy() {
    local archive=out/tpu/sr3_jax.tar.gz
    do_it mkdir -p out/tpu
    if [[ -n $dry_run ]]; then
        echo "git ls-files -z | tar -czf $archive --null -T -"
    else
        git ls-files -z | tar -czf "$archive" --null -T - || return 2
    fi
    tpus tpu-vm scp "$archive" "$name:sr3_jax.tar.gz" --zone="$zone" --worker=all \
        ${ssh_options[@]+"${ssh_options[@]}"} || return
    on_workers "mkdir -p sr3_jax && tar -xzf sr3_jax.tar.gz -C sr3_jax && bash sr3_jax/launch/tpu_worker.sh install" ||
        return
    if [[ -n $bucket ]]; then
        on_workers "bash sr3_jax/launch/tpu_worker.sh mount $(quoted "$bucket")" || return
    fi
    fresh=''
}

replaced='' # whether `prepare` has copied
prepare() { # prepare [FORCE]: a ready TPU with the files on it; for minutes after its creation ssh may be refused
    local tries=0 code
    replaced=''
    while true; do
        if [[ $action == all ]]; then create || return; fi
        if [[ -z $fresh${1:-} ]]; then return; fi
        code=0 replaced=1
        copy || code=$?
        if ((code == 0 || code == 2)); then return "$code"; fi
        if stopping; then return 143; fi
        ((++tries < 5)) || return "$code"
        say "copy failed with exit code $code: trying again."
        pause $((poll * tries))
    done
}

follow=''
unfollow() {
    if [[ -n $follow ]]; then kill "$follow" 2>/dev/null || true; fi
    follow=''
}

stopped='' # whether `stop` has ended the job
run() { # run COMMAND..., as $job; 255 if its connection was lost
    local folder=out/tpu/$name/$job code=0
    do_it mkdir -p "$folder"
    if [[ -z $dry_run ]]; then
        echo "tpu_pod.sh: job $job, output of every worker in $folder."
        rm -f "$folder"/*.log
        : >"$folder/0.log"
        tail -n +1 -F "$folder/0.log" 2>/dev/null &
        follow=$!
    fi
    # Without the flag, ssh does not notice that a connection is dead.
    if ((${#environment[@]} > 0)); then set -- env "${environment[@]}" "$@"; fi
    on_workers "bash sr3_jax/launch/tpu_worker.sh run $(quoted "$job" "$@")" --output-directory="$folder" \
        --ssh-flag='-o ServerAliveInterval=60' || code=$?
    if [[ -z $dry_run ]]; then
        sleep 0.5 # wait for the last lines
        unfollow
        # gcloud returns the code of one worker; the last line of each log has its own.
        if grep -qsx "tpu_worker.sh: exit code 2" "$folder"/*.log; then code=2; fi
        if grep -qsx "tpu_worker.sh: stopped" "$folder"/*.log; then stopped=1; fi
        if ((code == 1)) && ! grep -qs "^tpu_worker.sh: exit code " "$folder"/*.log; then code=255; fi # of gcloud itself
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

stop() {
    local state=READY
    if [[ -z $dry_run ]]; then
        mkdir -p "${stop_file%/*}"
        touch "$stop_file"
        state=$(state_of tpu-vm)
    fi
    case $state in
    READY | UNKNOWN) on_workers "bash sr3_jax/launch/tpu_worker.sh stop" ;;
    '') echo "tpu_pod.sh: $name does not exist, so no job is running; an 'all' that waits for it ends now." ;;
    *) echo "tpu_pod.sh: $name is $state, so no job is running; an 'all' that waits for it ends now." ;;
    esac
}

all() {
    local restart=0 lost=0 number=0 first=$job code began
    if [[ -z $dry_run ]]; then rm -f "$stop_file"; fi
    prepare force || return
    while true; do
        if stopping; then return 143; fi
        began=$SECONDS code=0
        run "$@" || code=$?
        # Restart after 143 and other signals (137, 134), 1 (a lost machine) and 255 (a lost connection).
        if [[ -n $stopped ]] || ! ((code == 1 || code >= 129 && code != 130)); then return "$code"; fi
        if stopping; then return 143; fi
        if ((SECONDS - began > 300)); then lost=0; fi
        prepare || return # returns at once if the TPU is ready
        if [[ -z $replaced ]] && ((code == 255)); then
            # The job may still be running: follow it.
            ((++lost <= restarts)) || return "$code"
            pause $((poll * (lost < 20 ? lost : 20)))
            continue
        fi
        if [[ -z $replaced ]] && ((code != 143)); then
            ((restart < restarts)) || return "$code"
            ((++restart))
            say "restart $restart of at most $restarts."
        fi
        job=$first-$((++number))
    done
}

# --- The end

ended='' # whether `all` has returned; not after Ctrl-C
at_end() {
    local state='' kind tries
    unfollow
    if [[ -z $dry_run && ($action == all || $action == create) ]]; then
        if [[ -n $ended && -n $delete_after ]]; then
            for tries in 1 2 3 4 5; do
                if delete; then break; fi
                sleep $((poll * tries))
            done
        fi
        for kind in ${queued:+queued-resources} tpu-vm; do state+="$(state_of "$kind" 2>/dev/null || true) "; done
        state=${state% }
        state=${state# }
        if [[ -n $state && ($action == all || $1 != 0) ]]; then
            echo "tpu_pod.sh: $name is $state: a TPU costs money until it is deleted: $(
                quoted bash launch/tpu_pod.sh delete --name "$name" --zone "$zone" ${project:+--project "$project"} \
                    ${queued:+--queued}
            )" >&2
        fi
    fi
    rm -f "$errors"
}
trap 'code=$?; trap "" INT; at_end "$code"; exit "$code"' EXIT

case $action in
run | all) check_data "$@" ;;
esac
case $action in
copy) prepare force ;;
all)
    code=0
    all "$@" || code=$?
    ended=1
    if [[ -n $dry_run && -n $delete_after ]]; then delete; fi
    exit "$code"
    ;;
*) "$action" "$@" ;;
esac
