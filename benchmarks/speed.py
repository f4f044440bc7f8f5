"""Times training steps and sampling of presets next to PyTorch networks of the same layers and parameters.

    python benchmarks/speed.py -o docs/speed.json faces_16_128:32 photos_4x:256     # PRESET:BATCH on a GPU
    python benchmarks/speed.py -o docs/speed.json --small                           # all presets, scaled down for a CPU
    python -m experiments.pages speed                                               # writes docs/speed.md

Both do the same work with Adam, clipping and a moving average of the weights, except that the step of sr3_jax also
makes the low-res images. Calls alternate, in one process, and each ratio is of two neighboring calls, so that a slow
moment of the machine falls on both. PyTorch has what a careful user would turn on: channels_last; on a GPU also
torch.compile, cuDNN autotuning, bfloat16 autocast and fused Adam.

`--small` leaves what a layer is, and reduces how many there are: at most 4 levels with one block each (attention at the
lowest if it falls off), level 0 at most 32 channels wide, crops of at most 64 pixels. Nothing is rematerialized.

Install PyTorch too: pip install torch.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

# PyTorch shares the device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch_unet import UNet as TorchUNet

from sr3_jax.config import load_config
from sr3_jax.config.load import preset_names
from sr3_jax.diffusion.sampler import sample
from sr3_jax.distributed import sharding
from sr3_jax.nn.unet import apply_unet
from sr3_jax.sampling import Sampling
from sr3_jax.train.experiment import Experiment, read
from sr3_jax.train.state import create_state
from sr3_jax.train.step import jit_train_step, make_train_step

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16 FLOP/s, from the data sheets
SAMPLING_STEPS = 4
EMA_DECAY = 0.9999
CUDA = torch.cuda.is_available()


def experiment(name: str, *, dtype: str, small: bool, remat: bool | None) -> Experiment:
    """A preset with Adam and clean low-res images, perhaps scaled down."""
    config = load_config(name)
    config["optim"]["optimizer"], config["stage"]["size"] = "adam", 0
    config["data"] |= {"degradation": "clean"}
    model = config["model"]
    model["dtype"] = dtype
    if remat is not None:
        model["remat"] = remat
    if small:
        levels = min(4, len(model["multipliers"]))
        attended = tuple(level for level in model["attention_levels"] if level < levels)
        efficient = model["layout"] == "efficient"
        model |= {
            "channels": min(32, model["channels"]),
            "multipliers": model["multipliers"][:levels],
            "num_blocks": model["num_blocks"] if efficient else (1,) * levels,
            "attention_levels": attended or (levels - 1,) * bool(model["attention_levels"]),
            "head_channels": min(16, model["head_channels"]),
            "remat": False,  # as in PyTorch
        }
        side = config["data"]["crop"] // config["data"]["shrink"]
        multiple = math.lcm(model["patch"] * 2 ** (levels - 1), config["data"]["scale"])
        config["data"] |= {"shrink": 1, "crop": min(side, 64) // multiple * multiple}
    return read(config)


def jax_calls(run: Experiment, batch_size: int) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """What to time, and facts about the network."""
    objective, data = run.objective, run.section("data")
    network, shrink = objective.network, data["shrink"]
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    optimizer = run.optimizer()
    state = create_state(run.init_params, optimizer, jax.random.key(0), mesh)
    side = data["crop"] // shrink
    host = {
        "image": np.random.default_rng(0).integers(0, 256, (batch_size, *[data["crop"]] * 2, 3), np.uint8)
    }
    if network.num_classes:
        host["label"] = np.zeros(batch_size, np.int32)
    batch = sharding.to_global(host, mesh)
    step = jit_train_step(make_train_step(objective, optimizer, ema_decay=EMA_DECAY), state, mesh)
    image = jnp.zeros((batch_size, side, side, 3))
    cond = {"upsampled": image} if network.low_res else {}
    cond |= {"label": batch["label"]} if network.num_classes else {}
    sampling = Sampling("ddim", SAMPLING_STEPS)
    schedule, key = sampling.grid(objective.schedule), jax.random.key(1)

    @jax.jit
    def generate(params: Any) -> jax.Array:
        return sample(
            lambda y, gamma, cond: apply_unet(network, params, y, gamma, cond),
            key,
            cond,
            shape=image.shape,
            schedule=schedule,
            solver=sampling.make_solver(),
            prediction=objective.prediction,
            space=objective.space,
        ).image

    def train_once() -> None:
        nonlocal state
        state, metrics = step(state, batch, key)
        jax.block_until_ready(metrics)

    level = jnp.full((batch_size,), 0.5)
    lowered = jax.jit(lambda params: apply_unet(network, params, image, level, cond)).lower(state.params)
    facts = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "forward_gflops_per_image": (lowered.cost_analysis() or {}).get("flops", 0.0) / batch_size / 1e9,
        "side": side,
        "remat": network.remat,
    }
    return {
        "step": train_once,
        "sampling": lambda: generate(state.params).block_until_ready(),
    }, facts


def torch_calls(
    run: Experiment, batch_size: int, side: int, dtype: str
) -> tuple[dict[str, Callable[[], Any]], int]:
    """The same in PyTorch, and the number of parameters."""
    network, device = run.objective.network, "cuda" if CUDA else "cpu"
    torch.backends.cudnn.benchmark = True
    model = TorchUNet(network).to(device, memory_format=torch.channels_last)
    parameters = list(model.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.Adam(parameters, 1e-4, fused=CUDA, foreach=not CUDA)
    image = torch.randn(batch_size, 3, side, side, device=device).to(memory_format=torch.channels_last)
    cond = (
        image if network.low_res else None,
        torch.zeros(batch_size, dtype=torch.long, device=device) if network.num_classes else None,
    )
    gammas = torch.linspace(0.1, 0.9, batch_size, device=device)
    call = torch.compile(model) if CUDA else model

    def predict(y: Any, gamma: Any) -> Any:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            return call(y, gamma, *cond)

    def train_once() -> None:
        eps, level = torch.randn_like(image), gammas[:, None, None, None]
        (predict(level.sqrt() * image + (1 - level).sqrt() * eps, gammas) - eps).abs().mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(average, parameters, 1 - EMA_DECAY)
        wait()

    def generate() -> None:
        y = torch.randn_like(image)
        levels = torch.linspace(0.01, 0.99, SAMPLING_STEPS + 1, device=device)
        with torch.no_grad():
            for now, then in itertools.pairwise(levels):
                eps = predict(y, now.expand(batch_size))
                y0 = ((y - (1 - now).sqrt() * eps) / now.sqrt()).clamp(-1, 1)
                y = then.sqrt() * y0 + (1 - then).sqrt() * eps
        wait()

    def wait() -> None:
        if CUDA:
            torch.cuda.synchronize()

    model.eval()
    return {
        "step": lambda: (model.train(), train_once()),
        "sampling": lambda: (model.eval(), generate()),
    }, sum(parameter.numel() for parameter in parameters)


def compare(
    ours: Callable[[], Any], theirs: Callable[[], Any], calls: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """Medians of both in milliseconds, and the quartiles of PyTorch's time divided by ours, of neighboring calls."""
    times: dict[Callable[[], Any], list[float]] = {ours: [], theirs: []}
    ours()  # compiles
    for _ in range(3 if CUDA else 1):
        theirs()
    for index in range(calls):
        for call in (ours, theirs) if index % 2 else (theirs, ours):
            start = clock()
            call()
            times[call].append(clock() - start)
    ratios = [theirs / ours for ours, theirs in zip(times[ours], times[theirs], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if calls > 1 else ratios * 3
    return {
        "jax_ms": 1e3 * statistics.median(times[ours]),
        "torch_ms": 1e3 * statistics.median(times[theirs]),
        "ratio": middle,
        "quartiles": [low, high],
        "calls": calls,
    }


def measure(name: str, batch_size: int, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the JSON file."""
    run = experiment(name, dtype=dtype, small=args.small, remat=False if args.no_remat else None)
    ours, facts = jax_calls(run, batch_size)
    theirs, parameters = torch_calls(run, batch_size, facts["side"], dtype)
    if parameters != facts["parameters"]:
        raise SystemExit(f"{name}: {facts['parameters']:,} parameters, but {parameters:,} in PyTorch")
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    row: dict[str, Any] = {
        "preset": name,
        "batch_size": batch_size,
        "dtype": dtype,
        "small": args.small,
    } | facts
    for part in ours:
        row[part] = compare(ours[part], theirs[part], args.calls, clock)
    kind = jax.devices()[0].device_kind
    peak = next((value for chip, value in PEAK.items() if chip in kind), None)
    if peak:  # the network's own FLOPs: three times those of the forward pass, without rematerialization
        flops = 3e9 * facts["forward_gflops_per_image"] * batch_size
        row["mfu"] = flops / (row["step"]["jax_ms"] / 1e3) / peak
    if CUDA:
        stats = jax.devices()[0].memory_stats() or {}
        row["peak_gib"] = stats.get("peak_bytes_in_use", 0) / 2**30
        row["torch_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def device_name() -> str:
    """The GPU, or the model of the CPU."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return str(device.device_kind)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def provenance(clock: str, script: str = "benchmarks/speed.py") -> dict[str, Any]:
    """Where and how a row was measured."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": device_name(),
        "platform": jax.devices()[0].platform,
        "cores": cores,
        "clock": clock,
        "versions": {"jax": jax.__version__, "torch": torch.__version__},
        "date": date.today().isoformat(),
        "command": "python " + shlex.join([script, *sys.argv[1:]]),
    }


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two rows measure the same thing."""
    return all(
        one[key] == other[key] for key in ("preset", "batch_size", "dtype", "small", "device", "remat")
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("presets", nargs="*", metavar="PRESET[:BATCH]", help="(default: all, batches of 4)")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="JSON file; other rows in it are kept"
    )
    parser.add_argument("--calls", type=int, default=9, help="timed pairs of calls (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        action="append",
        choices=("float32", "bfloat16"),
        help="may be repeated (default: the preset's)",
    )
    parser.add_argument("--small", action="store_true", help="scale the presets down for a CPU")
    parser.add_argument("--no-remat", action="store_true", help="keep activations: faster, needs more memory")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: time of this process on one core, for a machine that is shared (default: %(default)s)",
    )
    args = parser.parse_args(arguments)
    if args.clock == "cpu":
        if CUDA or provenance(args.clock)["cores"] != 1:
            parser.error("--clock cpu counts all threads: run on one core of a CPU, with taskset -c 0")
        torch.set_num_threads(1)
    names = args.presets or [name for name in preset_names() if not name.startswith("cascade_")]
    for item in names:
        name, _, batch_size = item.partition(":")
        for dtype in args.dtype or [load_config(name)["model"]["dtype"]]:
            row = measure(name, int(batch_size or 4), dtype, args) | provenance(args.clock)
            print(json.dumps(row), flush=True)
            content = json.loads(args.output.read_text()) if args.output.exists() else {"rows": []}
            content["rows"] = [other for other in content["rows"] if not same(other, row)] + [row]
            args.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            jax.clear_caches()
            gc.collect()


if __name__ == "__main__":
    main()
