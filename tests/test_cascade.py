"""Cascades end to end with tiny stages: outputs, resuming and invalid options."""

from __future__ import annotations

import dataclasses
import gc
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from sr3_jax.cli.main import main
from sr3_jax.config.load import complete
from sr3_jax.errors import UserError
from sr3_jax.image_io.image_file import read_rgb
from sr3_jax.inference import cascade, stages
from sr3_jax.inference.model import Model
from sr3_jax.train import experiment
from sr3_jax.train.checkpoints import CONFIG_FILE
from sr3_jax.train.weights import export
from tests import tiny

BASE = {
    "model": {"low_res": False, "num_classes": 3},
    "diffusion": {"space": "image"},
    "data": {"scale": 1, "shrink": 2, "label_dropout": 0.2},
    "stage": {"name": "base", "size": 8},
}
UNLABELED = BASE | {"model": {"low_res": False}, "data": {"scale": 1, "shrink": 2}}
MIDDLE = {"data": {"scale": 2}, "stage": {"name": "middle", "size": 16}}
LAST = {
    "model": {"augment": True},
    "data": {"scale": 2, "crop": 32, "augment": "noise"},
    "stage": {"name": "last", "size": 32},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, str]:
    """An exported model for each stage, by name."""
    folder = tmp_path_factory.mktemp("stages")
    files = {}
    for seed, sections in enumerate((BASE, MIDDLE, LAST)):
        read = experiment.read(tiny.config(**sections))
        params = tiny.perturbed(jax.device_get(read.init_params(jax.random.key(0))), seed=seed, size=0.3)
        name = sections["stage"]["name"]
        files[name] = str(folder / f"{name}.safetensors")
        export(Path(files[name]), params, read.config)
    return files


def run_cascade(arguments: list[str], out: Path) -> int:
    return main(["cascade", *arguments, "-o", str(out), "--batch-size=8"])


def outputs(out: Path) -> np.ndarray:
    return np.stack([read_rgb(path) for path in sorted(out.glob("0*.png"))])


def test_three_stages_generate_labeled_images_and_grids(exported, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        run_cascade(
            ["--stages", *exported.values(), "-n", "6", "--labels=2,0", "--keep", "--guidance=2"], out
        )
        == 0
    )
    assert outputs(out).shape == (6, 32, 32, 3)
    assert [len(list((out / "stages" / name).glob("*.png"))) for name in ("base", "middle")] == [6, 6]
    manifest = json.loads((out / "images.json").read_text())
    assert [entry["label"] for entry in manifest["images"]] == [2, 0] * 3
    assert [stage["name"] for stage in manifest["stages"]] == ["base", "middle", "last"]
    assert [stage["sampling"]["guidance"] for stage in manifest["stages"]] == [2.0, 1.0, 1.0]
    assert read_rgb(out / "grid.png").shape[0] > 2 * 64 and (out / "stages.png").is_file()
    assert "6 images, grid.png, stages.png and images.json" in capsys.readouterr().out


def test_stage_output_equals_upscale_of_the_stage_before(exported, tmp_path):
    """The last stage gives the same output as `upscale` of its model with the same key."""
    out = tmp_path / "out"
    assert run_cascade(["--stages", *exported.values(), "-n", "4", "--keep"], out) == 0
    before = np.stack([read_rgb(path) for path in sorted((out / "stages" / "middle").glob("*.png"))])
    expected = stages_model(exported["last"]).upscale(before, cascade._keys(0, 2, range(4)))
    np.testing.assert_array_equal(outputs(out), expected)


def stages_model(path: str) -> Model:
    from sr3_jax.inference.loading import load

    return load(path)


def test_image_depends_only_on_seed_index_and_label(exported, tmp_path):
    few, many, other = (tmp_path / name for name in ("few", "many", "other"))
    assert run_cascade(["--stages", *exported.values(), "-n", "2"], few) == 0
    assert run_cascade(["--stages", *exported.values(), "-n", "7"], many) == 0
    assert run_cascade(["--stages", *exported.values(), "-n", "2", "--seed=1"], other) == 0
    np.testing.assert_array_equal(outputs(many)[:2], outputs(few))
    assert (outputs(other) != outputs(few)).any(axis=(1, 2, 3)).all()


@pytest.fixture
def calls(monkeypatch):
    """Records the calls of stages as 'base' or a low-res image's side; interrupts the call of number `stop[0]`."""
    seen, stop = [], []
    upscale, generate = Model.upscale, Model.generate

    def record(call):
        seen.append(call)
        if stop and len(seen) == stop[0]:
            stop.clear()
            raise KeyboardInterrupt

    def upscaling(model, images, *args, **options):
        record(images.shape[1])
        return upscale(model, images, *args, **options)

    def generating(model, *args, **options):
        record("base")
        return generate(model, *args, **options)

    monkeypatch.setattr(Model, "upscale", upscaling)
    monkeypatch.setattr(Model, "generate", generating)
    return seen, stop


def test_resumes_after_the_last_finished_stage(exported, tmp_path, calls):
    seen, stop = calls
    out, arguments = tmp_path / "out", ["--stages", *exported.values(), "-n", "4"]
    stop.append(3)
    assert run_cascade(arguments, out) == 130
    assert run_cascade(arguments, out) == 0
    assert seen == ["base", 8, 16, 16]
    whole = outputs(out)
    del seen[:]
    assert run_cascade(arguments, out) == 0  # complete, although the images of the stages are deleted
    assert seen == []
    assert run_cascade(arguments, tmp_path / "again") == 0
    np.testing.assert_array_equal(whole, outputs(tmp_path / "again"))


def test_images_of_different_runs_are_not_mixed(exported, tmp_path, calls):
    """A stopped run, another stopped run into the same folder, and the first one again."""
    seen, stop = calls
    out, arguments = tmp_path / "out", ["--stages", *exported.values(), "-n", "12", "--keep"]
    stop.append(5)  # in the last stage
    assert run_cascade(arguments, out) == 130
    del seen[:]
    stop.append(2)  # in the base, with eight of its images written
    assert run_cascade([*arguments, "--seed=1"], out) == 130
    assert run_cascade(arguments, out) == 0
    assert run_cascade(arguments, tmp_path / "separate") == 0
    np.testing.assert_array_equal(outputs(out), outputs(tmp_path / "separate"))


def test_smaller_run_removes_the_images_of_a_larger_one(exported, tmp_path):
    out = tmp_path / "out"
    assert run_cascade(["--stages", exported["base"], "-n", "5"], out) == 0
    (out / "00009.png").write_bytes(b"mine")
    assert run_cascade(["--stages", exported["base"], "-n", "2", "--seed=1"], out) == 0
    assert sorted(path.name for path in out.glob("0*.png")) == ["00000.png", "00001.png", "00009.png"]


def test_only_generated_images_are_removed(exported, tmp_path):
    """The folder of a stage's images may contain other files."""
    out = tmp_path / "out"
    mine = out / "stages" / "base" / "notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert run_cascade(["--stages", *exported.values(), "-n", "2"], out) == 0
    assert [path.name for path in mine.parent.iterdir()] == ["notes.txt"]
    assert not (out / "stages" / "middle").exists()


def test_starts_from_given_low_res_images(exported, tmp_path):
    folder, out = tiny.images(tmp_path / "in", count=3, side=8), tmp_path / "out"
    assert run_cascade(["--stages", exported["middle"], exported["last"], "--low-res", str(folder)], out) == 0
    assert outputs(out).shape == (3, 32, 32, 3)
    assert read_rgb(out / "stages.png").shape[1] > 3 * 128
    inside = folder / "out"  # its outputs are not taken for low-res images
    for _ in range(2):
        assert run_cascade(["--stages", exported["middle"], "--low-res", str(folder)], inside) == 0
    assert len(outputs(inside)) == 3


def test_weights_of_a_stage_are_freed_before_the_next_is_loaded(exported, tmp_path, monkeypatch):
    sizes, load = [], cascade.load

    def spied(path):
        gc.collect()
        sizes.append(sum(array.nbytes for array in jax.live_arrays()))
        return load(path)

    monkeypatch.setattr(cascade, "load", spied)
    assert run_cascade(["--stages", *exported.values(), "-n", "1"], tmp_path / "out") == 0
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(stages_model(exported["middle"]).params))
    assert len(sizes) == 6 and max(sizes) - min(sizes) < weights / 2


def test_sr3_generate_uses_a_base_stage(exported, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["generate", f"--model={exported['base']}", "-n", "5", "-o", str(out), "--labels=none"]) == 0
    assert outputs(out).shape == (5, 8, 8, 3)
    assert main(["generate", f"--model={exported['last']}", "-o", str(out)]) == 2
    assert "stage last (16x16 to 32x32)" in capsys.readouterr().err


INVALID = {  # case: (stages, options, texts that the error must have)
    "order": (["last", "middle"], [], ["stage last", "low-res images"]),
    "base_late": (["base", "base", "middle"], [], ["stage base_2 (base, 8x8)", "first"]),
    "gap": (["base", "last"], [], ["stage last (16x16 to 32x32)", "base (base, 8x8)"]),
    "swapped": (["base", "last", "middle"], [], ["stage last (16x16 to 32x32)", "base (base, 8x8)"]),
    "base_given": (["base"], ["--low-res", "NUM_IMAGES"], ["stage base (base, 8x8)", "--low-res"]),
    "size_given": (["last"], ["--low-res", "NUM_IMAGES"], ["16x16", "--low-res", "8x8"]),
    "too_many": (["middle"], ["--low-res", "NUM_IMAGES", "-n", "9"], ["--count=9", "3 images"]),
    "steps": (["base", "middle"], ["--steps=2,2,2"], ["--steps=2,2,2", "3 values", "2 stages"]),
    "guidance": (["middle"], ["--low-res", "NUM_IMAGES", "--guidance=2"], ["--guidance=2"]),
    "augment": (["base", "middle"], ["--augment=0.5"], ["--augment=0.5"]),
    "strength": (["base", "middle", "last"], ["--augment=1.5"], ["augment", "1.5"]),
    "late_solver": (["base", "middle", "last"], ["--solver=ddim,ddim,typo"], ["solver", "'typo'"]),
    "late_strength": (["base", "middle", "last"], ["--augment=-,-,1.5"], ["augment", "1.5"]),
    "late_guidance": (["base", "middle"], ["--guidance=-,2"], ["guidance=2", "config.data.label_dropout"]),
    "damaged_cascade": (["CASCADE"], [], ["cascade.json"]),
    "label": (["base"], ["--labels=3"], ["--labels", "'3'"]),
    "unlabeled": (["middle"], ["--low-res", "NUM_IMAGES", "--labels=0"], ["--labels=0"]),
    "missing": (["nowhere"], [], ["'nowhere'", "shipped"]),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_options_fail_with_one_sentence(case, exported, tmp_path, capsys, monkeypatch):
    names, options, texts = INVALID[case]
    folder = str(tiny.images(tmp_path / "in", count=3, side=8))
    options = [folder if option == "NUM_IMAGES" else option for option in options]
    (tmp_path / "cascade.json").write_text('{"stages": [{"name": "base"}]}')
    names = [str(tmp_path) if name == "CASCADE" else name for name in names]
    monkeypatch.setattr(
        Model, "generate", lambda *args, **options: pytest.fail("generated before all was checked")
    )
    paths = [exported.get(name, name) for name in names]
    assert run_cascade(["--stages", *paths, *options], tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert [text for text in texts if text not in error] == []
    assert error.count("\n") == 1 and "Traceback" not in error


def test_stages_must_have_the_same_number_of_classes(exported):
    base, middle, last = stages.find_stages(list(exported.values()))
    wrong = [
        dataclasses.replace(base, classes=0),
        dataclasses.replace(middle, classes=10),
        dataclasses.replace(last, classes=5),
    ]
    with pytest.raises(UserError, match=r"last .* 5 .*middle .* 10"):
        stages.check_chain(wrong)


def test_base_stage_size_defaults_to_its_crops():
    config = complete(tiny.config(**BASE))
    config["stage"]["size"] = 0
    assert stages.stage_from_config(config, "path", name="base", taken=set()).spec.size == 8


def test_cascade_is_trained_and_sampled_by_command(tmp_path, capsys):
    folder = tiny.images(tmp_path / "images", side=32)
    for name, sections in (("one", UNLABELED), ("two", MIDDLE)):
        values = tiny.config(folder, **sections)
        (tmp_path / f"{name}.py").write_text(f"def get_config():\n    return {values!r}\n")
    config, workdir = tmp_path / "cascade.py", tmp_path / "work"
    config.write_text("def get_config():\n    return {'stages': ('one.py', 'two.py')}\n")
    train = ["train", f"--config={config}", f"--workdir={workdir}"]
    assert main([*train, "--config.train.num_steps=2"]) == 0
    assert [(workdir / name / "checkpoints" / "2").is_dir() for name in ("base", "middle")] == [True, True]
    assert main([*train, "--config.train.num_steps=2"]) == 0  # already complete
    assert run_cascade(["--stages", str(workdir), "-n", "2"], tmp_path / "out") == 0
    assert outputs(tmp_path / "out").shape == (2, 16, 16, 3)

    # A stage whose training was stopped, then one whose training was never started.
    config_file = workdir / "middle" / CONFIG_FILE
    longer = json.loads(config_file.read_text())
    longer["train"]["num_steps"] = 9
    config_file.write_text(json.dumps(longer))
    capsys.readouterr()
    assert run_cascade(["--stages", str(workdir)], tmp_path / "half") == 2
    error = capsys.readouterr().err
    assert "step 2 of 9" in error and "--unfinished" in error
    assert run_cascade(["--stages", str(workdir), "-n", "1", "--unfinished"], tmp_path / "half") == 0
    (workdir / "cascade.json").write_text('{"stages": ["base", "lost"]}')
    capsys.readouterr()
    assert run_cascade(["--stages", str(workdir)], tmp_path / "lost") == 2
    assert "work/lost'" in capsys.readouterr().err


def test_mismatched_stages_fail_before_training(tmp_path, capsys):
    folder = tiny.images(tmp_path / "images", side=32)
    for name, sections in (("one", UNLABELED), ("two", LAST)):
        (tmp_path / f"{name}.py").write_text(
            f"def get_config():\n    return {tiny.config(folder, **sections)!r}\n"
        )
    (tmp_path / "cascade.py").write_text("def get_config():\n    return {'stages': ('one.py', 'two.py')}\n")
    assert main(["train", f"--config={tmp_path / 'cascade.py'}", f"--workdir={tmp_path / 'work'}"]) == 2
    error = capsys.readouterr().err
    assert "16x16" in error and "base (base, 8x8)" in error
    assert not (tmp_path / "work").exists()


def test_duplicate_stage_names_fail_before_training(tmp_path, capsys):
    folder = tiny.images(tmp_path / "images", side=32)
    (tmp_path / "one.py").write_text(f"def get_config():\n    return {tiny.config(folder, **MIDDLE)!r}\n")
    (tmp_path / "cascade.py").write_text("def get_config():\n    return {'stages': ('one.py', 'one.py')}\n")
    command = ["train", f"--config={tmp_path / 'cascade.py'}", f"--workdir={tmp_path / 'work'}"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "config.stage.name" in error and "'middle'" in error
    assert not (tmp_path / "work").exists()
