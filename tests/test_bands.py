"""Images written in bands: the same pixels, alpha and metadata as an image written at once."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
from hostile import IPTC, exif, pixels, srgb
from PIL import Image

from sr3_jax.image_io.bands import write_bands
from sr3_jax.image_io.image_file import DecodedImage, ImageError, read_image, with_pixels, write_image
from sr3_jax.image_io.metadata import Metadata

SCALE = 3


def output(height: int = 50, width: int = 41) -> np.ndarray:
    """Smooth enough to be compressed, with noise."""
    rows, columns = np.mgrid[: SCALE * height, : SCALE * width]
    smooth = np.stack([rows % 256, columns % 256, (rows + columns) % 256], axis=-1)
    return (smooth // 2 + pixels(SCALE * height, SCALE * width) // 8).astype(np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("alpha", [False, True])
def test_bands_equal_an_image_written_at_once(tmp_path, suffix, gray, alpha):
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
    write_bands(tmp_path / f"bands{suffix}", small, np.array_split(large, [1, 70, 71, 130]), scale=SCALE)
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
    write_bands(tmp_path / "bands.png", small, [np.asarray(smooth)], scale=SCALE)
    write_image(tmp_path / "whole.png", with_pixels(small, np.asarray(smooth)))
    assert os.path.getsize(tmp_path / "bands.png") < 1.15 * os.path.getsize(tmp_path / "whole.png")


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_failure_leaves_no_file_and_keeps_its_cause(tmp_path, suffix):
    def bands():
        yield output()[:20]
        raise RuntimeError("the device failed")

    with pytest.raises(RuntimeError, match="the device failed"):
        write_bands(tmp_path / f"a{suffix}", DecodedImage(rgb=pixels(50, 41)), bands(), scale=SCALE)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ImageError, match="could not be written"):
        write_bands(tmp_path / "no" / f"a{suffix}", DecodedImage(rgb=pixels(50, 41)), [output()], scale=SCALE)
