"""Cascades end to end with tiny stages: what is refused, what is drawn, and where a stopped one goes on."""

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
UNLABELLED = BASE | {"model": {"low_res": False}, "data": {"scale": 1, "shrink": 2}}
MIDDLE = {"data": {"scale": 2}, "stage": {"name": "middle", "size": 16}}
LAST = {
    "model": {"augment": True},
    "data": {"scale": 2, "crop": 32, "augment": "noise"},
    "stage": {"name": "last", "size": 32},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, str]:
    """A file for each stage."""
    folder = tmp_path_factory.mktemp("stages")
    files = {}
    for seed, sections in enumerate((BASE, MIDDLE, LAST)):
        read = experiment.read(tiny.config(**sections))
        params = tiny.perturbed(jax.device_get(read.init_params(jax.random.key(0))), seed=seed, size=0.3)
        name = sections["stage"]["name"]
        files[name] = str(folder / f"{name}.safetensors")
        export(Path(files[name]), params, read.config)
    return files


def draw(arguments: list[str], out: Path) -> int:
    return main(["cascade", *arguments, "-o", str(out), "--batch-size=8"])


def drawn(out: Path) -> np.ndarray:
    return np.stack([read_rgb(path) for path in sorted(out.glob("0*.png"))])


def test_three_stages_make_labelled_images_and_a_page(exported, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        draw(["--stages", *exported.values(), "-n", "6", "--labels=2,0", "--keep", "--guidance=2"], out) == 0
    )
    assert drawn(out).shape == (6, 32, 32, 3)
    assert [len(list((out / "stages" / name).glob("*.png"))) for name in ("base", "middle")] == [6, 6]
    manifest = json.loads((out / "images.json").read_text())
    assert [entry["label"] for entry in manifest["images"]] == [2, 0] * 3
    assert [stage["name"] for stage in manifest["stages"]] == ["base", "middle", "last"]
    assert [stage["sampling"]["guidance"] for stage in manifest["stages"]] == [2.0, 1.0, 1.0]
    assert read_rgb(out / "grid.png").shape[0] > 2 * 64 and (out / "stages.png").is_file()
    assert "6 images, grid.png, stages.png and images.json in" in capsys.readouterr().out


def test_a_stage_is_the_models_own_upscale_of_the_image_before(exported, tmp_path):
    """What the last stage gives is what `sr3 upscale` of its model would, by the same key."""
    out = tmp_path / "out"
    assert draw(["--stages", *exported.values(), "-n", "4", "--keep"], out) == 0
    before = np.stack([read_rgb(path) for path in sorted((out / "stages" / "middle").glob("*.png"))])
    expected = stages_model(exported["last"]).upscale(before, cascade._keys(0, 2, range(4)))
    np.testing.assert_array_equal(drawn(out), expected)


def stages_model(path: str) -> Model:
    from sr3_jax.inference.model import load

    return load(path)


def test_a_image_follows_from_seed_index_and_label_alone(exported, tmp_path):
    few, many, other = (tmp_path / name for name in ("few", "many", "other"))
    assert draw(["--stages", *exported.values(), "-n", "2"], few) == 0
    assert draw(["--stages", *exported.values(), "-n", "7"], many) == 0
    assert draw(["--stages", *exported.values(), "-n", "2", "--seed=1"], other) == 0
    np.testing.assert_array_equal(drawn(many)[:2], drawn(few))
    assert (drawn(other) != drawn(few)).any(axis=(1, 2, 3)).all()


@pytest.fixture
def calls(monkeypatch):
    """What the stages are asked to draw: 'base', or a low-res image's side; `stop` ends the run before a call."""
    seen, stop = [], []
    upscale, generate = Model.upscale, Model.generate

    def told(what):
        seen.append(what)
        if stop and len(seen) == stop[0]:
            stop.clear()
            raise KeyboardInterrupt

    def upscaling(model, images, *args, **options):
        told(images.shape[1])
        return upscale(model, images, *args, **options)

    def generating(model, *args, **options):
        told("base")
        return generate(model, *args, **options)

    monkeypatch.setattr(Model, "upscale", upscaling)
    monkeypatch.setattr(Model, "generate", generating)
    return seen, stop


def test_it_goes_on_after_the_last_finished_stage(exported, tmp_path, calls):
    seen, stop = calls
    out, arguments = tmp_path / "out", ["--stages", *exported.values(), "-n", "4"]
    stop.append(3)
    assert draw(arguments, out) == 130
    assert draw(arguments, out) == 0
    assert seen == ["base", 8, 16, 16]
    whole = drawn(out)
    del seen[:]
    assert draw(arguments, out) == 0  # all is there, though the stages' own images are gone
    assert seen == []
    assert draw(arguments, tmp_path / "again") == 0
    np.testing.assert_array_equal(whole, drawn(tmp_path / "again"))


def test_images_of_two_runs_are_never_mixed(exported, tmp_path, calls):
    """A run that was stopped, another into the same folder, stopped too, and the first again."""
    seen, stop = calls
    out, arguments = tmp_path / "out", ["--stages", *exported.values(), "-n", "12", "--keep"]
    stop.append(5)  # in the last stage
    assert draw(arguments, out) == 130
    del seen[:]
    stop.append(2)  # in the base, with eight of its images written
    assert draw([*arguments, "--seed=1"], out) == 130
    assert draw(arguments, out) == 0
    assert draw(arguments, tmp_path / "alone") == 0
    np.testing.assert_array_equal(drawn(out), drawn(tmp_path / "alone"))


def test_fewer_images_leave_none_of_more(exported, tmp_path):
    out = tmp_path / "out"
    assert draw(["--stages", exported["base"], "-n", "5"], out) == 0
    (out / "00009.png").write_bytes(b"mine")
    assert draw(["--stages", exported["base"], "-n", "2", "--seed=1"], out) == 0
    assert sorted(path.name for path in out.glob("0*.png")) == ["00000.png", "00001.png", "00009.png"]


def test_nothing_but_its_own_images_is_removed(exported, tmp_path):
    """The stages may lie where it keeps their images."""
    out = tmp_path / "out"
    mine = out / "stages" / "base" / "notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert draw(["--stages", *exported.values(), "-n", "2"], out) == 0
    assert [path.name for path in mine.parent.iterdir()] == ["notes.txt"]
    assert not (out / "stages" / "middle").exists()


def test_it_starts_from_given_images(exported, tmp_path):
    folder, out = tiny.images(tmp_path / "in", count=3, side=8), tmp_path / "out"
    assert draw(["--stages", exported["middle"], exported["last"], "--low-res", str(folder)], out) == 0
    assert drawn(out).shape == (3, 32, 32, 3)
    assert read_rgb(out / "stages.png").shape[1] > 3 * 128
    inside = folder / "out"  # its own results are not taken for low-res images the next time
    for _ in range(2):
        assert draw(["--stages", exported["middle"], "--low-res", str(folder)], inside) == 0
    assert len(drawn(inside)) == 3


def test_the_weights_of_a_stage_are_freed_before_the_next_is_read(exported, tmp_path, monkeypatch):
    held, load = [], cascade.load

    def spied(path):
        gc.collect()
        held.append(sum(array.nbytes for array in jax.live_arrays()))
        return load(path)

    monkeypatch.setattr(cascade, "load", spied)
    assert draw(["--stages", *exported.values(), "-n", "1"], tmp_path / "out") == 0
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(stages_model(exported["middle"]).params))
    assert len(held) == 6 and max(held) - min(held) < weights / 2


def test_sr3_generate_draws_by_a_base_stage(exported, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["generate", f"--model={exported['base']}", "-n", "5", "-o", str(out), "--labels=none"]) == 0
    assert drawn(out).shape == (5, 8, 8, 3)
    assert main(["generate", f"--model={exported['last']}", "-o", str(out)]) == 2
    assert "stage last (16x16 to 32x32) needs low-res images" in capsys.readouterr().err


REFUSED = {
    "order": (["last", "middle"], [], "begin with a base stage, or give --low-res"),
    "base_late": (
        ["base", "base", "middle"],
        [],
        "stage base_2 (base, 8x8) makes images of noise: it must come first",
    ),
    "gap": (
        ["base", "last"],
        [],
        "stage last (16x16 to 32x32) takes images of 16x16, but base (base, 8x8) gives 8x8",
    ),
    "swapped": (["base", "last", "middle"], [], "takes images of 16x16, but base (base, 8x8) gives 8x8"),
    "base_given": (
        ["base"],
        ["--low-res", "NUM_IMAGES"],
        "makes images of noise: leave it out with --low-res",
    ),
    "size_given": (["last"], ["--low-res", "NUM_IMAGES"], "takes images of 16x16, but --low-res gives 8x8"),
    "too_many": (["middle"], ["--low-res", "NUM_IMAGES", "-n", "9"], "--count=9 is more than the 3 images"),
    "steps": (["base", "middle"], ["--steps=2,2,2"], "--steps=2,2,2 has 3 values for 2 stages"),
    "guidance": (
        ["middle"],
        ["--low-res", "NUM_IMAGES", "--guidance=2"],
        "--guidance=2 is of use to none of the stages",
    ),
    "augment": (["base", "middle"], ["--augment=0.5"], "--augment=0.5 is of use to none of the stages"),
    "strength": (["base", "middle", "last"], ["--augment=1.5"], "augment must be from 0 to 1, got 1.5"),
    "late_solver": (["base", "middle", "last"], ["--solver=ddim,ddim,typo"], "solver must be one of"),
    "late_strength": (
        ["base", "middle", "last"],
        ["--augment=-,-,1.5"],
        "augment must be from 0 to 1, got 1.5",
    ),
    "late_guidance": (
        ["base", "middle"],
        ["--guidance=-,2"],
        "guidance=2 needs config.data.label_dropout in training",
    ),
    "damaged_plan": (["PLAN"], [], "does not name the stages of a cascade"),
    "label": (["base"], ["--labels=3"], "--labels must be a whole number, 0 to 2, got '3'"),
    "unlabelled": (
        ["middle"],
        ["--low-res", "NUM_IMAGES", "--labels=0"],
        "none of the stages was trained with labels",
    ),
    "missing": (
        ["nowhere"],
        [],
        "no model 'nowhere': give a workdir, a .safetensors file, or a shipped name",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_in_a_sentence(case, exported, tmp_path, capsys, monkeypatch):
    names, options, sentence = REFUSED[case]
    folder = str(tiny.images(tmp_path / "in", count=3, side=8))
    options = [folder if option == "NUM_IMAGES" else option for option in options]
    (tmp_path / "cascade.json").write_text('{"stages": [{"name": "base"}]}')
    names = [str(tmp_path) if name == "PLAN" else name for name in names]
    monkeypatch.setattr(
        Model, "generate", lambda *args, **options: pytest.fail("drawn before all was checked")
    )
    paths = [exported.get(name, name) for name in names]
    assert draw(["--stages", *paths, *options], tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and "Traceback" not in error


def test_all_stages_with_labels_must_have_the_same(exported):
    base, middle, last = stages.find_stages(list(exported.values()))
    wrong = [
        dataclasses.replace(base, classes=0),
        dataclasses.replace(middle, classes=10),
        dataclasses.replace(last, classes=5),
    ]
    with pytest.raises(UserError, match=r"stage last .* has 5 classes, but middle .* 10"):
        stages.check_chain(wrong)


def test_a_base_without_a_size_has_that_of_its_crops():
    config = complete(tiny.config(**BASE))
    config["stage"]["size"] = 0
    assert stages.stage_from_config(config, "path", name="base", taken=set()).stage.size == 8


def test_a_cascade_is_trained_in_order_by_one_command_and_drawn_by_another(tmp_path, capsys):
    folder = tiny.images(tmp_path / "images", side=32)
    for name, sections in (("one", UNLABELLED), ("two", MIDDLE)):
        values = tiny.config(folder, **sections)
        (tmp_path / f"{name}.py").write_text(f"def get_config():\n    return {values!r}\n")
    config, workdir = tmp_path / "cascade.py", tmp_path / "work"
    config.write_text("def get_config():\n    return {'stages': ('one.py', 'two.py')}\n")
    train = ["train", f"--config={config}", f"--workdir={workdir}"]
    assert main([*train, "--config.train.num_steps=2"]) == 0
    assert [(workdir / name / "checkpoints" / "2").is_dir() for name in ("base", "middle")] == [True, True]
    assert main([*train, "--config.train.num_steps=2"]) == 0  # all done already
    assert draw(["--stages", str(workdir), "-n", "2"], tmp_path / "out") == 0
    assert drawn(tmp_path / "out").shape == (2, 16, 16, 3)

    # A stage that was stopped half-way, then one that was never begun.
    config_file = workdir / "middle" / CONFIG_FILE
    longer = json.loads(config_file.read_text())
    longer["train"]["num_steps"] = 9
    config_file.write_text(json.dumps(longer))
    capsys.readouterr()
    assert draw(["--stages", str(workdir)], tmp_path / "half") == 2
    assert "is at step 2 of 9: finish its training, or allow it with --unfinished" in capsys.readouterr().err
    assert draw(["--stages", str(workdir), "-n", "1", "--unfinished"], tmp_path / "half") == 0
    (workdir / "cascade.json").write_text('{"stages": ["base", "lost"]}')
    capsys.readouterr()
    assert draw(["--stages", str(workdir)], tmp_path / "lost") == 2
    assert "work/lost': give a workdir" in capsys.readouterr().err


def test_stages_that_do_not_chain_are_refused_before_training(tmp_path, capsys):
    folder = tiny.images(tmp_path / "images", side=32)
    for name, sections in (("one", UNLABELLED), ("two", LAST)):
        (tmp_path / f"{name}.py").write_text(
            f"def get_config():\n    return {tiny.config(folder, **sections)!r}\n"
        )
    (tmp_path / "cascade.py").write_text("def get_config():\n    return {'stages': ('one.py', 'two.py')}\n")
    assert main(["train", f"--config={tmp_path / 'cascade.py'}", f"--workdir={tmp_path / 'work'}"]) == 2
    assert "takes images of 16x16, but base (base, 8x8) gives 8x8" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_stages_of_one_name_are_refused_before_training(tmp_path, capsys):
    folder = tiny.images(tmp_path / "images", side=32)
    (tmp_path / "one.py").write_text(f"def get_config():\n    return {tiny.config(folder, **MIDDLE)!r}\n")
    (tmp_path / "cascade.py").write_text("def get_config():\n    return {'stages': ('one.py', 'one.py')}\n")
    command = ["train", f"--config={tmp_path / 'cascade.py'}", f"--workdir={tmp_path / 'work'}"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "config.stage.name" in error and "'middle'" in error
    assert not (tmp_path / "work").exists()
