"""Images written in bands: the same pixels, alpha and metadata as an image written at once."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
from hostile import IPTC, exif, pixels, srgb
from PIL import Image

from sr3_jax.image_io.bands import resize_bands, write_bands
from sr3_jax.image_io.image_file import DecodedImage, ImageError, read_image, with_pixels, write_image
from sr3_jax.image_io.metadata import Metadata
from sr3_jax.image_ops import resize_lanczos

SCALE = 3
SIZE = (150, 123)


def output(height: int = 50, width: int = 41) -> np.ndarray:
    """Smooth enough to be compressed, with noise."""
    rows, columns = np.mgrid[: SCALE * height, : SCALE * width]
    smooth = np.stack([rows % 256, columns % 256, (rows + columns) % 256], axis=-1)
    return (smooth // 2 + pixels(SCALE * height, SCALE * width) // 8).astype(np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("alpha", [False, True])
def test_bands_equal_an_image_written_at_once(tmp_path, suffix, gray, alpha):
    if alpha and suffix == ".jpg":
        return  # JPEG has none
    small = DecodedImage(
        rgb=np.repeat(pixels(50, 41)[..., :1], 3, -1) if gray else pixels(50, 41),
        alpha=pixels(50, 41, seed=3)[..., 0] if alpha else None,
        gray=gray,
        metadata=Metadata(
            icc_profile=None if gray else srgb(),
            exif=exif(1),
            xmp=b"<x:xmpmeta/>",
            iptc=IPTC,
            text=(("Comment", "caf\u00e9"), ("Author", "\u6771")),
            dpi=(300.0, 150.0),
        ),
    )
    large = output()
    write_bands(tmp_path / f"bands{suffix}", small, np.array_split(large, [1, 70, 71, 130]), size=SIZE)
    write_image(tmp_path / f"whole{suffix}", with_pixels(small, large))
    bands, whole = (read_image(tmp_path / f"{name}{suffix}") for name in ("bands", "whole"))
    np.testing.assert_array_equal(bands.rgb, whole.rgb)
    assert bands.gray == whole.gray
    assert bands.metadata.dpi == pytest.approx((300, 150), rel=1e-3)
    assert replace(bands.metadata, exif=None) == replace(whole.metadata, exif=None)
    for name in ("bands", "whole"):
        with Image.open(tmp_path / f"{name}{suffix}") as image:
            tags = image.getexif()
            assert tags[271] == "Maker"
            assert tags.get_ifd(34665)[36867] == "2020:01:01 00:00:00"
    if alpha:
        np.testing.assert_array_equal(bands.alpha, whole.alpha)
    with Image.open(tmp_path / f"bands{suffix}") as image:
        image.load()


def test_filters_make_a_png_no_larger_than_pillows(tmp_path):
    small = DecodedImage(rgb=pixels(200, 150))
    smooth = Image.fromarray(pixels(60, 45)).resize((450, 600), Image.Resampling.BICUBIC)
    write_bands(tmp_path / "bands.png", small, [np.asarray(smooth)], size=(600, 450))
    write_image(tmp_path / "whole.png", with_pixels(small, np.asarray(smooth)))
    assert os.path.getsize(tmp_path / "bands.png") < 1.15 * os.path.getsize(tmp_path / "whole.png")


@pytest.mark.parametrize("height", [8, 64, 65, 1000])
def test_jpeg_in_bands_has_the_size_and_quality_of_one_written_at_once(tmp_path, height):
    """More than 8 restart intervals, whose markers count modulo 8, and last strips of any height."""
    small, large = DecodedImage(rgb=pixels(8, 8)), output(400, 41)[:height]
    for name, quality in (("fine", None), ("coarse", 30)):
        write_bands(tmp_path / f"{name}.jpg", small, [large], size=large.shape[:2], quality=quality)
        write_image(tmp_path / f"{name}_whole.jpg", with_pixels(small, large), quality=quality)
        bands, whole = (read_image(tmp_path / f"{name}{end}.jpg") for end in ("", "_whole"))
        np.testing.assert_array_equal(bands.rgb, whole.rgb)
    assert os.path.getsize(tmp_path / "fine.jpg") < 1.02 * os.path.getsize(tmp_path / "fine_whole.jpg") + 100


@pytest.mark.parametrize("new_size", [(75, 62), (149, 122), (40, 123), (151, 200), (1, 1), (150, 123)])
@pytest.mark.parametrize("cuts", [[], [1, 70, 71, 130], list(range(1, 150))])
def test_lanczos_in_bands_equals_that_of_the_whole_image(new_size, cuts):
    bands = list(resize_bands(np.array_split(output(), cuts), SIZE, new_size))
    whole = resize_lanczos(output(), new_size)
    difference = np.abs(np.concatenate(bands).astype(int) - whole)
    assert difference.max() <= 1 and np.mean(difference > 0) < 0.001


def test_lanczos_in_bands_keeps_a_few_rows():
    """Rows of the result are made as soon as the rows that the filter sees are there."""
    given = 0

    def bands():
        nonlocal given
        for _ in range(100):
            given += 10
            yield np.zeros((10, 4, 3), np.uint8)

    made = 0
    for band in resize_bands(bands(), (1000, 4), (500, 2)):
        made += len(band)
        assert 2 * made >= given - 20


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
def test_failure_leaves_no_file_and_keeps_its_cause(tmp_path, suffix):
    def bands():
        yield output()[:20]
        raise RuntimeError("the device failed")

    with pytest.raises(RuntimeError, match="the device failed"):
        write_bands(tmp_path / f"a{suffix}", DecodedImage(rgb=pixels(50, 41)), bands(), size=SIZE)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ImageError, match="could not be written"):
        write_bands(tmp_path / "no" / f"a{suffix}", DecodedImage(rgb=pixels(50, 41)), [output()], size=SIZE)
