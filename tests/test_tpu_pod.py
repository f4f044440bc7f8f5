"""launch/tpu_pod.sh and launch/tpu_worker.sh with a fake gcloud, whose TPU is two folders on this machine."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from test_launch import STAND_IN

ROOT = Path(__file__).resolve().parent.parent
TPU = ["--zone", "us-east1-d", "--type", "v5litepod-256", "--version", "v2-alpha-tpuv5-lite"]
WORDS = ["a  b", "it's", "", "$HOME", '"*"', "--job"]

GCLOUD = """#!/bin/bash
# Each worker is a folder under $FAKE: its home. The files tpu-vm and queued-resources hold the states that describe
# reports one after the other, the last one from then on; NONE: it does not exist.
echo "$*" >>"$FAKE/calls"
first_line() { # of a file, and remove it unless it is the last one and must stay
    [[ -s $1 ]] || return
    head -n 1 "$1"
    [[ -n $2 && $(wc -l <"$1") == 1 ]] || sed -i 1d "$1"
}
both() {
    for worker in 0 1; do
        (export HOME=$FAKE/$worker; cd "$HOME" && "$@") &
        pids[worker]=$!
    done
    wait "${pids[0]}"; first=$?
    wait "${pids[1]}"; second=$?
    exit $((first ? first : second)) # like gcloud: the code of the first worker that failed
}
copy_in() { cp "$archive" "$HOME/"; }
remote() {
    if [[ -z $output ]]; then bash -c "$command"; else bash -c "$command" >"$output/$(basename "$HOME").log" 2>&1; fi
}
case "$*" in
"storage ls "*)
    grep -Fqx -- "$3" "$FAKE/objects" 2>/dev/null || { echo "ERROR: matched no objects: $3" >&2; exit 1; }
    echo "$3" ;;
"auth list"*) [[ -e $FAKE/logged_out ]] || echo me@example.com ;;
*" describe "*failedData*) echo "$FAKE_FAILED" ;;
*" describe "*)
    state=$(first_line "$FAKE/$3" stays)
    if [[ ${state:-NONE} == NONE ]]; then echo "ERROR: NOT_FOUND: no such thing" >&2; exit 1; fi
    if [[ $state == ACTIVE && ! -e $FAKE/tpu-vm ]]; then echo READY >"$FAKE/tpu-vm"; fi
    echo "$state" ;;
*" create "*)
    error=$(first_line "$FAKE/create_errors")
    if [[ -n $error ]]; then echo "ERROR: $error" >&2; exit 1; fi
    cat "$FAKE/new_$3" >"$FAKE/$3" ;;
*" delete "*)
    [[ $(head -n 1 "$FAKE/$3") != SUSPENDING ]] || { echo "ERROR: FAILED_PRECONDITION" >&2; exit 1; }
    rm -f "$FAKE/$3" "$FAKE/tpu-vm" ;;
*" scp "* | *" ssh "*worker.sh" run "*)
    code=$(first_line "$FAKE/connections")
    if [[ $code == started* ]]; then lost=${code#started} code=0; fi # lost while the job runs
    if ((code)); then echo "ssh: connect to host 10.0.0.5 port 22: Connection refused" >&2; exit "$code"; fi ;;&
*" scp "*) archive=$PWD/$5; both copy_in ;;
*" ssh "*)
    for word in "$@"; do
        case $word in --output-directory=*) output=$PWD/${word#*=} ;; esac
    done
    command=${*: -1}
    if [[ -n $lost ]]; then (both remote) >/dev/null 2>&1 & sleep 1; exit "$lost"; fi
    both remote ;;
*) echo "unknown: $*" >&2; exit 2 ;;
esac
"""
METADATA = """#!/bin/bash
case "${*: -1}" in
*/worker-network-endpoints) printf 'unknown:1:10.0.0.5,unknown:2:10.0.0.6' ;;
*/agent-worker-number) basename "$HOME" ;;
*) exit 22 ;;
esac
"""


class Pod:
    """A clone of the repository, two workers, and the calls of gcloud."""

    def __init__(self, folder: Path):
        self.clone, self.fake = folder / "a clone", folder / "fake"
        shutil.copytree(ROOT / "launch", self.clone / "launch")
        for name in ("setup.cfg", "pyproject.toml"):
            shutil.copy(ROOT / name, self.clone)
        for command in (["init", "-q"], ["add", "."]):
            subprocess.run(["git", *command], cwd=self.clone, check=True)
        (self.clone / "not tracked").touch()
        for name in ("bin", "0", "1"):
            (self.fake / name).mkdir(parents=True)
        for name, text in (("gcloud", GCLOUD), ("curl", METADATA), ("python3.13", STAND_IN)):
            (self.fake / "bin" / name).write_text(text)
            (self.fake / "bin" / name).chmod(0o755)
        self.write("new_tpu-vm", "READY")

    def write(self, name: str, *lines: str) -> None:
        """Write a file that the fake gcloud reads line by line."""
        (self.fake / name).write_text("".join(f"{line}\n" for line in lines))

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith(("SR3_", "JAX_"))}
        env |= {"PATH": f"{self.fake}/bin:/usr/bin:/bin", "FAKE": str(self.fake), "SR3_TPU_POLL": "0"}
        return subprocess.Popen(
            ["bash", str(self.clone / "launch/tpu_pod.sh"), *arguments],
            env=env | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def calls(self) -> list[str]:
        """The calls of gcloud that change something, in order: create, delete, scp, ssh."""
        words = [line.split()[3] for line in (self.fake / "calls").read_text().splitlines() if "tpus" in line]
        return [word for word in words if word != "describe"]

    def wait_for(self, word: str, process: subprocess.Popen[str]) -> None:
        """Read the output until a line has the word."""
        for line in process.stdout:
            if word in line:
                return
        raise AssertionError(process.communicate())

    def log(self, job: str, worker: int) -> str:
        return (self.clone / "out/tpu/sr3" / job / f"{worker}.log").read_text()


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    return Pod(tmp_path)


@pytest.fixture
def installed(pod: Pod) -> Pod:
    """An existing pod with the files on its workers and nothing installed."""
    pod.write("tpu-vm", "READY")
    for worker in "01":
        shutil.copytree(pod.clone / "launch", pod.fake / worker / "sr3_jax/launch")
    return pod


def _fails(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("tpu_pod.sh: "), result.stderr
    assert all(word in result.stderr for word in words), result.stderr


# --- Dry runs


def _dry(*arguments: str, **environment: str) -> list[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("SR3_")}
    env |= {"PATH": "/usr/bin:/bin"} | environment
    command = ["bash", str(ROOT / "launch/tpu_pod.sh"), arguments[0], "--dry-run", *arguments[1:]]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()


def _ssh(command: str, *options: str, name: str = "sr3", zone: str = "us-east1-d") -> list[str]:
    head = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", name, f"--zone={zone}", "--worker=all"]
    return [*head, *options, "--command", command]


def test_a_dry_run_of_all_prints_every_command():
    lines = _dry("all", *TPU, "--spot", "--bucket", "my-bucket", "--job", "one", "--", "sr3", "train", *WORDS)
    command = "bash sr3_jax/launch/tpu_worker.sh run one sr3 train " + shlex.join(WORDS).replace(
        '"\'"', "\\'"
    )
    install = (
        "mkdir -p sr3_jax && tar -xzf sr3_jax.tar.gz -C sr3_jax && bash sr3_jax/launch/tpu_worker.sh install"
    )
    tpu_vm = ["gcloud", "compute", "tpus", "tpu-vm"]
    assert [shlex.split(line) for line in lines[:2] + lines[3:]] == [
        [*tpu_vm, "create", "sr3", "--zone=us-east1-d", "--accelerator-type=v5litepod-256",
         "--version=v2-alpha-tpuv5-lite", "--spot"],
        ["mkdir", "-p", "out/tpu"],
        [*tpu_vm, "scp", "out/tpu/sr3_jax.tar.gz", "sr3:sr3_jax.tar.gz", "--zone=us-east1-d", "--worker=all"],
        _ssh(install),
        _ssh("bash sr3_jax/launch/tpu_worker.sh mount my-bucket"),
        ["mkdir", "-p", "out/tpu/sr3/one"],
        _ssh(command, "--output-directory=out/tpu/sr3/one", "--ssh-flag=-o ServerAliveInterval=60"),
    ]  # fmt: skip
    assert lines[2] == "git ls-files -z | tar -czf out/tpu/sr3_jax.tar.gz --null -T -"
    assert shlex.split(command)[5:] == ["train", *WORDS]


def test_dry_runs_of_the_other_actions():
    queued = {"SR3_TPU_NAME": "mine", "SR3_TPU_ZONE": "z", "SR3_TPU_QUEUED": "1", "SR3_TPU_TYPE": "v6e-16"}
    queued["SR3_TPU_VERSION"] = "v2-alpha-tpuv6e"
    tpus = "gcloud compute tpus"
    assert _dry("create", **queued) == [
        f"{tpus} queued-resources create mine --node-id=mine --zone=z --accelerator-type=v6e-16 "
        "--runtime-version=v2-alpha-tpuv6e",
        f"{tpus} queued-resources describe mine --zone=z '--format=value(state.state)'",
    ]
    assert _dry("delete", **queued) == [f"{tpus} queued-resources delete mine --zone=z --force --quiet"]
    assert _dry("delete", *TPU) == [f"{tpus} tpu-vm delete sr3 --zone=us-east1-d --quiet"]
    worker = "bash sr3_jax/launch/tpu_worker.sh"
    assert [shlex.split(line) for line in _dry("stop", *TPU)] == [_ssh(f"{worker} stop")]
    assert [shlex.split(line) for line in _dry("logs", *TPU, "--job", "one")] == [
        ["mkdir", "-p", "out/tpu/sr3/one"],
        _ssh(f"{worker} log one", "--output-directory=out/tpu/sr3/one"),
    ]
    assert [shlex.split(line) for line in _dry("status", *TPU)] == [
        [*tpus.split(), "tpu-vm", "describe", "sr3", "--zone=us-east1-d", "--format=value(state,health)"],
        _ssh(f"{worker} status"),
    ]


def test_options_of_gcloud_and_the_project_reach_its_commands():
    more = [
        "--project",
        "mine",
        "--gcloud",
        "--network",
        "a b",
        "--gcloud-ssh",
        "--internal-ip",
        "--",
        "true",
    ]
    lines = [shlex.split(line) for line in _dry("all", "--delete", *TPU, *more)]
    calls = [line for line in lines if line[0] == "gcloud"]
    assert [line[4] for line in calls] == ["create", "scp", "ssh", "ssh", "delete"]
    assert all(line[-1] == "--project=mine" for line in calls)
    assert ["a b" in line for line in calls] == [True, False, False, False, False]
    assert ["--internal-ip" in line for line in calls] == [False, True, True, True, False]


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [
        ("v4-32", "tpu-ubuntu2204-base"),
        ("v5litepod-256", "v2-alpha-tpuv5-lite"),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v6e-16", "v2-alpha-tpuv6e"),
    ],
)
def test_the_runtime_follows_from_the_type(kind: str, runtime: str):
    (line,) = _dry("create", "--zone", "z", "--type", kind)
    assert f"--version={runtime}" in line.split()


# --- User errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["ACTION"]),
        (["start"], ["'start'"]),
        (["status"], ["--zone"]),
        (["status", "--zone"], ["--zone"]),
        (["create", "--zone", "z", "--type", "t"], ["--version"]),
        (["run", *TPU], ["command"]),
        (["stop", *TPU, "--", "sr3"], ["'sr3'"]),
        (["run", *TPU, "sr3", "train"], ["'sr3'", "'--'"]),
        (["run", *TPU, "--job", "a b", "--", "x"], ["'a b'"]),
        (["create", "--zone", "z"], ["--type"]),
        (["create", *TPU, "--max-wait", "long"], ["--max-wait", "'long'"]),
        (["run", *TPU, "--gcloud", "--", "x"], ["--gcloud"]),
        (["run", *TPU, "--env", "1=2", "--", "x"], ["--env", "'1=2'"]),
    ],
)
def test_wrong_arguments_fail_with_one_sentence(pod: Pod, arguments: list[str], words: list[str]):
    _fails(pod.run(*arguments), *words)
    assert not (pod.fake / "calls").exists()


def test_without_gcloud_or_an_account_it_fails_with_the_fix(pod: Pod):
    (pod.fake / "logged_out").touch()
    _fails(pod.run("status", *TPU), "gcloud auth login", "--dry-run")
    (pod.fake / "empty").mkdir()
    for name in ("bash", "dirname"):
        (pod.fake / "empty" / name).symlink_to(shutil.which(name))
    _fails(pod.run("status", *TPU, PATH=str(pod.fake / "empty")), "gcloud", "--dry-run")


# --- Data and the environment

IMAGENET = ["sr3", "train", "--config=imagenet", "--workdir=bucket/run"]
ROOT_OF_DATA = "gs://my-bucket/tensorflow_datasets"


@pytest.fixture
def imagenet(pod: Pod) -> Pod:
    """A clone with two presets, on a TPU with gcsfuse."""
    (pod.fake / "bin/gcsfuse").write_text('#!/bin/bash\necho "$*" >"$HOME/mounted"\n')
    (pod.fake / "bin/gcsfuse").chmod(0o755)
    (pod.clone / "configs").mkdir()
    (pod.clone / "configs/imagenet.py").write_text(
        'def get_config():\n    data(source="tfds:imagenet:train", eval_source="tfds:imagenet_v2/a:test")\n'
    )
    (pod.clone / "configs/derived.py").write_text(
        '"""sr3 train --config.data.source=tfds:imagenet:train --config.data.eval_source=tfds:other:test"""\n'
    )
    return pod


def test_data_that_is_not_in_the_bucket_fails_before_a_tpu_is_created(imagenet: Pod):
    imagenet.write("objects", f"{ROOT_OF_DATA}/imagenet/**.array_record*")
    result = imagenet.run("all", *TPU, "--bucket", "my-bucket", "--", *IMAGENET)
    assert result.returncode == 2 and "tfds:imagenet_v2/a:test" in result.stderr
    assert f"{ROOT_OF_DATA}/imagenet_v2/a" in result.stderr and imagenet.calls() == []


def test_data_of_a_tpu_without_a_bucket_must_be_somewhere(imagenet: Pod):
    _fails(imagenet.run("all", *TPU, "--", *IMAGENET), "tfds:imagenet:train", "--bucket", "TFDS_DATA_DIR")
    folder = ["--config.data.source", "folder:gs://other/images", "--config.data.eval_source="]
    result = imagenet.run("run", *TPU, "--", *IMAGENET, *folder)
    assert result.returncode == 2 and "folder:gs://other/images" in result.stderr


def test_workers_get_the_environment_and_the_folder_of_the_data(imagenet: Pod):
    names = [f"{ROOT_OF_DATA}/{name}/**.array_record*" for name in ("imagenet", "other")]
    imagenet.write("objects", *names)
    program = "import os; print(os.environ['TFDS_DATA_DIR'], os.environ['XLA_FLAGS'])"
    command = ["python", "-c", program, "--config", "derived"]
    options = ["--job", "one", "--env", "XLA_FLAGS=--a=1 --b='2'"]
    result = imagenet.run("all", *TPU, *options, "--bucket", "my-bucket", "--", *command)
    assert result.returncode == 0, result
    assert imagenet.log("one", 1).startswith("bucket/tensorflow_datasets --a=1 --b='2'\n")
    # gcsfuse renames no folder of a flat bucket by default
    assert re.search(r"--rename-dir-limit=\d+ my-bucket bucket", (imagenet.fake / "0/mounted").read_text())


def test_data_folders_that_are_given_are_checked_where_they_can_be(imagenet: Pod):
    for folder, listed in (("gs://data/sets/", 2), ("bucket/sets", 2), ("/shared/sets", 0)):
        lines = _dry("run", *TPU, "--bucket", "b", "--env", f"TFDS_DATA_DIR={folder}", "--", "sr3", "train",
                     "--config=imagenet_64_256")  # fmt: skip
        calls = [shlex.split(line) for line in lines if " storage ls " in line]
        assert len(calls) == listed, lines
        place = {"gs://data/sets/": "gs://data/sets", "bucket/sets": "gs://b/sets"}.get(folder, "")
        assert all(call[3].startswith(f"{place}/imagenet2012/") for call in calls)
        assert f"TFDS_DATA_DIR={folder}" in lines[-1]


# --- Create, copy, run, restart


def test_create_copy_and_run(pod: Pod):
    program = "import os, sys; print(*(os.environ[f'JAX_{x}'] for x in sys.argv[1].split()), sys.argv[2:])"
    names = "COORDINATOR_ADDRESS NUM_PROCESSES PROCESS_ID"
    result = pod.run("all", *TPU, "--job", "one", "--", "python", "-c", program, names, *WORDS)
    assert result.returncode == 0, result
    assert pod.calls() == ["create", "scp", "ssh", "ssh"]
    for worker in "01":
        home = pod.fake / worker / "sr3_jax"
        assert "--editable .[tpu]" in (home / "installs.log").read_text()
        assert not (home / "not tracked").exists()
        line = f"10.0.0.5:8482 2 {worker} {WORDS}"
        assert pod.log("one", int(worker)) == f"{line}\ntpu_worker.sh: exit code 0\n"
        assert (line in result.stdout) == (worker == "0")


def test_an_existing_tpu_is_not_created_again(installed: Pod):
    assert installed.run("create", *TPU).returncode == 0
    assert installed.calls() == []
    assert installed.run("delete", *TPU).returncode == 0
    assert installed.run("delete", *TPU).returncode == 0  # nothing is left to delete
    assert installed.calls() == ["delete"]


def test_a_queued_resource_is_waited_for(pod: Pod):
    pod.write("new_queued-resources", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    result = pod.run("create", *TPU, "--queued")
    assert result.returncode == 0, result
    assert "WAITING" in result.stdout and "PROVISIONING" in result.stdout
    assert pod.run("delete", *TPU, "--queued").returncode == 0
    assert pod.calls() == ["create", "delete"]


def test_a_queued_resource_that_fails_is_requested_again(pod: Pod):
    pod.write("queued-resources", "FAILED")
    pod.write("new_queued-resources", "ACTIVE")
    result = pod.run("create", *TPU, "--queued", FAKE_FAILED="internal error")
    assert result.returncode == 0, result
    assert pod.calls() == ["delete", "create"]
    pod.write("queued-resources", "FAILED")
    result = pod.run("create", *TPU, "--queued", FAKE_FAILED="PERMISSION_DENIED")
    assert result.returncode == 2 and "FAILED" in result.stderr, result


STOCK_OUT = 'There is no more capacity in the zone "us-east1-d"'


def test_capacity_is_waited_for_at_first_and_after_preemption(pod: Pod):
    pod.write("create_errors", STOCK_OUT, "HTTP 503")
    more = f"printf '%s\\n' '{STOCK_OUT}' 'Quota limit has been exceeded.' >\"$FAKE/create_errors\""
    taken = f'[ -e ../again ] && exit 0; touch ../again; {more}; echo PREEMPTED >"$FAKE/tpu-vm"; exit 1'
    result = pod.run("all", *TPU, "--", "sh", "-c", taken)
    assert result.returncode == 0, result
    start = ["create", "create", "create", "scp", "ssh", "ssh"]
    assert pod.calls() == [*start, "delete", *start]


@pytest.mark.parametrize("error", ["INVALID_ARGUMENT: no such type", "Quota limit has been exceeded."])
def test_errors_that_waiting_does_not_mend_end_at_once(pod: Pod, error: str):
    pod.write("create_errors", error)
    result = pod.run("all", *TPU, "--", "true")
    assert result.returncode == 2 and error in result.stderr
    assert pod.calls() == ["create"] and "costs money" not in result.stderr


def test_waiting_ends(pod: Pod):
    pod.write("create_errors", *[STOCK_OUT] * 9)
    result = pod.run("all", *TPU, "--max-wait", "0", "--", "true")
    assert result.returncode == 1 and "--max-wait" in result.stderr
    assert pod.calls() == ["create"]


@pytest.mark.parametrize("code", [1, 255])  # gcloud's scp exits with 1, its ssh with ssh's code
def test_ssh_may_be_refused_after_the_creation(pod: Pod, code: int):
    pod.write("connections", str(code), str(code))
    assert pod.run("all", *TPU, "--", "true").returncode == 0
    assert pod.calls() == ["create", "scp", "scp", "scp", "ssh", "ssh"]


def test_a_job_is_followed_after_a_lost_connection(pod: Pod):
    pod.write("connections", "0", "255", "started1")  # of the copy, and of the run, twice
    result = pod.run("all", *TPU, "--job", "one", "--", "sh", "-c", "echo started >>started; sleep 2; exit 3")
    assert result.returncode == 3, result
    assert pod.calls() == ["create", "scp", "ssh", "ssh", "ssh", "ssh"]
    assert (pod.fake / "0/sr3_jax/started").read_text() == "started\n"


def test_a_preempted_queued_resource_is_created_again(pod: Pod):
    """Its node disappears while it goes from ACTIVE over SUSPENDING, when it cannot be deleted, to SUSPENDED."""
    pod.write("new_queued-resources", "ACTIVE")
    states = "printf 'ACTIVE\\nSUSPENDING\\nSUSPENDING\\nSUSPENDED\\n' >\"$FAKE/queued-resources\""
    taken = f'[ -e ../again ] && exit 0; touch ../again; {states}; echo NONE >"$FAKE/tpu-vm"; exit 1'
    result = pod.run("all", *TPU, "--queued", "--", "sh", "-c", taken)
    assert result.returncode == 0, result
    calls = [call for call, _ in itertools.groupby(pod.calls())]
    assert calls == ["create", "scp", "ssh", "delete", "create", "scp", "ssh"]


def test_stop_ends_all_while_a_job_runs(pod: Pod):
    job = "trap 'exit 143' TERM; echo ready; while :; do sleep 0.1; done"
    process = pod.start("all", *TPU, "--", "sh", "-c", job)
    pod.wait_for("ready", process)
    (pod.fake / "elsewhere").mkdir()
    shutil.copytree(pod.clone / "launch", pod.fake / "elsewhere/launch")  # another machine
    here, pod.clone = pod.clone, pod.fake / "elsewhere"
    assert pod.run("stop", *TPU).returncode == 0
    pod.clone = here
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert pod.calls().count("create") == 1 and "delete --name sr3 --zone us-east1-d" in err


def test_stop_ends_all_while_it_waits_for_a_tpu(pod: Pod):
    pod.write("create_errors", *[STOCK_OUT] * 99)
    process = pod.start("all", *TPU, "--", "true", SR3_TPU_POLL="60")
    pod.wait_for("could not be created", process)
    result = pod.run("stop", *TPU)
    assert result.returncode == 0 and "does not exist" in result.stdout
    process.communicate(timeout=60)
    assert process.returncode == 143 and pod.calls() == ["create"]


def test_what_is_left_is_named_or_deleted(pod: Pod):
    result = pod.run("all", *TPU, "--", "true")
    assert result.returncode == 0
    command = re.search(r"costs money.*(delete --name.*)", result.stderr)[1]
    assert pod.run(*shlex.split(command)).returncode == 0
    result = pod.run("all", *TPU, "--delete", "--", "sh", "-c", "exit 3")
    assert result.returncode == 3 and "costs money" not in result.stderr
    assert pod.calls().count("create") == pod.calls().count("delete") == 2


def test_a_stopped_run_is_restarted(pod: Pod):
    once = "[ -e ../again ] && exit 0; touch ../again; exit 143"
    result = pod.run("all", *TPU, "--job", "one", "--", "sh", "-c", once)
    assert result.returncode == 0
    assert pod.calls() == ["create", "scp", "ssh", "ssh", "ssh"]
    assert pod.log("one", 0).endswith("exit code 143\n") and pod.log("one-1", 0).endswith("exit code 0\n")


def test_a_preempted_tpu_is_created_again(pod: Pod):
    taken = '[ -e ../again ] && exit 0; touch ../again; echo PREEMPTED >"$FAKE/tpu-vm"; exit 1'
    result = pod.run("all", *TPU, "--", "sh", "-c", taken)
    assert result.returncode == 0, result
    start = ["create", "scp", "ssh", "ssh"]
    assert pod.calls() == [*start, "delete", *start]


def test_a_user_error_of_any_worker_is_not_restarted(pod: Pod):
    error = '[ "$JAX_PROCESS_ID" = 1 ] && exit 2; exit 134'
    result = pod.run("all", *TPU, "--", "sh", "-c", error)
    assert result.returncode == 2
    assert pod.calls() == ["create", "scp", "ssh", "ssh"]


def test_restarts_are_limited(pod: Pod):
    result = pod.run("all", *TPU, "--", "sh", "-c", "exit 1", SR3_MAX_RESTARTS="1")
    assert result.returncode == 1
    assert pod.calls() == ["create", "scp", "ssh", "ssh", "ssh"]


def test_logs_and_status_of_a_job(installed: Pod):
    run = ["run", *TPU, "--job", "one", "--", "sh", "-c", "echo line of $JAX_PROCESS_ID; exit 3"]
    assert installed.run(*run).returncode == 3
    shutil.rmtree(installed.clone / "out")
    assert installed.run("logs", *TPU).returncode == 0
    assert [installed.log("newest", worker) for worker in (0, 1)] == ["line of 0\n", "line of 1\n"]
    status = installed.run("status", *TPU).stdout
    assert status.startswith("READY\n") and status.count("exit code 3") == 2
    assert installed.run("stop", *TPU).returncode == 0  # nothing is running


# --- A job on a worker


def _worker(pod: Pod, *arguments: str) -> subprocess.Popen[str]:
    env = os.environ | {"PATH": f"{pod.fake}/bin:/usr/bin:/bin", "HOME": str(pod.fake / "0")}
    return subprocess.Popen(
        ["bash", str(pod.fake / "0/sr3_jax/launch/tpu_worker.sh"), *arguments],
        env=env, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_a_job_survives_its_connection_and_is_followed_again(installed: Pod):
    script = (
        "echo started >>started; trap 'echo saved; exit 143' TERM; echo ready; while :; do sleep 0.1; done"
    )
    job = ["run", "one", "sh", "-c", script]
    first = _worker(installed, *job)
    assert first.stdout.readline() == "ready\n"
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    second = _worker(installed, *job)
    assert second.stdout.readline() == "ready\n"
    second_job = _worker(installed, "run", "two", "true")
    assert "one" in second_job.communicate(timeout=20)[0] and second_job.returncode == 2
    assert "ready" in _worker(installed, "status").communicate(timeout=20)[0]
    assert _worker(installed, "stop").wait(timeout=20) == 0
    assert (
        second.communicate(timeout=20)[0] == "saved\ntpu_worker.sh: stopped\ntpu_worker.sh: exit code 143\n"
    )
    third = _worker(installed, *job)
    assert (
        third.communicate(timeout=20)[0]
        == "ready\nsaved\ntpu_worker.sh: stopped\ntpu_worker.sh: exit code 143\n"
    )
    assert (second.returncode, third.returncode) == (143, 143)
    assert (installed.fake / "0/sr3_jax/started").read_text() == "started\n"
    assert "143" in _worker(installed, "status").communicate(timeout=20)[0]


def test_a_job_whose_machine_went_down_has_exit_code_137(installed: Pod):
    job = ["run", "one", "sh", "-c", "echo $PPID; exec sleep 60"]
    first = _worker(installed, *job)
    keeper = int(first.stdout.readline())
    os.killpg(keeper, signal.SIGKILL)  # the job and the process that records its code
    assert first.communicate(timeout=20)[0] == "tpu_worker.sh: exit code 137\n"
    assert first.returncode == 137
    time.sleep(0.1)
    again = _worker(installed, *job)
    assert again.communicate(timeout=20)[0] == f"{keeper}\ntpu_worker.sh: exit code 137\n"
