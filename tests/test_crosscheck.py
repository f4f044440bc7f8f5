"""Metrics of a dozen photographs next to PyTorch's implementations, networks with the same random weights.

`pip install 'sr3_jax[crosscheck]'` and `pytest -s tests/test_crosscheck.py`, which prints the largest differences.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sr3_jax import metrics
from sr3_jax.data import photos
from sr3_jax.features import lpips, statistics
from sr3_jax.features.alexnet_features import AlexNetFeatures
from sr3_jax.image_ops import degrade, to_uint8, to_unit, upsample

torch = pytest.importorskip("torch")
functional = pytest.importorskip("torchmetrics.functional.image")
torchmetrics_fid = pytest.importorskip("torchmetrics.image.fid")
torchmetrics_kid = pytest.importorskip("torchmetrics.image.kid")
reference_lpips = pytest.importorskip("lpips")
clean_fid = pytest.importorskip("cleanfid.fid")

COUNT, SIDE = 12, 224  # the size that the features of AlexNet are computed at, so that nothing is resized


@pytest.fixture(scope="module")
def images() -> tuple[np.ndarray, np.ndarray]:
    """Center crops of bundled photographs and their bicubic upscalings by 4: uint8 [12,224,224,3] each."""
    files = sorted(Path(photos.__file__).parent.glob("t*/*.jpg"))[:COUNT]
    truth = []
    for file in files:
        whole = np.asarray(Image.open(file).convert("RGB"))
        top, left = ((side - SIDE) // 2 for side in whole.shape[:2])
        truth.append(whole[top : top + SIDE, left : left + SIDE])
    images = np.stack(truth)
    return np.asarray(to_uint8(upsample(degrade(to_unit(images), 4), 4))), images


@pytest.fixture(scope="module")
def networks():
    """LPIPS with random weights, in PyTorch and here."""
    torch.manual_seed(0)
    theirs = reference_lpips.LPIPS(net="alex", pnet_rand=True, pretrained=False, verbose=False).eval()
    state = {name: value.numpy() for name, value in theirs.state_dict().items()}
    slices = [name for name in state if name.startswith("net.slice") and name.endswith(".weight")]
    arrays = {}
    for index, name in enumerate(sorted(slices)):
        arrays[f"AlexNet_0.Conv_{index}.kernel"] = state[name].transpose(2, 3, 1, 0)
        arrays[f"AlexNet_0.Conv_{index}.bias"] = state[name.replace("weight", "bias")]
        with torch.no_grad():
            theirs.lins[index].model[-1].weight.abs_()  # as trained heads are
        head = theirs.lins[index].model[-1].weight.detach().numpy()
        arrays[f"NetLinLayer_{index}.Conv_0.kernel"] = head.transpose(2, 3, 1, 0)
    return theirs, lpips.Lpips(lpips.checked(arrays, "random"), "0" * 64)


def as_torch(images: np.ndarray):
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def largest(name: str, ours, theirs, most: float) -> None:
    """Print and check the largest difference."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    difference = float(np.max(np.abs(ours - theirs)))
    print(f"{name}: largest difference {difference:.1e}, values up to {np.max(np.abs(theirs)):.4g}")
    assert difference <= most


def test_psnr_and_ssim_are_those_of_torchmetrics(images):
    both = [as_torch(one).double() for one in images]
    psnr = functional.peak_signal_noise_ratio(*both, data_range=255.0, reduction="none", dim=(1, 2, 3))
    largest("PSNR, torchmetrics", metrics.psnr(*images), psnr, 1e-4)
    _, ssim = functional.structural_similarity_index_measure(
        *both, data_range=255.0, reduction="none", return_full_image=True
    )
    inside = ssim[..., 5:-5, 5:-5].mean(
        dim=(1, 2, 3)
    )  # the windows in the image: theirs also has reflected borders
    largest("SSIM, torchmetrics without its borders", metrics.ssim(*images), inside, 1e-5)


def test_lpips_is_that_of_its_authors(images, networks):
    theirs, ours = networks
    with torch.no_grad():
        expected = theirs(*(as_torch(one).float() / 127.5 - 1 for one in images)).ravel()
    largest("LPIPS, lpips", ours.distance(*images), expected, 1e-4 * float(expected.max()))


def test_frechet_distance_and_kid_are_those_of_torchmetrics_and_clean_fid(images, networks):
    theirs, ours = networks

    class Features(torch.nn.Module):
        num_features = 256

        def forward(self, x):
            with torch.no_grad():
                layers = theirs.net.forward(theirs.scaling_layer(x.float() / 127.5 - 1))
                return layers[-1].mean(dim=(2, 3)).double()

    alexnet = AlexNetFeatures(ours)
    a, b = (alexnet.features(one) for one in images)
    protocol = alexnet.protocol
    of_ours = statistics.frechet_distance(*(statistics.statistics_of(one, protocol) for one in (a, b)))
    fid = torchmetrics_fid.FrechetInceptionDistance(feature=Features(), input_img_size=(3, SIDE, SIDE))
    kid = torchmetrics_kid.KernelInceptionDistance(feature=Features(), subsets=1, subset_size=COUNT)
    for metric in (fid, kid):
        metric.set_dtype(torch.float64)
        for one, real in zip(images, (False, True), strict=True):
            metric.update(as_torch(one), real=real)
    scale = float(fid.compute())
    largest("Frechet distance, torchmetrics", of_ours, scale, 1e-3 * scale)
    features = [Features()(as_torch(one)).numpy() for one in images]
    moments = [part for one in features for part in (one.mean(axis=0), np.cov(one, rowvar=False))]
    largest("Frechet distance, clean-fid", of_ours, clean_fid.frechet_distance(*moments), 1e-3 * scale)
    squared = statistics.kernel_distance(a, b, seed=0).mean
    largest("KID, torchmetrics", squared, float(kid.compute()[0]), 1e-5)
    largest(
        "KID, clean-fid",
        squared,
        clean_fid.kernel_distance(*features, num_subsets=1, max_subset_size=COUNT),
        1e-5,
    )
