"""Workdirs, data and outputs in a bucket: gs:// URLs, against a local server with the API of Cloud Storage."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import socket
from pathlib import Path

import jax
import numpy as np
import pytest

from sr3_jax import files, storage
from sr3_jax.cli.main import main
from sr3_jax.data.sources import open_source
from sr3_jax.distributed import sharding
from sr3_jax.errors import UserError
from sr3_jax.evaluation.cache import FeatureCache
from sr3_jax.features.statistics import FeatureProtocol
from sr3_jax.inference.loading import load
from sr3_jax.storage import AppendedFile, as_path
from sr3_jax.train import checkpoints, experiment, loop, weights
from sr3_jax.train.metric_writer import read_metrics
from sr3_jax.train.workdir import locked_workdir
from tests import tiny

if importlib.util.find_spec("gcsfs") is None:
    pytest.skip("gcsfs is not installed", allow_module_level=True)
emulator = pytest.importorskip("gcp_storage_emulator.server")


@pytest.fixture(scope="session")
def server():
    """A server for gcsfs, which all of this process's Python code uses, and for TensorStore, which Orbax uses."""
    import fsspec

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    url = f"http://localhost:{port}"
    os.environ |= {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,
    }
    fsspec.config.conf.setdefault("gs", {})["token"] = "anon"
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)  # an absent object is an error to it
    running = emulator.create_server("localhost", port, in_memory=True, default_bucket="bucket")
    running.start()
    yield
    running.stop()


@pytest.fixture
def bucket(server, tmp_path) -> Path:
    """An empty folder in a bucket."""
    return as_path(f"gs://bucket/{tmp_path.name}")


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with tiny.quick_compilation():
        yield


def copied(folder: Path, target: Path) -> Path:
    """Copy the files of a local folder to a bucket."""
    storage.upload_folder(folder, target)
    return target


# ---- Training


def train(source: Path, workdir: Path, **train_fields) -> int:
    sections = {
        "train": {"num_steps": 6, "log_every": 3} | train_fields,
        "eval": {"every": 3, "num_images": 8},
        "checkpoint": {"every": 3, "keep": 2, "best": True},
    }
    return loop.train(experiment.read(tiny.config(source, **sections)), workdir)


def test_a_run_in_a_bucket_resumes_and_is_that_of_a_local_folder(bucket, tmp_path):
    images = tiny.images(tmp_path / "images")
    assert train(images, tmp_path / "run") == 0
    remote_images = copied(images, bucket / "images")
    assert train(remote_images, bucket / "run", num_steps=3) == 0
    assert checkpoints.newest_step(bucket / "run") == 3
    assert train(remote_images, bucket / "run", profile_steps="4:5") == 0

    local, remote = tmp_path / "run", bucket / "run"
    assert checkpoints.newest_step(remote) == 6
    results = [
        [
            {name: row[name] for name in row if name in ("step", "loss") or name.startswith("eval_")}
            for row in rows
        ]
        for rows in (read_metrics(local), read_metrics(remote))
    ]
    assert results[0] == results[1] and results[0][-1]["step"] == 6
    names = {path.relative_to(remote).as_posix() for path in storage.objects(remote)}
    assert {"config.json", "metrics.jsonl", "best.safetensors", "samples/samples_0000006.png"} <= names
    assert sum(name.startswith("tensorboard/events.out.tfevents.") for name in names) == 2
    assert any(name.startswith("profile/") and name.endswith(".xplane.pb") for name in names)
    assert not any(storage.SCRATCH_PREFIX in name for name in names)
    for path in ("", "best.safetensors"):
        one, other = load(local / path), load(os.fspath(remote / path))
        jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def test_a_checkpoint_that_was_not_completed_is_not_used(bucket):
    for step in (3, 6):
        (bucket / "checkpoints" / str(step) / "_CHECKPOINT_METADATA").write_bytes(b"{}")
    assert checkpoints.newest_step(bucket) is None
    (bucket / "checkpoints" / "3" / "commit_success.txt").write_bytes(b"")
    assert checkpoints.newest_step(bucket) == 3


def test_dry_run_with_a_bucket(bucket, tmp_path, capsys):
    file = tmp_path / "tiny_config.py"
    file.write_text(
        f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({tiny.config()!r})\n"
    )
    data = [f"--config.data.{name}=synthetic:10x24x24" for name in ("source", "eval_source")]
    assert main(["train", f"--config={file}", f"--workdir={bucket}", "--dry-run", *data]) == 0
    assert f"{bucket}: starts at step 0" in capsys.readouterr().out
    assert not storage.objects(bucket)


def test_a_bucket_that_cannot_be_written_fails_at_the_start(server):
    with (
        pytest.raises(UserError, match="gs://no-such-bucket/run") as error,
        locked_workdir(as_path("gs://no-such-bucket/run"), sharding.make_mesh()),
    ):
        pass
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("s3://bucket/run", "gs://BUCKET/PATH"),
        ("gs://", "gs://BUCKET/PATH"),
        ("https://a/b", "gs://BUCKET/PATH"),
    ],
)
def test_urls_that_are_not_supported_are_refused(url, text, capsys):
    assert main(["train", "--config=photos_4x", f"--workdir={url}"]) == 2
    error = capsys.readouterr().err
    assert url in error and text in error and error.count("\n") == 1


def test_the_package_that_a_url_needs_is_named(monkeypatch):
    monkeypatch.setattr(storage, "SCHEMES", {"gs": ("no_such_package", "gcs")})
    with pytest.raises(UserError, match=r"no_such_package.*sr3_jax\[gcs\]"):
        as_path("gs://bucket/run")


# ---- Files


def test_a_write_that_fails_leaves_the_object_as_it_was(bucket):
    path = bucket / "file"
    with storage.atomic_write(path) as file:
        file.write(b"before")
    with pytest.raises(RuntimeError), storage.atomic_write(path) as file:
        file.write(b"after")
        raise RuntimeError
    assert path.read_bytes() == b"before"


def test_rows_are_appended_and_an_incomplete_one_is_ended(bucket):
    path = bucket / "rows.jsonl"
    files.append_jsonl(path, [{"a": 1}])
    path.write_bytes(path.read_bytes() + b'{"a": ')
    files.append_jsonl(path, [{"a": 2}, {"a": 3}])
    assert files.read_jsonl(path) == [{"a": 1}, {"a": 2}, {"a": 3}]


@pytest.mark.parametrize("where", ["bucket", "folder"])
def test_what_is_appended_is_complete_after_a_minute_and_at_the_end(where, bucket, tmp_path, monkeypatch):
    path = (bucket if where == "bucket" else tmp_path) / "log"
    file = AppendedFile(path)
    file.write(b"one ")
    if where == "bucket":
        assert not path.exists()
    monkeypatch.setattr(storage, "SYNC_SECONDS", 0.0)
    file.write(b"two ")
    assert path.read_bytes() == b"one two "
    assert str(path) not in opened()  # a bucket that is mounted as a folder gets a file when it is closed
    monkeypatch.setattr(storage, "SYNC_SECONDS", 60.0)
    file.write(b"three ")
    file.close()
    assert path.read_bytes() == b"one two three "
    again = AppendedFile(path)
    again.write(b"four")
    again.close()
    assert path.read_bytes() == b"one two three four"


def opened() -> set[str]:
    """The files that this process has open."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:  # the listing itself
            continue
    return found


def test_an_upload_that_failed_is_repeated(bucket, monkeypatch):
    file = AppendedFile(bucket / "log")
    with monkeypatch.context() as patched:
        patched.setattr(storage, "SYNC_SECONDS", 0.0)
        patched.setattr(storage, "_file_system", lambda path: (None, ""))
        with pytest.raises(OSError):
            file.write(b"one ")
    file.close()
    assert (bucket / "log").read_bytes() == b"one "


# ---- Data


def test_a_folder_of_a_bucket_has_the_images_of_the_local_one(bucket, tmp_path):
    tiny.images(tmp_path / "images" / "b", count=3)
    tiny.images(tmp_path / "images" / ".hidden", count=1)
    tiny.images(tmp_path / "images", count=2, seed=1)
    (tmp_path / "images" / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    copied(tmp_path / "images", bucket / "images")
    local, remote = (open_source(f"folder:{folder / 'images'}") for folder in (tmp_path, bucket))
    assert len(local) == len(remote) == 5
    for index in range(5):
        np.testing.assert_array_equal(local[index]["image"], remote[index]["image"])
        assert local.file_name(index) == remote.file_name(index)
    with pytest.raises(UserError, match="gs://bucket/absent"):
        open_source("folder:gs://bucket/absent")


def test_pairs_in_a_bucket(bucket, tmp_path):
    for name, side in (("low", 6), ("high", 24)):
        copied(tiny.images(tmp_path / name, side=side, count=2), bucket / name)
    source = open_source(f"pairs:{bucket / 'low'}:{bucket / 'high'}")
    assert source.scale == 4 and source[1]["low_res"].shape == (6, 6, 3)


# ---- Commands


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """An exported model with random weights."""
    read = experiment.read(tiny.config())
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    weights.export(path, tiny.perturbed(read.init_params(jax.random.key(0))), dict(read.config))
    return path


def test_upscale_from_bucket_to_bucket_writes_the_bytes_of_local_files(model, bucket, tmp_path, capsys):
    tiny.images(tmp_path / "in" / "sub", count=2)
    copied(tmp_path / "in", bucket / "in")
    copied(model.parent, bucket / "model")
    (bucket / "in" / "notes.txt").write_bytes(b"not an image")
    assert main(["upscale", str(tmp_path / "in"), "-o", str(tmp_path / "out"), f"--model={model}"]) == 0
    command = ["upscale", f"{bucket}/in", "-o", f"{bucket}/out", f"--model={bucket}/model/tiny.safetensors"]
    assert main(command) == 0
    outputs = sorted(path for path in (tmp_path / "out").rglob("*.png"))
    assert len(outputs) == 2
    for path in outputs:
        assert (bucket / "out" / path.relative_to(tmp_path / "out")).read_bytes() == path.read_bytes()
    capsys.readouterr()
    assert main(command) == 0
    assert "0 done, 2 skipped" in capsys.readouterr().out
    assert main(["upscale", f"{bucket}/in", "-o", f"{bucket}/in", f"--model={model}"]) == 2
    assert main(["upscale", f"{bucket}/absent", "-o", str(tmp_path / "out"), f"--model={model}"]) == 2


def test_evaluation_in_a_bucket_is_cached_there(model, bucket, tmp_path, capsys):
    images = copied(tiny.images(tmp_path / "images", count=2), bucket / "images")
    command = [
        "evaluate",
        f"--model={model}",
        f"--data=folder:{images}",
        "--features=none",
        "-o",
        f"{bucket}/scores",
    ]
    assert main(command) == 0
    first = json.loads((bucket / "scores" / "evaluation.json").read_text())
    capsys.readouterr()
    assert main(command) == 0
    assert "cached" in capsys.readouterr().out
    assert json.loads((bucket / "scores" / "evaluation.json").read_text())["rows"] == first["rows"]


def test_features_are_cached_in_a_bucket(bucket):
    protocol = FeatureProtocol("network", "frechet_network", "0" * 64, "none")
    features = np.arange(12, dtype=np.float32).reshape(3, 4)
    hashes = [f"{index:064x}" for index in range(3)]
    cache = FeatureCache(bucket, protocol)
    for index in range(2):
        cache.add([hashes[index]], features[index : index + 1])
    FeatureCache(bucket, protocol, process=1).add(hashes[2:], features[2:])
    found = FeatureCache(bucket, protocol)
    assert found.missing([*hashes, "f" * 64]) == [3]
    np.testing.assert_array_equal(found.get(hashes), features)


def test_a_model_is_exported_to_a_bucket(model, bucket):
    assert main(["export", str(model), "-o", f"{bucket}/exported.safetensors"]) == 0
    one, other = load(model), load(f"{bucket}/exported.safetensors")
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def test_prepared_data_sets_are_read_from_a_bucket(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("SR3_DATA_DIR", str(tmp_path / "data"))
    assert main(["prepare", str(tiny.images(tmp_path / "images", count=3)), "--name", "mine"]) == 0
    monkeypatch.setenv("SR3_DATA_DIR", str(copied(tmp_path / "data", bucket / "data")))
    remote = open_source("tfds:mine:train")
    assert len(remote) == 3 and remote[0]["image"].shape == (24, 24, 3)
