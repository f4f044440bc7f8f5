"""Commands on over two hundred hostile inputs: no traceback, every good file processed, every bad one named."""

from __future__ import annotations

import os

import hostile
import pytest
from stand_in import StandIn

from sr3_jax.cli.main import main
from sr3_jax.data.sources import open_source
from sr3_jax.image_io.errors import printable
from sr3_jax.image_io.image_file import read_image
from sr3_jax.inference import model
from sr3_jax.inference.upscale_files import find_images

# sr3_jax.image_io ignores these on import, but pytest resets the filters.
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "in"
    return folder, hostile.make(folder)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_upscale(made, tmp_path, monkeypatch, capsys, batch_size):
    folder, files = made
    assert len(files.good) + len(files.bad) > 200
    monkeypatch.setattr(model, "load", lambda name: StandIn())
    out = tmp_path / "out"
    arguments = ["upscale", str(folder), "-o", str(out), "--batch-size", str(batch_size)]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    closing = f"{len(files.good)} done, 0 skipped (already there), {len(files.bad)} failed"
    assert captured.out.splitlines()[-1] == closing
    assert f"{len(files.ignored)} files that are no images" in captured.out
    named = captured.err.splitlines()
    for path, why in files.bad.items():
        lines = [line for line in named if line.startswith(f"{printable(path)}: ")]
        assert len(lines) == 1, path
        assert why in lines[0]
    jobs = {job.source: job.target for job in find_images([folder], out).jobs}
    for path, (height, width) in files.good.items():
        before, after = read_image(path), read_image(jobs[path])
        assert after.rgb.shape == (2 * height, 2 * width, 3), path
        assert (after.alpha is None) == (before.alpha is None), path
        assert after.grey == before.grey, path
    written = {os.path.join(at, name) for at, _, names in os.walk(out) for name in names}
    assert written == {str(jobs[path]) for path in files.good}, "partial outputs are left"
    assert main(arguments) == 1
    closing = f"0 done, {len(files.good)} skipped (already there), {len(files.bad)} failed"
    assert capsys.readouterr().out.splitlines()[-1] == closing


def test_upscale_of_files_given_one_by_one(made, tmp_path, monkeypatch, capsys):
    """As from a shell's `*`: one call, every file an argument."""
    folder, files = made
    monkeypatch.setattr(model, "load", lambda name: StandIn())
    monkeypatch.chdir(folder / "names")
    names = sorted(path.name for path in files.good if path.parent.name == "names")
    assert main(["upscale", "-o", str(tmp_path / "out"), "--", *names]) == 0
    assert sorted(os.listdir(tmp_path / "out")) == names
    assert main(["upscale", *map(str, files.ignored), "-o", str(tmp_path / "none")]) == 1
    failed = capsys.readouterr().err.splitlines()
    assert len(failed) == len(files.ignored)
    assert not (tmp_path / "none").exists()


def test_prepare(made, tmp_path, capsys, monkeypatch):
    """Every image except hidden ones is in the data set, and every other file is named."""
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
