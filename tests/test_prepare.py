"""`sr3 prepare`: makes a TFDS data set from a folder, names every unusable file, writes atomically."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sr3_jax.cli.main import main
from sr3_jax.data import store
from sr3_jax.data.sources import open_source
from sr3_jax.image_io.image_file import read_rgb
from tests import tiny


@pytest.fixture(autouse=True)
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("SR3_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "data"


def pixels(seed, size=(24, 16)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def save(path, seed=0, *, mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels(seed).convert(mode)
    with path.open("wb") as file:
        image.save(file, options.pop("format", None) or Image.registered_extensions()[path.suffix], **options)
    return path


def records(name, split):
    """The data set as plain TFDS reads it: (file name, encoded bytes, label or None) in order."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(store.data_dir() / name / "1.0.0"))
    source = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    return [(one["file_name"].decode(), one["image"], one.get("label")) for one in source]


def test_round_trip_with_classes_and_a_test_split(tmp_path, capsys):
    folder = tmp_path / "pets"
    files = [
        save(folder / kind / f"{n}.png", n) for n, kind in enumerate(["dog", "cat", "dog", "cat", "eel"])
    ]
    (folder / "README.md").write_text("not an image; classes are found all the same")
    assert main(["prepare", str(folder), "--name", "pets", "--test-count", "2"]) == 1
    out, err = capsys.readouterr()
    assert "tfds:pets:train  3 images, 3 classes" in out and "tfds:pets:test  2 images" in out
    assert f"{folder}/README.md: is not an image" in err
    train, test = records("pets", "train"), records("pets", "test")
    assert len(train) == 3 and len(test) == 2
    assert {name: data for name, data, _ in train + test} == {
        str(file.relative_to(folder)): file.read_bytes() for file in files
    }
    assert [name for name, _, _ in train] == sorted(name for name, _, _ in train)
    kinds = ["cat", "dog", "eel"]
    assert all(kinds[label] == name.split("/")[0] for name, _, label in train + test)
    source = open_source("tfds:pets:train")
    for index, (_, data, label) in enumerate(train):
        item = source[index]
        np.testing.assert_array_equal(item["image"], np.asarray(Image.open(io.BytesIO(data))))
        assert item["label"] == label


def test_plain_tfds_decodes_it(tmp_path):
    import tensorflow_datasets as tfds

    save(tmp_path / "in" / "a.png", 1)
    assert main(["prepare", str(tmp_path / "in"), "--name", "one"]) == 0
    image = tfds.data_source("one", split="train", data_dir=store.data_dir(), download=False)[0]["image"]
    np.testing.assert_array_equal(image, np.asarray(pixels(1)))


@pytest.mark.parametrize(
    "paths",
    [
        ["a.png", "b/1.png", "c/2.png"],
        ["b/1.png", "b/2.png"],
        ["b/1.png", "c/d/2.png"],
        ["b/x/1.png", "c/x/2.png"],
    ],
)
def test_classes_require_every_image_to_be_one_folder_deep_in_several_folders(tmp_path, paths):
    for path in paths:
        save(tmp_path / "in" / path)
    assert main(["prepare", str(tmp_path / "in"), "--name", "some"]) == 0
    assert "label" not in open_source("tfds:some:train")[0]
    assert len(open_source("tfds:some:train")) == len(paths)


def test_plain_files_are_stored_unchanged_and_others_as_png(tmp_path):
    folder = tmp_path / "in"
    turned = Image.Exif()
    turned[274] = 6
    upside_down = Image.Exif()
    upside_down[274] = 3
    upright = Image.Exif()
    upright[274] = 1
    plain = [
        save(folder / "rgb.png"),
        save(folder / "rgb.jpg"),
        save(folder / "upright.jpg", exif=upright),
        save(folder / "wrong_suffix.jpg", format="PNG"),
    ]
    changed = [
        save(folder / "gray.jpg", mode="L"),
        save(folder / "gray.png", mode="L"),
        save(folder / "palette.png", mode="P"),
        save(folder / "alpha.png", mode="RGBA"),
        save(folder / "cmyk.jpg", mode="CMYK"),
        save(folder / "turned.jpg", exif=turned),
        save(folder / "turned.png", exif=turned),
        save(folder / "upside_down.jpg", exif=upside_down),
        save(folder / "a.webp"),
        save(folder / "a.tif"),
        save(folder / "a.gif", mode="P"),
        save(folder / "keyed.png", transparency=(1, 2, 3)),
        save(folder / "bit.png", mode="1"),
    ]
    assert main(["prepare", str(folder), "--name", "kinds"]) == 0
    stored = {name: data for name, data, _ in records("kinds", "train")}
    for file in plain:
        assert stored[file.name] == file.read_bytes()
    for file in changed:
        again = Image.open(io.BytesIO(stored[file.name]))
        assert stored[file.name] != file.read_bytes() and (again.format, again.mode) == ("PNG", "RGB"), file
        np.testing.assert_array_equal(np.asarray(again), read_rgb(file))
    assert np.asarray(Image.open(io.BytesIO(stored["turned.jpg"]))).shape == (24, 16, 3)


def test_unusable_files_are_listed_with_the_reason_and_the_others_stored(tmp_path, capsys):
    folder = tmp_path / "in"
    save(folder / "good.png")
    bad_name = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png"))
    save(bad_name, 1)
    whole = save(tmp_path / "whole.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("words")
    (folder / "gone.png").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.png")  # opening it would block
    assert main(["prepare", str(folder), "--name", "mixed"]) == 1
    out, err = capsys.readouterr()
    assert "tfds:mixed:train  2 images\n" in out
    listed = [line for line in err.splitlines() if line.startswith("  ")]
    assert [line.split(": ")[0].split("/")[-1] for line in listed] == [
        "cut.jpg",
        "empty.png",
        "gone.png",
        "pipe.png",
        "text.png",
    ]
    assert "is truncated" in listed[0] and "is empty" in listed[1]
    assert {name for name, _, _ in records("mixed", "train")} == {"good.png", r"caf\xe9.png"}
    assert "Traceback" not in err


def test_files_that_break_decoders_lose_nothing_else(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "in"
    save(folder / "good.png")
    save(folder / "exif.jpg", exif=b"Exif\x00\x00no TIFF header")
    text = PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n 4\nzz not hex", zip=True)
    save(folder / "profile.png", pnginfo=text)
    whole = save(folder / "sparse.png").read_bytes()
    with (folder / "sparse.png").open("wb") as file:
        file.write(whole)
        file.truncate(3 * 2**30)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # all are above Pillow's own limit, none above ours
    code = main(["prepare", str(folder), "--name", "odd"])
    stored = {name: data for name, data, _ in records("odd", "train")}

    assert code in (0, 1) and {"good.png", "exif.jpg", "profile.png"} <= set(stored)
    assert "sparse.png" in capsys.readouterr().err and "sparse.png" not in stored
    for name in ("exif.jpg", "profile.png"):
        np.testing.assert_array_equal(read_rgb(stored[name]), read_rgb(folder / name))


def test_unusable_files_do_not_count_for_the_test_split(tmp_path):
    folder = tmp_path / "in"
    for index in range(12):
        path = save(folder / f"{index}.png", index)
        if index % 2:
            path.write_bytes(path.read_bytes()[:-200])
    assert main(["prepare", str(folder), "--name", "half", "--test-count", "5"]) == 1
    train, test = records("half", "train"), records("half", "test")
    assert (len(train), len(test)) == (1, 5)
    assert {name for name, _, _ in train + test} == {f"{index}.png" for index in range(0, 12, 2)}


def test_the_test_split_depends_only_on_names(tmp_path):
    for index in range(20):
        save(tmp_path / "in" / f"{index}.png", index)
        save(tmp_path / "moved" / f"{index}.png", 99 - index)
    for name in ("in", "moved"):
        assert main(["prepare", str(tmp_path / name), "--name", name, "--test-fraction", "0.2"]) == 0
    tests = [[name for name, _, _ in records(data_set, "test")] for data_set in ("in", "moved")]
    assert tests[0] == tests[1] and len(tests[0]) == 4
    assert set(tests[0]) != {"0.png", "1.png", "10.png", "11.png"}  # not simply the first


def test_folders_of_splits_become_splits(tmp_path, capsys):
    for index, place in enumerate(("train/cat", "train/dog", "val/cat", "test/dog")):
        for number in range(2):
            save(tmp_path / "in" / place / f"{number}.png", 2 * index + number)
    assert main(["prepare", str(tmp_path / "in"), "--name", "mine"]) == 0
    found = {
        split: [(name, label) for name, _, label in records("mine", split)]
        for split in ("train", "validation", "test")
    }
    assert {split: sorted(found[split]) for split in found} == {
        "train": [
            ("train/cat/0.png", 0),
            ("train/cat/1.png", 0),
            ("train/dog/0.png", 1),
            ("train/dog/1.png", 1),
        ],
        "validation": [("val/cat/0.png", 0), ("val/cat/1.png", 0)],
        "test": [("test/dog/0.png", 1), ("test/dog/1.png", 1)],
    }
    arguments = ["prepare", str(tmp_path / "in"), "--name", "other"]
    assert main([*arguments, "--test-count=1"]) == 2
    save(tmp_path / "in" / "more" / "a.png")
    assert main(arguments) == 2
    assert "more/a.png" in capsys.readouterr().err


def test_the_same_images_give_the_same_bytes(tmp_path):
    """In each process: the order of a protobuf's fields depends on it."""
    for index in range(4):
        save(tmp_path / "in" / "ab"[index % 2] / f"{index}.png", index)
    made = []
    for name in ("one", "two", "three"):
        command = ["prepare", str(tmp_path / "in"), "--name", "mine", "--data-dir", str(tmp_path / name)]
        subprocess.run([sys.executable, "-m", "sr3_jax", *command], check=True, capture_output=True)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        made.append({path.relative_to(tmp_path / name): path.read_bytes() for path in files})
    assert made[0] == made[1] == made[2]


def test_user_errors_exit_with_code_2(tmp_path, capsys, data_dir):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "cut.png").write_bytes(save(tmp_path / "whole.png").read_bytes()[:-200])
    for arguments, message in [
        ([str(tmp_path / "nowhere"), "--name", "n"], "is not a folder"),
        ([str(tmp_path / "home"), "--name", "n"], "is not a folder"),
        ([str(folder), "--name", "Bad-Name"], "'Bad-Name'"),
        ([str(folder), "--name", "n"], "too few"),
        ([str(folder), "--name", "n", "--test-count", "1"], "test split of 1"),
        ([str(folder), "--name", "n", "--test-count", "-1"], "--test-count=-1"),
        ([str(folder), "--name", "n", "--test-fraction", "1.5"], "--test-fraction=1.5"),
    ]:
        assert main(["prepare", *arguments]) == 2
        err = capsys.readouterr().err
        assert message in err and "Traceback" not in err
        if "too few" in message:
            assert f"{folder}/cut.png: is truncated" in err
    assert not data_dir.exists() or os.listdir(data_dir) == [".lock"]


def test_an_existing_name_needs_overwrite(tmp_path, capsys, data_dir):
    save(tmp_path / "one" / "a.png", 1)
    save(tmp_path / "two" / "b.png", 2)
    assert main(["prepare", str(tmp_path / "one"), "--name", "mine"]) == 0
    assert main(["prepare", str(tmp_path / "two"), "--name", "mine"]) == 2
    assert "'mine'" in (err := capsys.readouterr().err) and "--overwrite" in err
    assert records("mine", "train")[0][0] == "a.png"
    assert main(["prepare", str(tmp_path / "two"), "--name", "mine", "--overwrite"]) == 0
    assert [name for name, _, _ in records("mine", "train")] == ["b.png"]
    (data_dir / "mine" / "1.0.0").rename(data_dir / "mine" / "2.0.0")
    assert main(["prepare", str(tmp_path / "two"), "--name", "mine", "--overwrite"]) == 2
    assert "was not made by sr3 prepare" in capsys.readouterr().err


def test_data_dir_option(tmp_path, capsys, monkeypatch):
    save(tmp_path / "in" / "a.png", 1)
    elsewhere = tmp_path / "elsewhere"
    assert main(["prepare", str(tmp_path / "in"), "--name", "mine", "--data-dir", str(elsewhere)]) == 0
    assert f"set SR3_DATA_DIR={elsewhere}" in capsys.readouterr().out
    monkeypatch.setenv("SR3_DATA_DIR", str(elsewhere))
    assert len(open_source("tfds:mine:train")) == 1


def test_a_killed_run_leaves_nothing_under_the_name_and_the_next_one_cleans_up(tmp_path, data_dir):
    for index in range(8):
        save(tmp_path / "in" / f"{index}.png", index)
    code = f"""
import os, signal
from sr3_jax.data import prepare
write = prepare._Writer.close
prepare._Writer.close = lambda self: (write(self), os.kill(os.getpid(), signal.SIGKILL))
from sr3_jax.cli.main import main
main(["prepare", {str(tmp_path / "in")!r}, "--name", "mine"])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert run.returncode == -signal.SIGKILL, run.stderr
    [left] = set(os.listdir(data_dir)) - {".lock"}  # it was killed after everything was written
    assert left.startswith(".incomplete-mine-")
    assert store.find("mine") is None
    (data_dir / ".incomplete-mine-early").mkdir()  # of a process that was killed before it had locked it
    assert main(["prepare", str(tmp_path / "in"), "--name", "mine"]) == 0
    assert set(os.listdir(data_dir)) == {"mine", ".lock"}
    assert len(open_source("tfds:mine:train")) == 8


def test_kill_between_the_renames_of_overwrite_loses_no_data_set(tmp_path, data_dir):
    left = data_dir / ".incomplete-mine-1"
    for folder in (left / "mine" / "1.0.0", left / "replaced", data_dir / "mine"):
        folder.mkdir(parents=True)
    (left / "mine" / "1.0.0" / "features.json").write_text("{}")
    with pytest.raises(RuntimeError), store.atomic_data_set(data_dir, "mine", "1.0.0", overwrite=True):
        raise RuntimeError
    assert (data_dir / "mine" / "1.0.0" / "features.json").exists() and not left.exists()


def test_full_disk_fails_with_one_sentence_and_leaves_nothing(tmp_path, data_dir, capsys):
    save(tmp_path / "in" / "a.png", 1)
    with tiny.small_disk(50):
        assert main(["prepare", str(tmp_path / "in"), "--name", "mine"]) == 2
    assert f"the data dir {data_dir} is full" in capsys.readouterr().err.splitlines()[-1]
    assert os.listdir(data_dir) == [".lock"]
    assert main(["prepare", str(tmp_path / "in"), "--name", "mine"]) == 0
