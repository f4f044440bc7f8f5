"""Files and folders with a stand-in model: outputs, batches and failures."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from hostile import encode, exif, pixels, srgb
from PIL import Image
from stand_in import StandIn

from sr3_jax.errors import UserError
from sr3_jax.image_io.image_file import DecodedImage, ImageError, read_image, read_rgb
from sr3_jax.inference.batching import BatchRunner, upscale_each
from sr3_jax.inference.tiling import Axis, Tiling, tile_image
from sr3_jax.inference.upscale_files import Job, find_images, upscale_files
from sr3_jax.memory import OutOfMemory
from sr3_jax.sampling import Sampling


def put(path: Path, data: bytes | np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else encode(data, "PNG"))
    return path


def nearest(rgb: np.ndarray, scale: int = 2) -> np.ndarray:
    return rgb.repeat(scale, axis=0).repeat(scale, axis=1)


def targets(found) -> dict[str, str]:
    return {str(job.source): str(job.target) for job in found.jobs}


# --- find_images


def test_folder_structure_is_repeated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("in/b.png", "in/a.JPG", "in/deep/er/c.tif", "in/.hidden/d.webp"):
        put(Path(name), pixels())
    put(Path("in/text.txt"), b"hello")
    put(Path("in/._a.jpg"), b"hello")
    Path("in/empty").mkdir()
    found = find_images([Path("in")], Path("out"))
    assert targets(found) == {
        "in/b.png": "out/b.png",
        "in/a.JPG": "out/a.JPG.png",  # the file is a PNG, which may have alpha
        "in/deep/er/c.tif": "out/deep/er/c.tif",
        "in/.hidden/d.webp": "out/.hidden/d.webp",
    }
    assert (len(found.ignored), found.failed) == (2, ())
    assert not Path("out").exists()


def test_target_names(tmp_path, monkeypatch):
    """The suffix is kept if it can be written and can store the image; otherwise one is appended."""
    monkeypatch.chdir(tmp_path)
    jpeg = encode(pixels(), "JPEG")
    sources = {
        "a.jpeg": jpeg, "b.PNG": jpeg, "c.gif": b"GIF89a", "c.png": jpeg, "d": jpeg, "e.dat": encode(pixels(), "WEBP"),
        "f.bmp": b"", "g.jpg": b"", "h.jpg": encode(pixels(), "TIFF"), "n" * 251 + ".gif": b"GIF89a",
    }  # fmt: skip
    for name, data in sources.items():
        put(Path("in") / name, data)
    found = targets(find_images([Path("in")], Path("out")))
    assert {Path(source).name: Path(target).name for source, target in found.items()} == {
        "a.jpeg": "a.jpeg", "b.PNG": "b.PNG", "c.gif": "c.gif.png", "c.png": "c.png", "d": "d.jpg",
        "e.dat": "e.dat.webp", "f.bmp": "f.bmp.png", "g.jpg": "g.jpg", "h.jpg": "h.jpg.tif",
        "n" * 251 + ".gif": "n" * 251 + ".png",
    }  # fmt: skip


def test_single_file_goes_to_a_folder_or_a_file(tmp_path):
    source = put(tmp_path / "a.png", pixels())
    assert find_images([source], tmp_path / "out").jobs == (Job(source, tmp_path / "out" / "a.png"),)
    assert find_images([source], tmp_path / "b.jpg").jobs == (Job(source, tmp_path / "b.jpg"),)
    (tmp_path / "folder.png").mkdir()
    assert find_images([source], tmp_path / "folder.png").jobs[0].target == tmp_path / "folder.png" / "a.png"


def test_a_name_too_long_for_the_output_is_that_images_failure(tmp_path):
    put(tmp_path / "in" / ("n" * 250 + ".png"), pixels())
    put(tmp_path / "in" / "a.png", pixels())
    (tmp_path / "out").mkdir()
    found = find_images([tmp_path / "in"], tmp_path / "out", suffix="_twice")
    result = upscale_files(StandIn(), found.jobs)
    assert [path.name for path in result.done] == ["a_twice.png"]
    assert "too long a name" in result.failed[0][1]


def test_suffixes_and_formats(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.JPG", "b.gif", "c.png"):
        put(Path("in") / name, encode(pixels(), "JPEG"))

    def names(**options):
        return [job.target.name for job in find_images([Path("in")], Path("out"), **options).jobs]

    assert names(suffix="_4x") == ["a_4x.JPG", "b_4x.gif.jpg", "c_4x.png"]
    assert names(file_format="jpg") == ["a.JPG", "b.jpg", "c.jpg"]
    assert find_images([Path("in/c.png")], Path("out.v2")).jobs[0].target == Path("out.v2/c.png")
    with pytest.raises(UserError, match="suffix"):
        find_images([Path("in")], Path("out"), suffix="/../x")


def test_file_given_by_the_user_is_always_a_job(tmp_path):
    source = put(tmp_path / "notes.txt", b"hello")
    assert len(find_images([source], tmp_path / "out").jobs) == 1


def test_file_given_twice_is_one_job(tmp_path, monkeypatch):
    put(tmp_path / "in" / "a.png", pixels())
    monkeypatch.chdir(tmp_path)
    found = find_images([Path("in"), Path("in/a.png"), Path("./in/../in")], Path("out"))
    assert targets(found) == {"in/a.png": "out/a.png"}


def test_output_folder_is_not_searched(tmp_path):
    put(tmp_path / "a.png", pixels())
    put(tmp_path / "out" / "old.png", pixels())
    found = find_images([tmp_path], tmp_path / "out")
    assert [job.source.name for job in found.jobs] == ["a.png"]


def test_links_are_followed_without_cycles(tmp_path):
    put(tmp_path / "in" / "z" / "a.png", pixels())
    put(tmp_path / "elsewhere" / "b.png", pixels())
    for name, target in {
        "in/again": "z", "in/up": "..", "in/z/self": ".", "in/far": "../elsewhere", "in/gone": "nowhere",
        "elsewhere/back": "../in", "elsewhere/self": ".",
    }.items():  # fmt: skip
        (tmp_path / name).symlink_to(target)
    found = find_images([tmp_path / "in"], tmp_path / "out")
    assert [str(job.source.relative_to(tmp_path)) for job in found.jobs] == ["in/far/b.png", "in/z/a.png"]


@pytest.mark.parametrize(
    ("inputs", "output", "text"),
    [
        (["absent.png"], "out", "'absent.png'"),
        ([], "out", "inputs"),
        (["in", "other"], "out", "'in/a.png' and 'other/a.png' .*'out/a.png'"),
        (["in"], "in", "output 'in/a.png'"),
        (["in/a.png"], "in/a.png", "output 'in/a.png'"),
        (["in/a.png"], "link/a.png", "output 'link/a.png'"),
        (["in/b.png", "other"], "in", "output 'in/"),
        (["in"], "out.png", "output 'out.png'"),
        (["in/a.png", "in/b.png"], "out.png", "output 'out.png'"),
        (["in/a.png"], "out.gif", r"output 'out\.gif'"),
        (["in/a.png"], "out.avif", r"output 'out\.avif'"),
        (["in/a.png"], "out.pdf", r"output 'out\.pdf'"),
        (["in/a.png"], "o" * 300, "too long a name"),
        (["in"], "file", "output 'file'"),
        (["in"], "file/deeper", "output 'file/deeper' .*'file'"),
        (["in/a.png"], "file/x.png", "output 'file/x.png' .*'file'"),
    ],
)
def test_invalid_inputs_and_outputs_fail(tmp_path, monkeypatch, inputs, output, text):
    monkeypatch.chdir(tmp_path)
    for name in ("in/a.png", "in/b.png", "other/a.png"):
        put(Path(name), pixels())
    put(Path("file"), b"")
    Path("link").symlink_to("in")
    with pytest.raises(UserError) as caught:
        find_images([Path(path) for path in inputs], Path(output))
    assert re.search(text, str(caught.value))
    assert not isinstance(caught.value, ImageError)


def test_unreadable_folders_are_reported(tmp_path, monkeypatch):
    put(tmp_path / "in" / "a.png", pixels())
    put(tmp_path / "in" / "closed" / "b.png", pixels())
    scandir = os.scandir

    def fail(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    found = find_images([tmp_path / "in"], tmp_path / "out")
    assert [job.source.name for job in found.jobs] == ["a.png"]
    assert found.failed == ((tmp_path / "in" / "closed", "permission denied"),)


# --- upscale_files


def jobs_of(folder: Path, images: dict[str, np.ndarray | bytes], out: str = "out") -> list[Job]:
    return [Job(put(folder / "in" / name, data), folder / out / name) for name, data in images.items()]


def test_pixels_gray_alpha_and_metadata_are_preserved(tmp_path):
    rgb, alpha = pixels(), pixels(seed=1)[..., 0]
    files = {
        "a.png": encode(np.dstack([rgb, alpha]), "PNG", icc_profile=srgb()),
        "g.png": rgb[..., 0],
        "t.tif": encode(rgb, "TIFF", exif=exif(6)),
    }
    (job, gray_job, turned), model = jobs_of(tmp_path, files), StandIn()
    outcome = upscale_files(model, [job, gray_job, turned], sampling=Sampling("ddim", 7))
    assert (len(outcome.done), outcome.skipped, outcome.failed) == (3, (), ())
    assert {call[1:] for call in model.calls} == {(7, "ddim")}
    after = read_image(job.target)
    np.testing.assert_array_equal(after.rgb, nearest(rgb))
    height, width = rgb.shape[:2]
    smooth = Image.fromarray(alpha).resize((2 * width, 2 * height), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(after.alpha, np.asarray(smooth))
    assert after.metadata.icc_profile == srgb()
    gray = read_image(gray_job.target)
    assert gray.gray
    np.testing.assert_array_equal(gray.rgb[..., 0], nearest(rgb[..., 0]))
    upright = read_image(turned.target)
    np.testing.assert_array_equal(upright.rgb, nearest(np.rot90(rgb, -1)))
    assert b"Maker" in (upright.metadata.exif or b"")


def test_gray_output_is_the_luma_of_the_models_output(tmp_path):
    class Tinted(StandIn):
        def upscale(self, images, key, **options):
            return super().upscale(images, key, **options) // 2 + np.array([100, 0, 40], np.uint8)

    (job,) = jobs_of(tmp_path, {"g.png": np.full((4, 4), 100, np.uint8)})
    upscale_files(Tinted(), [job])
    luma = round(0.299 * 150 + 0.587 * 50 + 0.114 * 90)
    assert (read_rgb(job.target) == luma).all()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_output_depends_only_on_the_image_and_the_seed(tmp_path, batch_size):
    """Not on the order, the rest of the batch, the file name, or existing outputs."""
    images = {f"{i}.png": pixels(8 + i % 2, 9, seed=i) for i in range(8)}
    model = StandIn(noise=30)
    options = {"batch_size": batch_size, "seed": 5}
    upscale_files(model, jobs_of(tmp_path, images, "all"), **options)
    upscale_files(model, jobs_of(tmp_path, images, "reverse")[::-1], **options)
    some = jobs_of(tmp_path, images, "some")
    upscale_files(model, some[3:5], **options)
    upscale_files(model, some, **options)
    for name in images:
        first = (tmp_path / "all" / name).read_bytes()
        assert (tmp_path / "reverse" / name).read_bytes() == first
        assert (tmp_path / "some" / name).read_bytes() == first
    renamed = jobs_of(tmp_path, {"renamed.png": images["4.png"]})
    upscale_files(model, renamed, **options)
    assert renamed[0].target.read_bytes() == (tmp_path / "all" / "4.png").read_bytes()
    other = jobs_of(tmp_path, images, "other")[:1]
    upscale_files(model, other, batch_size=batch_size, seed=6)
    assert other[0].target.read_bytes() != (tmp_path / "all" / "0.png").read_bytes()


def test_images_of_equal_size_share_full_batches(tmp_path):
    """Every batch has batch_size rows, so each image size is compiled once."""
    images = {f"{i:02}.png": pixels(8, 9 if i % 3 else 11, seed=i) for i in range(11)}
    model = StandIn()
    jobs = jobs_of(tmp_path, images)
    outcome = upscale_files(model, jobs, batch_size=4)
    assert len(outcome.done) == 11
    assert sorted(shape for shape, _, _ in model.calls) == [(4, 8, 9, 3)] * 2 + [(4, 8, 11, 3)]
    for job in jobs:
        np.testing.assert_array_equal(read_rgb(job.target), nearest(images[job.source.name]))


@pytest.mark.parametrize("most", [10**6, 64])
def test_outscale_applies_the_model_as_often_as_needed(tmp_path, most):
    """The model is 2x; each pass has noise of its own, and sizes are exact for odd sides, also in tiles."""
    rgb = pixels(41, 71) // 2
    source = put(tmp_path / "in" / "a.png", rgb)
    lanczos = Image.Resampling.LANCZOS

    def outputs(outscale, **options):
        job = Job(source, tmp_path / "out" / f"{outscale}.png")
        result = upscale_files(StandIn(most=most, **options), [job], outscale=outscale)
        assert result.failed == ()
        return read_rgb(job.target)

    np.testing.assert_array_equal(outputs(2.0), nearest(rgb))
    small = Image.fromarray(nearest(rgb)).resize((106, 62), lanczos)  # 106.5 and 61.5, to even
    np.testing.assert_array_equal(outputs(1.5), np.asarray(small))
    five = Image.fromarray(nearest(rgb, 8)).resize((355, 205), lanczos)
    np.testing.assert_array_equal(outputs(5.0), np.asarray(five))
    noise = outputs(4.0, noise=40)[0, 0].astype(int) - rgb[0, 0]
    assert (noise % 2).any(), "both passes add the same noise"
    for wrong in (0.5, 65.0, float("nan")):
        with pytest.raises(UserError, match="outscale"):
            upscale_files(StandIn(), [Job(source, tmp_path / "x.png")], outscale=wrong)


def test_existing_outputs_are_skipped_unless_overwrite(tmp_path):
    jobs = jobs_of(tmp_path, {"a.png": pixels(seed=1), "b.png": pixels(seed=2)})
    upscale_files(StandIn(), jobs[:1])
    jobs[0].target.write_bytes(b"mine")
    outcome = upscale_files(StandIn(), jobs)
    assert (outcome.done, outcome.skipped) == ((jobs[1].target,), (jobs[0].target,))
    assert jobs[0].target.read_bytes() == b"mine"
    outcome = upscale_files(StandIn(), jobs, overwrite=True)
    assert len(outcome.done) == 2
    np.testing.assert_array_equal(read_rgb(jobs[0].target), nearest(pixels(seed=1)))


def test_failing_images_are_reported_and_the_others_finish(tmp_path):
    images = {f"{i}.png": pixels(8, 9, seed=i) for i in range(6)}

    def before(batch: np.ndarray) -> None:
        if (batch == images["2.png"]).all(axis=(1, 2, 3)).any():
            raise FloatingPointError("values are\nnot finite")
        if (batch == images["4.png"]).all(axis=(1, 2, 3)).any():
            raise RuntimeError("INTERNAL: failure")

    jobs, results, model = jobs_of(tmp_path, images), [], StandIn(before=before)
    outcome = upscale_files(model, jobs, batch_size=3, on_result=lambda *one: results.append(one))
    assert dict(outcome.failed) == {
        jobs[2].source: "values are not finite",
        jobs[4].source: "failed: RuntimeError: INTERNAL: failure",
    }
    assert [path.name for path in outcome.done] == ["0.png", "1.png", "3.png", "5.png"]
    assert all(path.exists() for path in outcome.done)
    assert {shape[0] for shape, _, _ in model.calls} == {3}, "another batch shape may round differently"
    assert {job for job, _ in results} == set(jobs)
    assert {job.source: failure for job, failure in results if failure} == dict(outcome.failed)


def test_images_of_similar_size_share_full_batches(tmp_path):
    """20 sizes once took 20 batches, mostly of copies."""

    class Padding(StandIn):
        def tiling(self, height, width, *, tile=None):
            rows, columns = (Axis(-(-side // 8) * 8, (0,), (0, side)) for side in (height, width))
            return Tiling(rows, columns, 16)

    images = {f"{i}.png": pixels(9 + i % 8, 17 + i % 7, seed=i) for i in range(20)}
    model = Padding()
    jobs = jobs_of(tmp_path, images)
    assert not upscale_files(model, jobs, batch_size=4).failed
    assert [shape for shape, _, _ in model.calls] == [(4, 16, 24, 3)] * 5
    for job in jobs:
        np.testing.assert_array_equal(read_rgb(job.target), nearest(images[job.source.name]))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
def test_large_image_is_written_in_tiles_with_progress(tmp_path, suffix):
    images, seen = {"large.png": pixels(200, 90), "small.png": pixels(8, 8)}, []
    jobs = [Job(job.source, job.target.with_suffix(suffix)) for job in jobs_of(tmp_path, images)]
    model = StandIn(most=80)
    outcome = upscale_files(model, jobs, on_tiles=lambda *one: seen.append(one))
    count = model.tiling(200, 90).count
    assert not outcome.failed and seen == [(jobs[0], 0, count), (jobs[0], count, count)] and count > 1
    if suffix != ".jpg":
        np.testing.assert_array_equal(read_rgb(jobs[0].target), nearest(images["large.png"]))


def test_image_that_does_not_fit_into_memory_is_divided_and_the_next_one_at_once(tmp_path):
    images, tried = {f"{i}.png": pixels(200, 200, seed=i) for i in range(2)}, []

    class Small(StandIn):
        def upscale_bands(self, image, seed, *, tile, **options):
            tried.append(tile)
            if tile > 100:
                raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
            return super().upscale_bands(image, seed, tile=tile, **options)

    jobs = jobs_of(tmp_path, images)
    outcome = upscale_files(Small(), jobs, tile=140)
    assert not outcome.failed
    assert tried[-2] <= 100 and tried[-1] == tried[-2] and max(tried[:-2]) > 100


@pytest.mark.parametrize(
    ("free", "batch_size", "tile"), [(50, 4, 140), (30, 2, 140), (10, 1, 140), (5, 1, 70)]
)
def test_what_fits_is_chosen_at_once_where_the_free_memory_is_known(tmp_path, free, batch_size, tile):
    """Needed: 10 bytes for each tile of a batch, at tiles of 140."""
    tried = []

    class Small(StandIn):
        def upscale_bands(self, image, seed, *, tile, batch_size, **options):
            tried.append((batch_size, tile))
            needed = 10 * batch_size * tile**2 // 140**2
            if needed > free:
                raise OutOfMemory("needs more", needed=needed, free=free)
            return super().upscale_bands(image, seed, tile=tile, batch_size=batch_size, **options)

    outcome = upscale_files(Small(), jobs_of(tmp_path, {"a.png": pixels(200, 200)}), tile=140, batch_size=4)
    assert not outcome.failed
    assert len(tried) <= 2
    assert tried[-1][0] == batch_size
    assert abs(tried[-1][1] - tile) <= 20


def test_memory_that_runs_out_halves_the_batch_by_devices_then_the_tile_for_this_shape_only(tmp_path):
    """8 simulated devices: batches of 32, 16, 8, and then smaller tiles; remembered for images of the same shape."""
    images = {f"{i}.png": pixels(side, side, seed=i) for i, side in enumerate((200, 200, 170, 20))}
    tried = []

    class Small(StandIn):
        def upscale_bands(self, image, seed, *, tile, batch_size, **options):
            tried.append((len(image), batch_size, tile))
            if len(image) == 200 and (tile is None or tile > 100):
                raise MemoryError
            return super().upscale_bands(image, seed, tile=tile, batch_size=batch_size, **options)

    model = Small(most=140)
    outcome = upscale_files(model, jobs_of(tmp_path, images), batch_size=32)
    assert not outcome.failed
    assert [size for length, size, tile in tried if length == 200 and tile is None] == [32, 16, 8]
    last = [(size, tile) for length, size, tile in tried if length == 200][-2:]
    assert last[0] == last[1] and last[0][1] <= 100, (
        "the second one was tried with what did not fit for the first"
    )
    assert [one for one in tried if one[0] == 170] == [(170, 32, None)], "another shape fits as before"
    assert [shape[0] for shape, _, _ in model.calls if shape[1] == 20] == [32]


def test_large_images_of_a_stream_are_computed_once_each():
    """Not once for each image that a batch has room for."""
    asked = []

    class Counting(StandIn):
        def upscale_bands(self, image, seed, **options):
            asked.append(image.shape)
            return super().upscale_bands(image, seed, **options)

    runner = BatchRunner(Counting(most=80), sampling=None, seed=0, batch_size=4, tile=None)
    images = [pixels(100, 90, seed=1), pixels(8, 9), pixels(100, 90, seed=2)]
    results = list(upscale_each(runner, images, lambda rgb: DecodedImage(rgb=rgb), batch_size=4))
    assert asked == [(100, 90, 3)] * 2
    for image, (_, _, output) in zip(images, results, strict=True):
        np.testing.assert_array_equal(output, nearest(image))


def test_twenty_sizes_on_four_devices_take_24_slots(tmp_path):
    """With the tiles of the shipped model: one height and three widths after padding, 7 + 7 + 6 images."""

    class Shipped(StandIn):
        def tiling(self, height, width, *, tile=None):
            return tile_image(height, width, most=256, stride=8, scale=4, exact=36)

    images = {f"{i:02}.png": pixels(177 + i % 8, 217 + i, seed=i) for i in range(1, 21)}
    model = Shipped(scale=1)
    assert not upscale_files(model, jobs_of(tmp_path, images), batch_size=4).failed
    assert sum(shape[0] for shape, _, _ in model.calls) == 24


def test_batch_that_runs_out_of_memory_is_divided(tmp_path):
    images = {f"{i}.png": pixels(8, 9, seed=i) for i in range(4)}

    def before(batch: np.ndarray) -> None:
        if len(batch) > 1 or (batch == images["2.png"]).all():
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 999 bytes")

    jobs = jobs_of(tmp_path, images)
    outcome = upscale_files(StandIn(before=before), jobs, batch_size=4)
    [(failed, why)] = outcome.failed
    assert failed == jobs[2].source and "memory" in why
    assert [path.name for path in outcome.done] == ["0.png", "1.png", "3.png"]


def test_unreadable_and_unwritable_images_are_reported(tmp_path):
    jobs = jobs_of(
        tmp_path,
        {
            "a.png": pixels(),
            "bad.png": b"?",
            "cut.jpg": encode(pixels(40, 40), "JPEG")[:700],
            "z.png": pixels(),
        },
    )
    alpha = np.dstack([pixels(), pixels()[..., 0]])
    jobs += [
        Job(put(tmp_path / "in" / "alpha.png", alpha), tmp_path / "out" / "alpha.jpg"),
        Job(put(tmp_path / "in" / "long.png", pixels(1, 9000)), tmp_path / "out" / "long.webp"),
        Job(jobs[0].source, put(tmp_path / "file", b"") / "a.png"),
    ]
    model = StandIn()
    outcome = upscale_files(model, jobs)
    failed = dict(outcome.failed)
    assert len(model.calls) == 3, "the model got an image that cannot be written"
    assert [path.name for path in outcome.done] == ["a.png", "z.png"]
    assert "not an image" in failed[tmp_path / "in" / "bad.png"]
    assert "truncated" in failed[tmp_path / "in" / "cut.jpg"]
    assert "transparency" in failed[tmp_path / "in" / "alpha.png"]
    assert "18000x2" in failed[tmp_path / "in" / "long.png"]
    assert "could not be written" in failed[tmp_path / "in" / "a.png"]
    assert sorted(os.listdir(tmp_path / "out")) == ["a.png", "z.png"]


def test_user_errors_of_the_model_stop_immediately(tmp_path):
    def before(batch: np.ndarray) -> None:
        raise UserError("solver must be one of ddim, got 'x'")

    model = StandIn(before=before)
    with pytest.raises(UserError, match="solver"):
        upscale_files(model, jobs_of(tmp_path, {f"{i}.png": pixels(seed=i) for i in range(5)}), batch_size=2)
    assert len(model.calls) == 1
    with pytest.raises(UserError, match=r"batch_size .*0"):
        upscale_files(StandIn(), [], batch_size=0)


def test_reads_ahead_within_a_window(tmp_path, monkeypatch):
    """Images are read while the device works, but never the whole folder."""
    jobs = jobs_of(tmp_path, {f"{i:02}.png": pixels(seed=i) for i in range(60)})
    read, lock, many = [], threading.Lock(), threading.Event()

    def counting(path: Path, **options):
        with lock:
            read.append(path)
            if len(read) > 4:
                many.set()
        return read_image(path, **options)

    worked, ahead = [], []

    def before(batch: np.ndarray) -> None:
        assert many.wait(20), "nothing is read while the device works"
        worked.append(len(batch))
        ahead.append(len(read) - sum(worked))

    monkeypatch.setattr("sr3_jax.inference.upscale_files.read_image", counting)
    outcome = upscale_files(StandIn(before=before), jobs, batch_size=2)
    assert len(outcome.done) == 60
    assert max(ahead) <= 4 * 2 + 2 * 4  # the window, and what the threads had started


def test_read_ahead_is_bounded_by_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("sr3_jax.inference.batching._WINDOW_BYTES", 1)
    read, ahead = [], []

    def counting(path: Path, **options):
        read.append(path)
        return read_image(path, **options)

    monkeypatch.setattr("sr3_jax.inference.upscale_files.read_image", counting)
    model = StandIn(before=lambda images: ahead.append(len(read) - len(ahead)))
    jobs = jobs_of(tmp_path, {f"{i:02}.png": pixels(5, 5 + i) for i in range(30)})  # no two share a batch
    outcome = upscale_files(model, jobs, batch_size=9)
    assert len(outcome.done) == 30
    assert max(ahead) <= 5


def test_writing_does_not_block_the_device(tmp_path, monkeypatch):
    second = threading.Event()
    from sr3_jax.inference import upscale_files as upscale

    write = upscale.write_image

    def slow(path, image, **options):
        assert second.wait(20), "the device waits for the first image to be written"
        write(path, image, **options)

    model = StandIn(before=lambda images: second.set() if len(model.calls) > 1 else None)
    monkeypatch.setattr(upscale, "write_image", slow)
    outcome = upscale_files(model, jobs_of(tmp_path, {f"{i}.png": pixels(seed=i) for i in range(3)}))
    assert len(outcome.done) == 3


def test_interrupt_leaves_only_complete_files(tmp_path):
    def before(batch: np.ndarray) -> None:
        if len(model.calls) == 3:
            raise KeyboardInterrupt

    model = StandIn(before=before)
    jobs = jobs_of(tmp_path, {f"{i}.png": pixels(seed=i) for i in range(6)})
    with pytest.raises(KeyboardInterrupt):
        upscale_files(model, jobs)
    written = sorted(os.listdir(tmp_path / "out"))
    assert len(written) == 2
    for name in written:
        read_image(tmp_path / "out" / name)
    assert len(upscale_files(StandIn(), jobs).skipped) == 2


def test_transparent_edges_get_no_dark_fringe(tmp_path):
    """A white disc on transparent black: every pixel that can be seen is white."""
    y, x = np.mgrid[:24, :24]
    alpha = np.clip(255 * (8.5 - np.hypot(y - 12, x - 12)), 0, 255).astype(np.uint8)
    rgb = np.repeat(np.where(alpha > 0, 255, 0).astype(np.uint8)[..., None], 3, axis=-1)
    (job,) = jobs_of(tmp_path, {"disc.png": np.concatenate([rgb, alpha[..., None]], axis=-1)})
    assert upscale_files(StandIn(), [job]).done
    output = read_image(job.target)
    assert output.alpha is not None and 0 < (output.alpha > 0).mean() < 1
    assert (output.rgb[output.alpha > 0] == 255).all()
