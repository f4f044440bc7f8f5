"""Times training steps and sampling of configs on this machine's device, optionally next to PyTorch.

    python benchmarks/measure.py -o speed.json configs/faces_16_128.py:16 configs/imagenet_64_256.py:8   # CONFIG:BATCH

Each time is the median of several calls after compilation. MFU counts the network's own FLOPs, three times those of the
forward pass without rematerialization, against the device's dense bfloat16 peak.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sr3_jax.config import load_config
from sr3_jax.diffusion.sampler import sample
from sr3_jax.distributed import sharding
from sr3_jax.flops import peak_flops
from sr3_jax.sampling import Sampling
from sr3_jax.train.experiment import Experiment, read
from sr3_jax.train.state import create_state
from sr3_jax.train.step import make_train_step

SAMPLER_STEPS = 10
CALLS = 7


def timed(call: Callable[[], Any], calls: int) -> float:
    """The median seconds of a call that blocks until its result is ready."""
    call()
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def peak_bytes() -> int:
    """The peak memory of the first device so far, 0 if it does not report any."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", 0)


def measure_jax(experiment: Experiment, batch_size: int, calls: int) -> dict[str, Any]:
    """Training step and sampler of a config at one batch size."""
    config, objective = experiment.config, experiment.objective
    network, side = objective.network, config["data"]["crop"]
    mesh = sharding.make_mesh()
    optimizer = experiment.optimizer()
    state = create_state(experiment.init_params, optimizer, jax.random.key(0), mesh)
    crops = np.random.default_rng(0).integers(0, 256, (batch_size, side, side, 3), np.uint8)
    batch = sharding.to_global({"image": crops}, mesh)
    step = make_train_step(objective, optimizer, ema_decay=0.9999)
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch, jax.random.key(1)).compile()
    images = jnp.zeros((batch_size, side, side, 3))
    level = jnp.full((batch_size,), 0.5)

    def forward(params: Any, y: jax.Array) -> Any:
        return network.apply({"params": params}, y, level, {"upsampled": images})

    flops = (jax.jit(forward).lower(state.params, images).cost_analysis() or {})["flops"]

    def train_once() -> None:
        nonlocal state
        state, metrics = compiled(state, batch, jax.random.key(1))
        jax.block_until_ready(metrics)

    seconds = timed(train_once, calls)
    step_peak = peak_bytes()
    params = state.params
    del state
    gc.collect()
    sampling = Sampling("dpmpp_2m", SAMPLER_STEPS)
    schedule = sampling.grid(objective.schedule)

    @jax.jit
    def generate(params: Any, key: jax.Array) -> jax.Array:
        return sample(
            lambda y, gamma, cond: network.apply({"params": params}, y, gamma, cond),
            key,
            {"upsampled": images},
            shape=images.shape,
            schedule=schedule,
            solver=sampling.make_solver(),
            prediction=objective.prediction,
            space=objective.space,
        ).image

    sampling_seconds = timed(lambda: generate(params, jax.random.key(2)).block_until_ready(), calls)
    peak = peak_flops(jax.devices()[0].device_kind)
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "forward_gflops_an_image": flops / batch_size / 1e9,
        "step_ms": 1e3 * seconds,
        "images_per_second": batch_size / seconds,
        "mfu": 3 * flops / seconds / peak if peak else None,
        "peak_gib": step_peak / 2**30,
        "sampling_images_per_second": batch_size / sampling_seconds,
        "sampling_ms_a_step": 1e3 * sampling_seconds / SAMPLER_STEPS,
    }


def measure_torch(network: Any, batch_size: int, side: int, calls: int) -> dict[str, Any]:
    """The PyTorch network: bfloat16 autocast, channels last, fused Adam, moving average, torch.compile."""
    import torch
    from torch_unet import UNet

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    fields = ("channels", "multipliers", "num_blocks", "attention_levels", "dropout")
    model = UNet(**{name: getattr(network, name) for name in fields})
    model = model.to(device, memory_format=torch.channels_last)
    parameters = list(model.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.Adam(parameters, 1e-4, fused=device == "cuda")
    image = torch.randn(batch_size, 3, side, side, device=device).to(memory_format=torch.channels_last)
    gamma = torch.full((batch_size,), 0.5, device=device)
    call = torch.compile(model) if device == "cuda" else model

    def predict() -> Any:
        with torch.autocast(device, dtype=torch.bfloat16):
            return call(image, image, gamma)

    def train_once() -> None:
        (predict().float() - image).abs().mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(average, parameters, 1e-4)
        if device == "cuda":
            torch.cuda.synchronize()

    def forward_once() -> None:
        with torch.no_grad():
            predict()
        if device == "cuda":
            torch.cuda.synchronize()

    seconds = timed(train_once, calls)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "step_ms": 1e3 * seconds,
        "images_per_second": batch_size / seconds,
        "peak_gib": peak,
        "sampling_ms_a_step": 1e3 * timed(forward_once, calls),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="+", metavar="CONFIG:BATCH")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--calls", type=int, default=CALLS, help="timed calls (default: %(default)s)")
    parser.add_argument(
        "--torch", action="store_true", help="time the PyTorch network too (layout 'biggan' only)"
    )
    parser.add_argument("--no-remat", action="store_true", help="keep activations: faster, needs more memory")
    args = parser.parse_args()
    device = jax.devices()[0]
    report = {"device": device.device_kind, "platform": device.platform, "jax": jax.__version__, "rows": []}
    for item in args.configs:
        path, _, batch_size = item.rpartition(":")
        experiment = read(load_config(path))
        if args.no_remat:
            network = dataclasses.replace(experiment.objective.network, remat=False, parent=None)
            objective = dataclasses.replace(experiment.objective, network=network)
            experiment = dataclasses.replace(experiment, objective=objective)
        row = {"config": path, "batch_size": int(batch_size), "remat": experiment.objective.network.remat}
        row["jax"] = measure_jax(experiment, int(batch_size), args.calls)
        network = experiment.objective.network
        if args.torch and network.layout == "biggan":
            row["torch"] = measure_torch(
                network, int(batch_size), experiment.config["data"]["crop"], args.calls
            )
        print(json.dumps(row), flush=True)
        report["rows"].append(row)
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        jax.clear_caches()
        gc.collect()


if __name__ == "__main__":
    main()
