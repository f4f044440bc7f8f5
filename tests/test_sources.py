"""Data sources by name: each kind opens and reads the stored pixels, and user errors name the fix."""

import errno
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from sr3_jax.data import photos, sources, store
from sr3_jax.data.sources import ImageTooSmallError, Source, open_source, squares
from sr3_jax.errors import UserError
from sr3_jax.image_io.image_file import ImageError

PHOTOS = Path(photos.__file__).parent


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("SR3_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "data"


@pytest.fixture
def logged(monkeypatch):
    """Log messages. (caplog gets them twice once a command has set up logging.)"""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    monkeypatch.setattr(logging.getLogger("sr3_jax"), "handlers", [handler])
    monkeypatch.setattr(logging.getLogger("sr3_jax"), "level", logging.INFO)
    return messages


def image(path, size=(40, 30), seed=0, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, "PNG")
    return np.asarray(Image.open(path).convert("RGB"))


def write_tfds(data_dir, name, features, examples, *, version="1.0.0"):
    """A TFDS data set written by TFDS itself; returns its folder."""
    import tensorflow_datasets as tfds

    folder = data_dir / name / version
    folder.mkdir(parents=True)
    identity = tfds.core.DatasetIdentity(
        name=name.split("/")[0], version=tfds.core.Version(version), data_dir=str(folder), module_name="tests"
    )
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
    writer = tfds.core.SequentialWriter(info, 100, file_format="array_record")
    writer.initialize_splits(["train"])
    writer.add_examples({"train": examples})
    writer.close_all()
    return folder


# -- the default photographs


def test_photos_are_prepared_on_first_use_and_read_with_their_pixels(data_dir):
    for split, count in (("train", 32), ("test", 8)):
        source = open_source(f"photos:{split}")
        files = sorted((PHOTOS / split).glob("*.jpg"))
        assert len(source) == len(files) == count
        assert source.name == f"photos:{split}"
        for index in (0, count // 2, count - 1):
            item = source[index]
            assert set(item) == {"image"}
            np.testing.assert_array_equal(item["image"], np.asarray(Image.open(files[index])))
    assert sorted(os.listdir(data_dir)) == [".lock", "sr3_photos"]  # nothing temporary is left


def test_photographs_hold_the_largest_crop_of_the_default_data():
    for path in PHOTOS.glob("t*/*.jpg"):
        assert min(Image.open(path).size) >= 352, path


def test_every_photograph_is_attributed():
    text = (PHOTOS / "ATTRIBUTION.md").read_text(encoding="utf-8")
    files = list(PHOTOS.glob("t*/*.jpg"))
    assert len(files) == 40
    assert all(f"| {path.parent.name}/{path.name} |" in text for path in files)


def test_several_processes_prepare_at_once(data_dir):
    code = "from sr3_jax.data.sources import open_source as o; print(o('photos:train')[31]['image'].sum())"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    results = [run.communicate(timeout=120) for run in runs]
    expected = np.asarray(Image.open(sorted((PHOTOS / "train").glob("*.jpg"))[31])).sum()
    assert [out for out, _ in results] == [f"{expected}\n"] * 3, results
    assert [err for _, err in results] == [""] * 3  # TFDS prints nothing
    assert sorted(os.listdir(data_dir)) == [".lock", "sr3_photos"]
    assert os.listdir(data_dir / "sr3_photos") == ["1.0.0"]


def test_a_data_set_that_another_process_wrote_first_stays(tmp_path):
    def make(work, text):
        (work / "cats" / "1.0.0").mkdir(parents=True)
        (work / "cats" / "1.0.0" / "who").write_text(text)

    with store.atomic_data_set(tmp_path, "cats", "1.0.0") as slow:
        make(slow, "slow")
        with store.atomic_data_set(tmp_path, "cats", "1.0.0") as fast:
            make(fast, "fast")
        assert slow.exists()  # work in progress is not a leftover
    assert (tmp_path / "cats" / "1.0.0" / "who").read_text() == "fast"
    with store.atomic_data_set(tmp_path, "cats", "1.0.0", overwrite=True) as third:
        make(third, "third")
    assert (tmp_path / "cats" / "1.0.0" / "who").read_text() == "third"
    assert sorted(os.listdir(tmp_path)) == [".lock", "cats"]


def test_an_error_while_preparing_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), store.atomic_data_set(tmp_path, "cats", "1.0.0") as work:
        (work / "cats" / "1.0.0").mkdir(parents=True)
        raise RuntimeError
    assert os.listdir(tmp_path) == [".lock"]


def test_a_read_only_data_dir_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SR3_DATA_DIR", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"/file .*SR3_DATA_DIR"):
        open_source("photos:train")


# -- TFDS data sets


def test_tfds_image_and_label(data_dir, tmp_path):
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(names=["cat", "dog"]),
        # Unused features must not be decoded: these bytes are not an image.
        "mask": tfds.features.Image(shape=(None, None, 1)),
        "objects": tfds.features.Sequence({"bbox": tfds.features.BBoxFeature()}),
    }
    pixels = [image(tmp_path / f"{index}.png", seed=index) for index in range(3)]
    box = tfds.features.BBox(0.0, 0.0, 1.0, 1.0)
    examples = [
        {
            "image": (tmp_path / f"{index}.png").read_bytes(),
            "label": index % 2,
            "mask": b"no image",
            "objects": [{"bbox": box}] * index,
        }
        for index in range(3)
    ]
    write_tfds(data_dir, "pets", features, examples)
    source = open_source("tfds:pets:train")
    assert len(source) == 3
    for index in range(3):
        item = source[index]
        np.testing.assert_array_equal(item["image"], pixels[index])
        assert item["label"] == index % 2 and type(item["label"]) is int
    assert len(open_source("tfds:pets:train[:2]")) == 2
    assert len(open_source("tfds:pets:1.0.0:train")) == 3


def test_tfds_gray_and_raw_arrays_become_three_channels(data_dir, tmp_path):
    import tensorflow_datasets as tfds

    gray = image(tmp_path / "gray.png", mode="L")
    write_tfds(
        data_dir,
        "gray",
        {"image": tfds.features.Image(shape=(None, None, 1)), "label": tfds.features.Text()},
        [{"image": (tmp_path / "gray.png").read_bytes(), "label": "a word"}],
    )
    item = open_source("tfds:gray:train")[0]
    assert set(item) == {"image"}  # labels must be integers
    np.testing.assert_array_equal(item["image"], gray)
    for name, channels in (("raw1", 1), ("raw3", 3), ("raw4", 4)):
        array = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
        feature = tfds.features.Tensor(shape=(5, 7, channels), dtype=np.uint8)
        write_tfds(data_dir, name, {"image": feature}, [{"image": array}])
        found = open_source(f"tfds:{name}:train")[0]["image"]
        assert found.shape == (5, 7, 3) and found.dtype == np.uint8
        np.testing.assert_array_equal(found, np.repeat(array, 3, -1) if channels == 1 else array[..., :3])


def test_the_newest_version_is_read(data_dir):
    import tensorflow_datasets as tfds

    feature = tfds.features.Tensor(shape=(1, 1, 3), dtype=np.uint8)
    for version, value in (("9.0.0", 9), ("10.0.0", 10)):
        example = {"image": np.full((1, 1, 3), value, np.uint8)}
        write_tfds(data_dir, "two", {"image": feature}, [example], version=version)
    assert open_source("tfds:two:train")[0]["image"].max() == 10
    assert open_source("tfds:two:9.0.0:train")[0]["image"].max() == 9
    with pytest.raises(UserError, match=r"'two'.*10\.0\.0.*3\.0\.0"):
        open_source("tfds:two:3.0.0:train")


def test_features_that_are_not_of_tfds_are_refused_and_not_imported(data_dir, tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    array = {"image": np.zeros((4, 4, 3), np.uint8)}
    feature = tfds.features.Tensor(shape=(4, 4, 3), dtype=np.uint8)
    folder = write_tfds(data_dir, "evil", {"image": feature}, [array])
    (tmp_path / "bait_module.py").write_text(f"open({str(tmp_path / 'bait')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    text = (folder / "features.json").read_text()
    name = "tensorflow_datasets.core.features.tensor_feature.Tensor"
    for content in (text.replace(name, "bait_module.Tensor"), "[" * 100_000, "{"):
        assert content != text
        (folder / "features.json").write_text(content)
        with pytest.raises(UserError, match="'tfds:evil:train'"):
            open_source("tfds:evil:train")
    assert not (tmp_path / "bait").exists()


def test_tfds_errors_name_the_fix(data_dir, tmp_path):
    import tensorflow_datasets as tfds

    array = {"image": np.zeros((4, 4, 3), np.uint8)}
    feature = tfds.features.Tensor(shape=(4, 4, 3), dtype=np.uint8)
    write_tfds(data_dir, "plain", {"image": feature}, [array])
    write_tfds(data_dir, "many/small", {"image": feature}, [array])
    write_tfds(data_dir, "many/large", {"image": feature}, [array])
    write_tfds(data_dir, "words", {"text": tfds.features.Text()}, [{"text": "a"}])
    depth = tfds.features.Tensor(shape=(4, 4, 1), dtype=np.float32)
    write_tfds(data_dir, "depth", {"image": depth}, [{"image": np.zeros((4, 4, 1), np.float32)}])
    old = write_tfds(data_dir, "old", {"image": feature}, [array])
    info = json.loads((old / "dataset_info.json").read_text())
    (old / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    for file in old.glob("*array_record*"):
        file.rename(old / file.name.replace("array_record", "tfrecord"))
    assert len(open_source("tfds:many/small:train")) == 1
    for name, message in {
        "tfds:none:train": r"'none'.*data.*`sr3 prepare PATH --name none`",
        "tfds:plain:validation": r"'validation'.*'train'",
        "tfds:plain:train[:0]": r"'train\[:0\]'",
        "tfds:many:train": r"tfds:many/CONFIG:SPLIT.*'large', 'small'",
        "tfds:words:train": r"'image'.*\['text'\]",
        "tfds:depth:train": r"Tensor.*8 bits",
        "tfds:old:train": r"tfrecord.*`tfds build` .*sr3 prepare",
        "tfds:plain": r"tfds:NAME",
        "photos:validation": r"'photos:validation'.*photos:train",
        "images": r"'images'.*folder:PATH",
        "folder:": r"'folder:'.*folder:PATH",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            open_source(name)
        assert "\n" not in str(error.value)


def test_small_images_of_a_tfds_data_set_are_rejected_without_decoding(data_dir, tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    image(tmp_path / "small.png", size=(40, 30))
    image(tmp_path / "large.png", size=(40, 32))
    examples = [{"image": (tmp_path / name).read_bytes()} for name in ("small.png", "large.png")]
    write_tfds(data_dir, "sizes", {"image": tfds.features.Image(shape=(None, None, 3))}, examples)
    source = open_source("tfds:sizes:train", min_side=32)
    with monkeypatch.context() as patch, pytest.raises(ImageTooSmallError) as error:
        patch.setattr(sources, "read_rgb", None)  # nothing is decoded
        source[0]
    assert all(word in str(error.value) for word in ("record 0", "40x30", "32"))
    assert source[1]["image"].shape == (32, 40, 3)


# -- folders


def test_a_folder_is_sorted_and_unusable_files_are_logged(tmp_path, logged):
    pixels = {
        name: image(tmp_path / name, seed=seed) for seed, name in enumerate(["b/2.png", "a.png", "b/1.png"])
    }
    image(tmp_path / ".hidden.png")
    image(tmp_path / ".cache" / "x.png")
    image(tmp_path / "small.png", size=(30, 12))
    (tmp_path / "notes.txt").write_text("words")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "b" / "up").symlink_to(tmp_path)  # a loop
    source = open_source(f"folder:{tmp_path}", min_side=20)
    assert len(source) == 3
    for index, name in enumerate(["a.png", "b/1.png", "b/2.png"]):
        np.testing.assert_array_equal(source[index]["image"], pixels[name])
    listing, small = logged
    assert "3 files of folder:" in listing
    assert all(f"{tmp_path}/{name}: " in listing for name in ("notes.txt", "empty.jpg", "gone.png"))
    assert "1 of 4 images" in small and "20 pixels" in small


def test_a_folder_with_names_that_are_not_utf8(tmp_path, logged):
    good, bad = (Path(os.fsdecode(os.fsencode(tmp_path) + name)) for name in (b"/caf\xe9.png", b"/\xff.png"))
    pixels = image(good)
    bad.write_bytes(b"x")
    source = open_source(f"folder:{tmp_path}")
    np.testing.assert_array_equal(source[0]["image"], pixels)
    assert source.describe(0).endswith(r"caf\xe9.png")
    assert r"\xff.png: " in logged[0]
    logged[0].encode()  # fails on a lone surrogate


def test_a_folder_without_usable_images_is_an_error(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        open_source(f"folder:{tmp_path}/nowhere")
    with pytest.raises(UserError, match="is empty"):
        open_source(f"folder:{tmp_path}")
    image(tmp_path / "small.png", size=(30, 12))
    with pytest.raises(UserError, match=r"\(0 could not be read, 1 are under 13 pixels\)"):
        open_source(f"folder:{tmp_path}", min_side=13)


def test_an_image_that_is_truncated_is_an_error_when_read(tmp_path):
    image(tmp_path / "cut.png", size=(100, 100))
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    source = open_source(f"folder:{tmp_path}")  # the header is good
    with pytest.raises(ImageError, match=r"cut\.png: is truncated"):
        source[0]


# -- all sources


def test_decoded_images_are_cached_up_to_a_limit():
    reads = []

    def load(index):
        reads.append(index)
        return {"image": np.full((512, 512, 3), index, np.uint8)}  # 3/4 MiB

    source = Source("fake", load, 4, cache_mb=2)
    for _ in range(3):
        for index in range(4):
            assert source[index]["image"].max() == index
    assert sorted(reads) == [0, 1, 2, 2, 2, 3, 3, 3]  # two fit and are never evicted


def test_cached_images_are_read_only():
    source = Source("fake", lambda index: {"image": np.zeros((4, 4, 3), np.uint8)}, 1)
    with pytest.raises(ValueError, match="read-only"):
        source[0]["image"][:] = 1
    source[0]["label"] = 3
    assert "label" not in source[0]
    with pytest.raises(IndexError):
        source[1]


def test_threads_may_read_at_once():
    source = Source("fake", lambda index: {"image": np.full((256, 256, 3), index, np.uint8)}, 16, cache_mb=1)
    wrong = []

    def read(seed):
        for index in np.random.default_rng(seed).integers(0, 16, 200):
            if (source[int(index)]["image"] != index).any():
                wrong.append(index)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert source._free >= 0


def test_squares_are_the_area_resampled_center(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (12, 20, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "wide.png")
    source = open_source(f"folder:{tmp_path}", min_side=4, cache_mb=0)
    square = squares(source, 4)[0]["image"]
    blocks = image[:, 4:16].reshape(4, 3, 4, 3, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(square, blocks, atol=1.01)  # Pillow rounds after each of the two axes
    assert square.shape == (4, 4, 3)


def test_an_image_of_a_folder_that_is_away_for_a_moment_is_read_once_it_is_back(
    tmp_path, monkeypatch, logged
):
    pixels, folder, away = image(tmp_path / "in" / "a.png"), tmp_path / "in", tmp_path / "away"
    source = open_source(f"folder:{folder}", cache_mb=0)
    folder.rename(away)
    monkeypatch.setattr(sources.time, "sleep", lambda seconds: seconds == 2.0 and away.rename(folder))
    assert np.array_equal(source[0]["image"], pixels)
    assert len(logged) == 1 and "a.png" in logged[0]


def test_an_image_that_stays_away_is_not_taken_for_a_damaged_one(tmp_path, monkeypatch):
    image(tmp_path / "in" / "a.png")
    source = open_source(f"folder:{tmp_path / 'in'}", cache_mb=0)
    (tmp_path / "in").rename(tmp_path / "away")
    waited = []
    monkeypatch.setattr(sources.time, "sleep", waited.append)
    with pytest.raises(sources.DataUnavailable, match=r"a\.png") as error:
        source[0]
    assert error.value.exit_code == 1 and sum(waited) == 30


def test_a_file_that_cannot_be_read_because_of_its_storage_is_not_left_out(tmp_path, monkeypatch):
    image(tmp_path / "in" / "a.png")
    image(tmp_path / "in" / "b.png")
    real = Path.open

    def failing(path, *arguments, **options):
        if path.name == "b.png":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", failing)
    monkeypatch.setattr(sources.time, "sleep", lambda seconds: None)
    with pytest.raises(sources.DataUnavailable, match=r"b\.png"):
        open_source(f"folder:{tmp_path / 'in'}")


def test_sources_know_the_names_of_their_files(tmp_path, monkeypatch):
    tiny.images(tmp_path / "in", count=2)
    assert [open_source(f"folder:{tmp_path / 'in'}").file_name(index) for index in (0, 1)] == [
        "00.png",
        "01.png",
    ]
    assert Source("numbers", lambda index: {}, 3).file_name(2) == "00002"
    monkeypatch.setenv("SR3_DATA_DIR", str(tmp_path))
    assert open_source("photos:test").file_name(5) == "kingfisher.jpg"


# -- pairs


def pair_files(root, names, *, scale=2, size=(6, 4)):
    """Low-res images of `size` and high-res images `scale` times as large; returns their pixels by name."""
    width, height = size
    return {
        (low, high): (
            image(root / low, size, seed=index),
            image(root / high, (scale * width, scale * height), seed=index + 100),
        )
        for index, (low, high) in enumerate(names)
    }


@pytest.mark.parametrize(
    "names, folders",
    [
        ([("lr/a.png", "hr/a.png"), ("lr/b/a.png", "hr/b/a.jpg")], ("lr", "hr")),  # the same paths
        ([("4/cgm3_LR4.png", "4/cgm3_HR.png"), ("4/cgm4_LR4.png", "4/cgm4_HR.png")], ("4", "4")),  # RealSR
        ([("x/cgm3_LR4.png", "y/cgm3_HR.png")], ("x", "y")),
        ([("x/0801x4.png", "y/0801.png"), ("x/0802x4.png", "y/0802.png")], ("x", "y")),  # DIV2K
        ([("x/a-small.png", "y/a.png"), ("x/b-small.png", "y/b.png")], ("x", "y")),  # shared by all
        ([("x/a.png", "y/a.png"), ("x/a_x2.png", "y/a_HR.png")], ("x", "y")),  # exact names come first
    ],
)
def test_pairs_are_matched_by_name(tmp_path, names, folders):
    pixels = pair_files(tmp_path, names)
    source = open_source(f"pairs:{tmp_path / folders[0]}:{tmp_path / folders[1]}")
    assert (len(source), source.scale) == (len(names), 2)
    found = {source.file_name(index): source[index] for index in range(len(source))}
    for (_, high), (low_res, high_res) in pixels.items():
        item = found[high.split("/", 1)[1]]
        np.testing.assert_array_equal(item["low_res"], low_res)
        np.testing.assert_array_equal(item["image"], high_res)
        assert not item["low_res"].flags.writeable


def test_pairs_that_do_not_fit_are_named(tmp_path):
    pair_files(tmp_path, [(f"lr/{name}.png", f"hr/{name}.png") for name in "abc"])
    name = f"pairs:{tmp_path / 'lr'}:{tmp_path / 'hr'}"
    assert len(open_source(name, scale=2)) == 3
    with pytest.raises(UserError, match=r"3 of 3 pairs .* scale 4: 'a.png', 'b.png', 'c.png'.* 12x8 .* 6x4"):
        open_source(name, scale=4)
    image(tmp_path / "hr" / "b.png", (13, 8))
    with pytest.raises(UserError, match=r"1 of 3 pairs .* scale 2: 'b.png'.* 13x8"):
        open_source(name)
    image(tmp_path / "hr" / "b.png", (12, 8))
    image(tmp_path / "lr" / "b_LR.png", (6, 4))  # without a partner: b.png matches exactly
    with pytest.raises(UserError, match=r"1 of 4 low-res images .* 'b_LR.png'"):
        open_source(name)
    (tmp_path / "lr" / "b_LR.png").unlink()
    (tmp_path / "lr" / "a.png").unlink()
    with pytest.raises(UserError, match=r"1 of 3 high-res images .* 'a.png'"):
        open_source(name)
    image(tmp_path / "lr" / "a_LR2.png", (6, 4))
    image(tmp_path / "lr" / "a_LR4.png", (3, 2))
    with pytest.raises(UserError, match=r"'a_LR2.png', 'a_LR4.png' .* match 'a.png'"):
        open_source(name)


def test_low_res_images_may_have_the_size_of_the_others(tmp_path):
    pair_files(tmp_path, [("lr/a.png", "hr/a.png")], scale=1)
    source = open_source(f"pairs:{tmp_path / 'lr'}:{tmp_path / 'hr'}", scale=1)
    assert source[0]["low_res"].shape == source[0]["image"].shape
    with pytest.raises(UserError, match="framing=crop"):
        squares(source, 4)


# -- Synthetic images


def test_synthetic_images_depend_on_the_index_only():
    one, other = (open_source("synthetic:7x20x33:5", cache_mb=0) for _ in range(2))
    assert len(one) == 7 and one.num_classes == 5
    images = [one[index]["image"] for index in range(7)]
    assert {image.shape for image in images} == {(20, 33, 3)} and images[0].dtype == np.uint8
    assert len({image.tobytes() for image in images}) == 7
    assert [one[index]["label"] for index in range(7)] == [0, 1, 2, 3, 4, 0, 1]
    np.testing.assert_array_equal(other[3]["image"], images[3])
    assert "label" not in open_source("synthetic:7x20x33")[0]


@pytest.mark.parametrize(
    "rest", ["", "7", "7x20", "0x20x20", "7x20x20x3", "7x20x20:", "-7x20x20", "7x8x99", "1x999999x999999"]
)
def test_synthetic_sizes_that_cannot_work_are_named(rest):
    with pytest.raises(UserError, match=f"synthetic:{rest}'"):
        open_source(f"synthetic:{rest}", min_side=16)
