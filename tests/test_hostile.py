"""Hostile inputs through the commands: no traceback, every valid image is processed, every other one reported."""

from __future__ import annotations

import os
import re

import hostile
import pytest
from stand_in import StandIn

from sr3_jax.cli.main import main
from sr3_jax.data.sources import open_source
from sr3_jax.image_io.errors import printable
from sr3_jax.image_io.image_file import read_image
from sr3_jax.inference import loading
from sr3_jax.inference.upscale_files import find_images

# image_file ignores these warnings on import, but pytest resets the filters.
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "in"
    return folder, hostile.make(folder)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_upscale(made, tmp_path, monkeypatch, capsys, batch_size):
    folder, files = made
    assert len(files.good) + len(files.bad) > 200
    monkeypatch.setattr(loading, "load", lambda name: StandIn())
    out = tmp_path / "out"
    arguments = ["upscale", str(folder), "-o", str(out), "--batch-size", str(batch_size)]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    numbers = re.findall(r"\d+", captured.out.splitlines()[-1])
    assert numbers == [str(len(files.good)), "0", str(len(files.bad))]
    assert f"{len(files.ignored)} non-image files" in captured.out
    reported = captured.err.splitlines()
    for path, why in files.bad.items():
        lines = [line for line in reported if line.startswith(f"{printable(path)}: ")]
        assert len(lines) == 1, path
        assert why in lines[0]
    jobs = {job.source: job.target for job in find_images([folder], out).jobs}
    for path, (height, width) in files.good.items():
        before, after = read_image(path), read_image(jobs[path])
        assert after.rgb.shape == (2 * height, 2 * width, 3), path
        assert (after.alpha is None) == (before.alpha is None), path
        assert after.gray == before.gray, path
    written = {os.path.join(at, name) for at, _, names in os.walk(out) for name in names}
    assert written == {str(jobs[path]) for path in files.good}, "extra files are left"
    assert main(arguments) == 1
    numbers = re.findall(r"\d+", capsys.readouterr().out.splitlines()[-1])
    assert numbers == ["0", str(len(files.good)), str(len(files.bad))]


def test_upscale_of_files_given_one_by_one(made, tmp_path, monkeypatch, capsys):
    """As a shell expands `*`: one call with every file as an argument."""
    folder, files = made
    monkeypatch.setattr(loading, "load", lambda name: StandIn())
    monkeypatch.chdir(folder / "names")
    names = sorted(path.name for path in files.good if path.parent.name == "names")
    assert main(["upscale", "-o", str(tmp_path / "out"), "--", *names]) == 0
    assert sorted(os.listdir(tmp_path / "out")) == names
    assert main(["upscale", *map(str, files.ignored), "-o", str(tmp_path / "none")]) == 1
    failed = capsys.readouterr().err.splitlines()
    assert len(failed) == len(files.ignored)
    assert not (tmp_path / "none").exists()


def test_prepare(made, tmp_path, capsys, monkeypatch):
    """The data set has every image except hidden ones; every other file is reported."""
    folder, files = made
    data_dir = tmp_path / "data"
    monkeypatch.setenv("SR3_DATA_DIR", str(data_dir))
    assert main(["prepare", str(folder), "--name", "hostile", "--data-dir", str(data_dir)]) == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    good = {path: size for path, size in files.good.items() if not path.name.startswith(".")}
    assert f"tfds:hostile:train  {len(good)} images" in captured.out
    for path, why in files.bad.items():
        lines = [
            line for line in captured.err.splitlines() if line.strip().startswith(f"{printable(path)}: ")
        ]
        assert len(lines) == 1, path
        assert why in lines[0]
    source = open_source("tfds:hostile:train")
    sizes = sorted(source[index]["image"].shape[:2] for index in range(len(source)))
    assert sizes == sorted(good.values())
