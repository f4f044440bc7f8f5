"""Jobs of several real processes on one machine: results, stopping and resuming."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from PIL import Image as PillowImage

from sr3_jax.cli import main as cli
from sr3_jax.distributed import sharding
from sr3_jax.train import experiment, loop, weights
from tests import soak_resume, tiny

ROOT = Path(__file__).resolve().parent.parent
# Small arrays are sharded too, so that weights are split over the processes.
START = (
    "import sys; from sr3_jax.distributed import sharding; sharding.FSDP_MIN_BYTES = 64; "
    "from sr3_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
)
MODEL = tiny.CONFIG["model"] | {"channels": 8}


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with tiny.quick_compilation():
        yield


def environment() -> dict[str, str]:
    return os.environ | {  # shares the compilation cache of the tests
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "SR3_GRACE": "60",
        "XLA_FLAGS": "",
    }


@contextmanager
def pod(processes: int, devices: int, *command: str) -> Iterator[subprocess.Popen]:
    """A running launcher, which is killed with its processes at the end."""
    with subprocess.Popen(
        ["bash", "launch/local_pod.sh", str(processes), str(devices), sys.executable, *command],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    folder = workdir / "checkpoints" / str(step)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    metadata = ocp.checkpointables_metadata(folder).metadata
    items = {
        name: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), metadata[name])
        for name in ("ema", "train")
    }
    leaves = jax.tree_util.tree_leaves_with_path(ocp.load_checkpointables(folder, items))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def near(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-3, atol=2e-5, err_msg=name)


def losses(workdir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_sigterm_on_one_process_saves_on_all_and_fewer_devices_resume(tmp_path, monkeypatch):
    """2 processes x 4 devices with sharded weights, then 1 process with 4 devices, equal a run on 8 devices."""
    folder = tiny.images(tmp_path / "images")

    def values(steps: int, **mesh: int) -> dict:
        train = {"num_steps": steps, "log_every": 1}
        # A large epsilon: Adam divides by the size of the gradient, which turns rounding errors into steps.
        return tiny.config(folder, model=MODEL, train=train, mesh=mesh, optim={"b2": 0.9})

    config, workdir = tmp_path / "config.py", tmp_path / "workdir"
    every_step = {"checkpoint": {"minutes": 1e-4, "keep": 1}}  # both processes must save the same steps
    config.write_text(f"def get_config():\n    return {values(10**6, data=1, fsdp=8) | every_step!r}\n")
    command = ["-c", START, "train", f"--config={config}", f"--workdir={workdir}"]
    with pod(2, 4, *command) as process:
        patience = time.monotonic() + 300
        log = workdir / "metrics.jsonl"
        while not (log.exists() and log.read_text().count("\n") >= 5) and process.poll() is None:
            assert time.monotonic() < patience
            time.sleep(0.1)
        [second] = soak_resume.members(process.pid, 1)
        os.kill(second, signal.SIGTERM)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 143, err
    assert "Traceback" not in err
    [step] = [int(path.name) for path in (workdir / "checkpoints").iterdir()]
    assert f"step {step}" in err and "Run the same command again" in err
    assert max(losses(workdir)) == step >= 5
    assert json.loads(log.read_text().splitlines()[-1])["seconds_checkpoint"] > 0

    # ---- 8 devices of one process
    whole = tmp_path / "whole"
    assert loop.train(experiment.read(values(step + 2)), whole) == 0
    # ---- 4 devices resume the run of 2 x 4
    four = sharding.make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    monkeypatch.setattr(sharding, "FSDP_MIN_BYTES", 64)
    monkeypatch.setattr(sharding, "make_mesh", lambda **sizes: four)
    assert loop.train(experiment.read(values(step + 2, data=2, fsdp=2)), workdir) == 0
    found, wanted = losses(workdir), losses(whole)
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=1e-4)
    near(arrays(workdir, step + 2), arrays(whole, step + 2))


def test_folder_is_divided_among_processes(tmp_path, capsys):
    folder = tiny.images(tmp_path / "in", count=5, side=12)
    (folder / "broken.png").write_bytes(b"no image")
    model = tmp_path / "model.safetensors"
    plain = experiment.read(tiny.config(folder))

    weights.export(model, tiny.perturbed(plain.init_params(jax.random.key(0))), plain.config)
    options = [f"--model={model}", "--steps=2", "--batch-size=1"]
    out, single = tmp_path / "out", tmp_path / "single"
    command = ["-m", "sr3_jax", "upscale", str(folder), f"-o{out}", *options]
    with pod(2, 1, *command) as process:
        text, err = process.communicate(timeout=300)
    assert process.returncode == 3  # one image is damaged
    assert err.count("broken.png: ") == 1 and "Traceback" not in err
    counts = sorted(line.removeprefix("[1] ") for line in text.splitlines() if "done" in line)
    assert [line.split(",")[0] for line in counts] == ["process 0 of 2: 3 done", "process 1 of 2: 2 done"]
    assert cli.main(["upscale", str(folder), f"-o{single}", *options]) == 1
    names = sorted(path.name for path in single.iterdir())
    assert len(names) == 5 and sorted(path.name for path in out.iterdir()) == names
    for name in names:
        with PillowImage.open(out / name) as one, PillowImage.open(single / name) as other:
            assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
    capsys.readouterr()


def test_evaluation_is_divided_among_processes_and_finished_by_one(tmp_path, capsys):
    """2 processes with different images, then one process, which finds all their outputs."""
    folder = tiny.images(tmp_path / "in", count=5, side=24)
    model = tmp_path / "model.safetensors"
    plain = experiment.read(tiny.config(folder))

    weights.export(model, tiny.perturbed(plain.init_params(jax.random.key(0))), plain.config)
    out, single = tmp_path / "out", tmp_path / "single"
    options = [f"--model={model}", f"--data=folder:{folder}", "--steps=2", "--samples=2", "--features=none"]
    with pod(2, 1, "-m", "sr3_jax", "evaluate", *options, f"-o{out}") as process:
        text, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert (
        text.count("| bicubic ") == 2 and "2 processes" in text
    )  # means and intervals, written by process 0 only
    lines = {path.name: len(path.read_text().splitlines()) for path in out.glob("outputs/bicubic/4x/*.jsonl")}
    assert lines == {"scores.jsonl": 3, "scores.1.jsonl": 2}

    def report(path):
        return json.loads((path / "evaluation.json").read_text())

    first = report(out)
    assert [image["name"] for image in first["images"]] == [f"{at:02d}" for at in range(5)]
    assert (out / "grid.png").is_file()
    assert (
        cli.main(["evaluate", *options, f"-o{out}"]) == cli.main(["evaluate", *options, f"-o{single}"]) == 0
    )
    second, whole = report(out), report(single)
    assert (second["outputs_reused"], whole["outputs_reused"]) == (15, 0)
    assert second["rows"] == first["rows"]
    for row, other in zip(first["rows"], whole["rows"], strict=True):
        for key in ("psnr", "ssim", "diversity"):
            if key in other["summary"]:
                assert row["summary"][key]["mean"] == pytest.approx(other["summary"][key]["mean"], abs=0.02)
    capsys.readouterr()


def test_cascade_is_divided_among_processes_and_gives_the_same_images(tmp_path, capsys):
    options = ["--stages", "fashion_base_8", "fashion_8_16", "-n", "5", "--steps=2", "--batch-size=2"]
    out, single = tmp_path / "out", tmp_path / "single"
    with pod(2, 1, "-m", "sr3_jax", "cascade", *options, f"-o{out}") as process:
        text, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert text.count("5 images, grid.png, stages.png and images.json") == 1  # by process 0 only
    assert cli.main(["cascade", *options, f"-o{single}"]) == 0
    for index in range(5):
        with (
            PillowImage.open(out / f"{index:05d}.png") as one,
            PillowImage.open(single / f"{index:05d}.png") as other,
        ):
            assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
    capsys.readouterr()


def test_killed_run_ends_in_the_same_bits(tmp_path):
    """`kill -9` during training, then the same command again; tests/soak_resume.py does this many times."""
    job = soak_resume.make_job(tmp_path, processes=1, devices=8, steps=120, every=25)
    text = (tmp_path / "config.py").read_text()
    values = eval(text.split("return", 1)[1])  # written by make_job
    assert loop.train(experiment.read(values), tmp_path / "whole") == 0
    workdir = tmp_path / "killed"
    process = job.start(workdir)
    patience = time.monotonic() + 300
    while not (workdir / "checkpoints" / "25").exists() and process.poll() is None:
        assert time.monotonic() < patience
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    soak_resume.complete(job, workdir)
    assert "resuming" in soak_resume.log_of(workdir)
    found, wanted = soak_resume.result(workdir), soak_resume.result(tmp_path / "whole")
    assert found[1] == wanted[1]
    assert [name for name in wanted[0] if found[0][name] != wanted[0][name]] == []
