"""launch/slurm.sbatch with a fake Slurm, and the numbers of launch/gke.yaml that must agree with each other."""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from sr3_jax.cli import train
from sr3_jax.config import load_config
from sr3_jax.distributed.processes import find_group
from sr3_jax.distributed.sharding import mesh_sizes
from sr3_jax.train.experiment import check_batch, read

ROOT = Path(__file__).resolve().parent.parent
SBATCH = str(ROOT / "launch/slurm.sbatch")
WORDS = ["sr3", "train", "--config=a b.py", "it's", "", "$HOME"]
CHIPS_OF_A_HOST = {"tpu-v5-lite-podslice": 4, "tpu-v6e-slice": 4, "tpu-v5p-slice": 4, "tpu-v4-podslice": 4}


# --- Slurm


def _sbatch(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("SR3_", "SLURM_", "JAX_"))
    }
    env |= {"PATH": f"{folder}/bin:/usr/bin:/bin"} | environment
    return subprocess.run(
        ["bash", SBATCH, *arguments],
        cwd=folder, env=env, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A folder with a fake Slurm: srun prints $SRUN_SAYS on stderr and exits with $SRUN_CODE."""
    (tmp_path / "bin").mkdir()
    for name, text in (
        (
            "srun",
            'printf "%s\\n" "$SRUN_CPUS_PER_TASK" "$JAX_COORDINATOR_ADDRESS" "$@" >srun\n'
            'echo "$SRUN_SAYS" >&2; exit "$SRUN_CODE"',
        ),
        ("scontrol", '[ "$1" = requeue ] || { printf "node03\\nnode04\\n"; exit; }; echo "$2" >requeued'),
    ):
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def test_a_dry_run_prints_the_commands(tmp_path: Path):
    quoted = "sr3 train '--config=a b.py' 'it'\\''s' '' '$HOME'"
    result = _sbatch(tmp_path, "--dry-run", *WORDS)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --time=24:00:00 --job-name=sr3 "
        f"--output=sr3-%j.out --open-mode=append --requeue --signal=TERM@120 launch/slurm.sbatch {quoted}",
        f"srun --kill-on-bad-exit=1 --open-mode=append --output=slurm_logs/%j-%t.out {quoted}",
    ]
    assert not list(tmp_path.iterdir())


def test_the_options_are_read_by_slurm():
    """They must come before the first command of the script, one per line."""
    lines = Path(SBATCH).read_text().splitlines()
    first = next(index for index, line in enumerate(lines) if line and not line.startswith("#"))
    options = [index for index, line in enumerate(lines) if line.startswith("#SBATCH ")]
    assert lines[0] == "#!/usr/bin/env bash" and len(options) == 10 and max(options) < first


@pytest.mark.parametrize(
    ("code", "says", "restarts", "requeued", "ends"),
    [
        (0, "", 0, False, 0),
        (143, "", 0, True, 143),
        (143, "", 500, True, 143),
        (2, "srun: error: node03: task 1: Exited with exit code 2", 0, False, 2),
        (137, "srun: error: node03: tasks 1-3: Exited with exit code 2\nsrun: error: killed", 0, False, 2),
        (1, "srun: error: node03: task 1: Exited with exit code 1", 0, True, 1),
        (134, "srun: error: node03: task 12: Exited with exit code 12", 3, True, 134),
        (137, "", 20, False, 137),
        (130, "", 0, False, 130),
        (127, "", 0, False, 127),
    ],
)
def test_a_job_is_requeued_after_signals_and_lost_machines_only(
    cluster: Path, code: int, says: str, restarts: int, requeued: bool, ends: int
):
    slurm = {
        "SLURM_JOB_ID": "4097",
        "SLURM_JOB_NODELIST": "node[03-04]",
        "SLURM_CPUS_PER_TASK": "8",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    result = _sbatch(cluster, *WORDS, **slurm, SRUN_CODE=str(code), SRUN_SAYS=says)
    assert result.returncode == ends, result
    assert says in result.stderr
    cpus, address, *arguments = (cluster / "srun").read_text().removesuffix("\n").split("\n")
    assert (cpus, address) == ("8", "node03:61441") and arguments[-len(WORDS) :] == WORDS
    assert (cluster / "requeued").exists() == requeued
    assert not requeued or (cluster / "requeued").read_text() == "4097\n"
    assert (cluster / "slurm_logs").is_dir()


def test_restarts_are_limited(cluster: Path):
    slurm = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "x", "SLURM_RESTART_COUNT": "2", "SRUN_SAYS": ""}
    _sbatch(cluster, "x", **slurm, SRUN_CODE="1", SR3_MAX_RESTARTS="2")
    assert not (cluster / "requeued").exists()
    _sbatch(cluster, "x", **slurm, SRUN_CODE="1", SR3_MAX_RESTARTS="3")
    assert (cluster / "requeued").exists()


def test_the_venv_of_the_repository_is_used(cluster: Path):
    (cluster / ".venv/bin").mkdir(parents=True)
    (cluster / "bin/srun").rename(cluster / ".venv/bin/srun")
    slurm = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "x", "SRUN_SAYS": "", "SRUN_CODE": "0"}
    assert _sbatch(cluster, "x", **slurm).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "environment", "word"),
    [
        ([], {}, "COMMAND"),
        (["--dry-run"], {}, "COMMAND"),
        (["sr3"], {}, "sbatch launch/slurm.sbatch"),
        (["--dry-run", "sr3"], {"SR3_MAX_RESTARTS": "many"}, "'many'"),
    ],
)
def test_wrong_arguments_fail_with_one_sentence(
    tmp_path: Path, arguments: list[str], environment: dict, word: str
):
    result = _sbatch(tmp_path, *arguments, **environment)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1 and word in result.stderr


# --- docs/pods.md


def test_the_dry_runs_of_the_docs_run(tmp_path: Path):
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/pods.md").read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    dry = [
        line for line in lines if "--dry-run" in line.partition("sr3 ")[0]
    ]  # of the launcher, not of sr3 train
    assert {line.split()[1] for line in dry} == {
        f"launch/{x}" for x in ("local_pod.sh", "local_gpus.sh", "tpu_pod.sh", "slurm.sbatch")
    }
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    for line in dry:
        result = subprocess.run(
            line, shell=True, cwd=ROOT, env=env, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0 and "sr3 train" in result.stdout, (line, result)
    scripts = set(re.findall(r"launch/[\w.]+", "".join(blocks)))
    assert scripts and all((ROOT / script).exists() for script in scripts)


# --- GKE. The whole file was validated once against the schema of the JobSet CRD.


@pytest.fixture(scope="module")
def jobset() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "launch/gke.yaml").read_text())


@pytest.fixture(scope="module")
def job(jobset: dict[str, Any]) -> dict[str, Any]:
    (only,) = jobset["spec"]["replicatedJobs"]
    assert only["replicas"] == 1
    return only["template"]["spec"]


@pytest.fixture(scope="module")
def container(job: dict[str, Any]) -> dict[str, Any]:
    (only,) = job["template"]["spec"]["containers"]
    return only


def test_there_are_as_many_pods_as_hosts(job, container):
    selector = job["template"]["spec"]["nodeSelector"]
    kind = selector["cloud.google.com/gke-tpu-accelerator"]
    chips = math.prod(int(side) for side in selector["cloud.google.com/gke-tpu-topology"].split("x"))
    resources = container["resources"]
    assert (
        resources["requests"]["google.com/tpu"]
        == resources["limits"]["google.com/tpu"]
        == CHIPS_OF_A_HOST[kind]
    )
    assert job["completions"] == job["parallelism"] == chips // CHIPS_OF_A_HOST[kind] == 64
    assert job["completionMode"] == "Indexed"


def test_user_errors_end_the_jobset_and_other_failures_restart_it(jobset, job, container):
    (pods,) = job["podFailurePolicy"]["rules"]
    assert pods == {
        "action": "FailJob",
        "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [2, 3, 130]},
    }
    # One pod that failed in any other way fails the job as well, for another reason: backoffLimit.
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
    policy = jobset["spec"]["failurePolicy"]
    (rule,) = policy["rules"]  # other failures restart
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert "targetReplicatedJobs" not in rule and policy["maxRestarts"] >= 20


def test_there_is_time_to_save_and_to_start(job, container):
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] >= 60
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    assert float(variables["SR3_START_TIMEOUT"]) > 300 and all(isinstance(x, str) for x in variables.values())


def test_the_pods_find_each_other(jobset):
    network = jobset["spec"]["network"]
    assert network["enableDNSHostnames"] and network["publishNotReadyAddresses"]
    assert network["subdomain"] == jobset["metadata"]["name"]


@pytest.mark.parametrize("slices", [1, 2])
def test_all_pods_of_all_slices_form_one_group(jobset, job, container, slices: int):
    """With the variables that GKE sets in each pod of a TPU slice."""
    name, (replicated,) = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"]
    hosts = [
        [f"{name}-{replicated['name']}-{i}-{k}.{name}" for k in range(job["completions"])]
        for i in range(slices)
    ]
    groups = []
    for index in range(slices):
        for worker in range(job["completions"]):
            pod = {"TPU_WORKER_HOSTNAMES": ",".join(hosts[index]), "TPU_WORKER_ID": str(worker)}
            if slices > 1:
                pod |= {"MEGASCALE_NUM_SLICES": str(slices), "MEGASCALE_SLICE_ID": str(index)}
                pod["MEGASCALE_COORDINATOR_ADDRESS"] = hosts[0][0]
            groups.append(find_group(pod))
    assert [group.index for group in groups] == list(range(slices * job["completions"]))
    assert {group.count for group in groups} == {len(groups)}
    ((host, _, port),) = {group.address.rpartition(":") for group in groups}
    assert host == hosts[0][0]
    assert int(port) in {port["containerPort"] for port in container["ports"]}


def test_the_workdir_is_on_the_volume(job, container):
    (mount,), (volume,) = container["volumeMounts"], job["template"]["spec"]["volumes"]
    assert mount["name"] == volume["name"] and volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
    assert job["template"]["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
    workdir = next(word for word in container["command"] if word.startswith("--workdir="))
    assert workdir.removeprefix("--workdir=").startswith(mount["mountPath"] + "/")
    data = next(variable["value"] for variable in container["env"] if variable["name"] == "TFDS_DATA_DIR")
    assert data.startswith(mount["mountPath"] + "/")


def test_the_command_is_one_that_sr3_takes(job, container, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    program, name, *arguments = container["command"]
    assert (program, name) == ("sr3", "train")
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    train.add_arguments(parser)
    parsed, rest = parser.parse_known_args(arguments)
    experiment = read(load_config(parsed.config, rest))
    config = experiment.config
    chips = job["completions"] * container["resources"]["limits"]["google.com/tpu"]
    check_batch(config, devices=chips, processes=job["completions"])
    mesh_sizes(chips, **config["mesh"], state_bytes=experiment.state_bytes)  # does not fail


def test_the_image_has_what_the_command_names(container):
    lines = (ROOT / "launch/Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]}
    assert all((ROOT / name).exists() for name in copied)
    config = next(word for word in container["command"] if word.startswith("--config="))
    assert config.removeprefix("--config=").split("/")[0] in copied
    setup = (ROOT / "setup.cfg").read_text()
    assert {"setup.cfg", "pyproject.toml", "sr3_jax", "LICENSE", "README.md"} <= copied
    assert re.search(r"^ARG EXTRA=tpu$", "\n".join(lines), re.MULTILINE) and "\ntpu =\n" in setup
