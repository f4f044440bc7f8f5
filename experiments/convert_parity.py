#!/usr/bin/env python
"""Compare converted networks with their PyTorch code, layer by layer: the tables of docs/how_to/convert_weights.md.

    git clone https://github.com/openai/guided-diffusion
    git clone https://github.com/Janspiry/Image-Super-Resolution-via-Iterative-Refinement sr3_port
    pip install torch
    python experiments/convert_parity.py --guided-diffusion guided-diffusion --sr3-port sr3_port
    python experiments/convert_parity.py --tables-only   # the tables from the committed JSON

Weights are `formula_weights`, the same in both. The small networks take a minute; `--full`, the published
architectures, some minutes and 8 GB. In both, the file that is converted is written by torch.save.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
import sys
import tempfile
import types
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sr3_jax.config.build import build_network, build_schedule
from sr3_jax.config.load import complete
from sr3_jax.conversion.convert import convert, tensor_name, to_params
from sr3_jax.diffusion import solvers
from sr3_jax.image_ops import upsample

ROOT = Path(__file__).resolve().parent.parent
NUMBERS, PAGE = (
    ROOT / "docs" / "how_to" / "convert_weights.json",
    ROOT / "docs" / "how_to" / "convert_weights.md",
)
STEPS = (0, 1, 500, 999)  # of the images of the small networks, one each
TINY_SIDE = 16
FLAGS = {
    "adm_64_256": dict(large_size=256, small_size=64, num_heads=4, num_head_channels=-1, attention="32,16,8"),
    "adm_128_512": dict(large_size=512, small_size=128, num_heads=4, num_head_channels=64, attention="32,16"),
}
JSONS = ("sr_sr3_16_128", "sr_sr3_64_512")
TINY: dict[str, dict[str, Any]] = {
    "adm, 4 heads": {
        "network": "adm",
        "channels": 32,
        "multipliers": (1, 2),
        "num_blocks": (1, 1),
        "attention_levels": (1,),
        "heads": 4,
        "film": True,
        "num_classes": 5,
        "learned_variance": True,
    },
    "adm, heads of 16 channels, no FiLM": {
        "network": "adm",
        "channels": 32,
        "multipliers": (1, 2),
        "num_blocks": (2, 2),
        "attention_levels": (0, 1),
        "head_channels": 16,
    },
    "sr3_port": {
        "network": "sr3_port",
        "channels": 16,
        "multipliers": (1, 2),
        "num_blocks": (2, 2),
        "attention_levels": (1,),
        "norm_groups": 8,
    },
}


def formula_weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 values of a tensor of a PyTorch state dict, from its name and shape alone."""
    index = np.arange(math.prod(shape), dtype=np.int64) % 10007
    values = np.sin(0.37 * index**2 + zlib.crc32(name.encode()) % 1000)
    if len(shape) > 1:
        return (values * math.sqrt(2 / math.prod(shape[1:]))).reshape(shape).astype(np.float32)
    return (0.1 * values + (1.0 if name.endswith(NORM_WEIGHTS) else 0.0)).astype(np.float32)


NORM_WEIGHTS = (
    *("in_layers.0.weight", "out_layers.0.weight", "out.0.weight", "1.norm.weight", "2.norm.weight"),
    *("block.0.weight", "attn.norm.weight"),
)


def formula_inputs(batch: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """y_t [B,side,side,3] and a low-res image [B,side/4,side/4,3], float32."""
    y_t = np.sin(np.arange(batch * side * side * 3) ** 2 * 0.11).reshape(batch, side, side, 3) * 1.5
    small = side // 4
    low_res = np.cos(np.arange(batch * small * small * 3) ** 2 * 0.13).reshape(batch, small, small, 3)
    return y_t.astype(np.float32), low_res.astype(np.float32)


def gammas(config: Mapping[str, Any], steps: tuple[int, ...]) -> np.ndarray:
    """[B] float32, gamma of steps of a config's schedule."""
    return build_schedule(config["diffusion"]).gamma[1:][list(steps)]


def ours(params: Any, config: Mapping[str, Any], y_t: Any, gamma: Any, cond: Any) -> dict[str, np.ndarray]:
    """The output of every layer at the top of our network by the name of the PyTorch module, and the 'prediction'."""
    network = build_network(config["model"])

    @jax.jit
    def run(params: Any, y_t: Any, gamma: Any, cond: Any) -> Any:
        return network.apply(
            {"params": params}, y_t, gamma, cond, capture_intermediates=True, mutable=["intermediates"]
        )

    prediction, state = run(params, y_t, gamma, cond)
    found = {}
    for name, value in state["intermediates"].items():
        if name != "__call__":
            module = tensor_name(config["model"]["network"], f"{name}.kernel").removesuffix(".weight")
            found[module] = np.asarray(value["__call__"][0])
    return found | {"prediction": np.asarray(prediction)}


def theirs(network: Any, names: set[str], call: Callable[[], Any]) -> dict[str, np.ndarray]:
    """The same of a PyTorch module, channels last."""
    import torch

    found: dict[str, np.ndarray] = {}

    def channels_last(tensor: Any) -> np.ndarray:
        array = tensor.detach().numpy()
        return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array.reshape(len(array), -1)

    hooks = [
        module.register_forward_hook(
            lambda _, inputs, output, name=name: found.__setitem__(name, channels_last(output))
        )
        for name, module in network.named_modules()
        if name in names
    ]
    with torch.no_grad():
        found["prediction"] = channels_last(call())
    for hook in hooks:
        hook.remove()
    return found


def compare(mine: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """One row for each layer: the maximum difference and the maximum value, in the order of the computation."""
    if set(mine) != set(other):
        raise SystemExit(f"layers differ: {sorted(set(mine) ^ set(other))}")
    return [
        {
            "layer": name,
            "difference": float(np.max(np.abs(mine[name] - value))),
            "value": float(np.max(np.abs(value))),
        }
        for name, value in other.items()
    ]


def fill(network: Any) -> None:
    """Give a PyTorch module the weights of the formula."""
    import torch

    state = {
        name: torch.from_numpy(formula_weights(name, tuple(tensor.shape)))
        for name, tensor in network.state_dict().items()
    }
    network.load_state_dict(state)
    network.eval()


def import_adm(folder: Path) -> Any:
    """The modules of guided-diffusion, without its requirements MPI and blobfile."""
    package = types.ModuleType("guided_diffusion")
    package.__path__ = [str(folder / "guided_diffusion")]
    sys.modules["guided_diffusion"] = package
    return package


def import_port(folder: Path) -> Any:
    """The port's module of the network."""
    sys.path.insert(0, str(folder / "model" / "sr3_modules"))
    return importlib.import_module("unet")


def adm_network(model: Mapping[str, Any], side: int) -> Any:
    """Their network with the fields of our config."""
    unet = importlib.import_module("guided_diffusion.unet")
    return unet.SuperResModel(
        image_size=side,
        in_channels=3,
        model_channels=model["channels"],
        out_channels=6 if model["learned_variance"] else 3,
        num_res_blocks=model["num_blocks"][0],
        attention_resolutions=tuple(2**level for level in model["attention_levels"]),
        channel_mult=model["multipliers"],
        num_classes=model["num_classes"] or None,
        num_heads=model["heads"],
        num_head_channels=model["head_channels"] or -1,
        use_scale_shift_norm=model["film"],
        resblock_updown=True,
    )


def port_network(module: Any, model: Mapping[str, Any], side: int) -> Any:
    """Their network with the fields of our config."""
    return module.UNet(
        in_channel=6,
        inner_channel=model["channels"],
        norm_groups=model["norm_groups"],
        channel_mults=model["multipliers"],
        attn_res=[side // 2**level for level in model["attention_levels"]],
        res_blocks=model["num_blocks"][0],
        image_size=side,
    )


def call_both(
    network: Any, params: Any, config: Mapping[str, Any], *, side: int, steps: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Run both networks on the formula's inputs at these steps, and compare them."""
    import torch

    y_t, low_res = formula_inputs(len(steps), side)
    gamma = gammas(config, steps)
    cond = {"upsampled": np.asarray(upsample(low_res, 4, config["data"]["upsampling"]))}
    labels = np.arange(len(steps), dtype=np.int32)
    if config["model"]["num_classes"]:
        cond["label"] = labels
    mine = ours(params, config, y_t, jnp.asarray(gamma), cond)

    def nchw(array: np.ndarray) -> Any:
        return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))

    def call() -> Any:
        if config["model"]["network"] == "sr3_port":
            inputs = torch.cat([nchw(cond["upsampled"]), nchw(y_t)], dim=1)
            return network(inputs, torch.from_numpy(np.sqrt(gamma)).reshape(-1, 1))
        more = {"y": torch.from_numpy(labels).long()} if config["model"]["num_classes"] else {}
        return network(nchw(y_t), torch.tensor(steps), low_res=nchw(low_res), **more)

    return compare(mine, theirs(network, set(mine), call))


def saved(network: Any, folder: Path, prefix: str = "") -> Path:
    """The file that torch.save writes for a module."""
    import torch

    path = folder / "weights.pt"
    torch.save({f"{prefix}{name}": tensor for name, tensor in network.state_dict().items()}, path)
    return path


def compare_tiny(port: Any) -> dict[str, Any]:
    """The rows of the small networks, and the first values of their predictions for tests/test_convert.py."""
    found: dict[str, Any] = {}
    for title, model in TINY.items():
        adm = model["network"] == "adm"
        config = complete(
            {
                "model": model,
                "diffusion": {"num_steps": 1000, "beta_start": 1e-4, "beta_end": 0.02},
                "data": {"upsampling": "bilinear" if adm else "bicubic"},
            }
        )
        network = (
            adm_network(config["model"], TINY_SIDE) if adm else port_network(port, config["model"], TINY_SIDE)
        )
        fill(network)
        arrays = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
        params = to_params(arrays, config, title)
        rows = call_both(network, params, config, side=TINY_SIDE, steps=STEPS)
        found[title] = {"rows": rows, "parameters": sum(array.size for array in arrays.values())}
        found[title]["golden"] = golden(params, config)
    return found


def golden(params: Any, config: Mapping[str, Any]) -> list[float]:
    """Some values of a prediction, which `call_both` has compared with theirs."""
    y_t, low_res = formula_inputs(len(STEPS), TINY_SIDE)
    cond = {"upsampled": upsample(low_res, 4, config["data"]["upsampling"])}
    if config["model"]["num_classes"]:
        cond["label"] = jnp.arange(len(STEPS))
    network = build_network(config["model"])
    prediction = jax.jit(network.apply)({"params": params}, y_t, jnp.asarray(gammas(config, STEPS)), cond)
    return [round(float(value), 5) for value in np.asarray(prediction).ravel()[:: prediction.size // 12 + 1]]


def compare_full(guided: Path, folder: Path, port: Any, port_folder: Path) -> dict[str, Any]:
    """The rows of the published architectures, whose files are converted as a user does it."""
    create = importlib.import_module("guided_diffusion.script_util").sr_create_model
    found: dict[str, Any] = {}
    for name, flags in FLAGS.items():
        flags = dict(flags)
        network = create(
            **{"attention_resolutions": flags.pop("attention"), **flags},
            class_cond=True,
            learn_sigma=True,
            use_checkpoint=False,
            num_channels=192,
            num_res_blocks=2,
            dropout=0.0,
            num_heads_upsample=-1,
            use_scale_shift_norm=True,
            resblock_updown=True,
            use_fp16=False,
        )
        fill(network)
        converted = convert(saved(network, folder), variance="learned")
        count = sum(leaf.size for leaf in jax.tree.leaves(converted.params))
        rows = call_both(
            network, converted.params, converted.config, side=flags["large_size"] // 2, steps=(500,)
        )
        found[name] = {"rows": rows, "parameters": count, "side": flags["large_size"] // 2}
        print(name, count, max(row["difference"] for row in rows), flush=True)
    for name in JSONS:
        file = port_folder / "config" / f"{name}.json"
        given = json.loads(re.sub(r"//[^\n]*", "", file.read_text()))["model"]
        unet, side = given["unet"], given["diffusion"]["image_size"]
        network = port.UNet(
            in_channel=6,
            inner_channel=unet["inner_channel"],
            norm_groups=unet.get("norm_groups", 32),
            channel_mults=unet["channel_multiplier"],
            attn_res=unet["attn_res"],
            res_blocks=unet["res_blocks"],
            image_size=side,
        )
        fill(network)
        converted = convert(saved(network, folder, "denoise_fn."), json_file=file)
        count = sum(leaf.size for leaf in jax.tree.leaves(converted.params))
        rows = call_both(network, converted.params, converted.config, side=128, steps=(1000,))
        found[name] = {"rows": rows, "parameters": count, "side": 128}
        print(name, count, max(row["difference"] for row in rows), flush=True)
    return found


def compare_steps() -> list[dict[str, Any]]:
    """One sampling step with a learned variance: their mean and standard deviation against `ancestral_learned`."""
    import torch

    gd = importlib.import_module("guided_diffusion.gaussian_diffusion")
    diffusion = gd.GaussianDiffusion(
        betas=gd.get_named_beta_schedule("linear", 1000),
        model_mean_type=gd.ModelMeanType.EPSILON,
        model_var_type=gd.ModelVarType.LEARNED_RANGE,
        loss_type=gd.LossType.MSE,
    )
    config = complete({"diffusion": {"num_steps": 1000, "beta_start": 1e-4, "beta_end": 0.02}})
    row = solvers.ancestral_learned().coefficients(build_schedule(config["diffusion"]))
    y_t, _ = formula_inputs(1, 8)
    output = np.concatenate([np.sin(3 * y_t), np.cos(2 * y_t)], axis=-1)
    found = []
    for t in (1, 2, 500, 999):
        torch_output = torch.from_numpy(output.transpose(0, 3, 1, 2))
        wanted = diffusion.p_mean_variance(
            lambda *_, output=torch_output, **__: output,
            torch.from_numpy(y_t.transpose(0, 3, 1, 2)),
            torch.tensor([t]),
        )
        at = jax.tree.map(lambda column, t=t: column[-1 - t], row)
        eps, v = np.split(output, 2, axis=-1)
        y0 = np.clip((y_t - np.sqrt(1 - at.gamma) * eps) / np.sqrt(at.gamma), -1, 1)
        mean = at.from_y0 * y0 + at.from_y * y_t
        deviation = at.noise * np.exp(at.narrowing * (1 - (v + 1) / 2))
        their_deviation = np.exp(0.5 * wanted["log_variance"].numpy().transpose(0, 2, 3, 1))
        found.append(
            {
                "step": t,
                "mean": float(np.max(np.abs(mean - wanted["mean"].numpy().transpose(0, 2, 3, 1)))),
                "deviation": float(np.max(np.abs(deviation / their_deviation - 1))),
            }
        )
    return found


def write_tables() -> None:
    """Replace the tables between the marks of the page."""
    numbers = json.loads(NUMBERS.read_text())
    lines = [
        "| network | parameters | images | layers | largest difference | in layer | largest value of the prediction |"
    ]
    lines += ["|---|---:|---:|---:|---:|---|---:|"]
    for title, entry in {**numbers["tiny"], **numbers.get("full", {})}.items():
        worst = max(entry["rows"], key=lambda row: row["difference"])
        prediction = entry["rows"][-1]["value"]
        count, side = (1, entry["side"]) if "side" in entry else (len(STEPS), TINY_SIDE)
        lines.append(
            f"| {title} | {entry['parameters']:,} | {count} of {side}x{side} | {len(entry['rows'])} | "
            f"{worst['difference']:.1e} | `{worst['layer']}` | {prediction:.1f} |"
        )
    text = PAGE.read_text()
    pattern = re.compile(r"(<!-- parity:begin -->\n).*?(<!-- parity:end -->)", re.DOTALL)
    PAGE.write_text(pattern.sub(lambda match: match[1] + "\n".join(lines) + "\n" + match[2], text))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--guided-diffusion", type=Path)
    parser.add_argument("--sr3-port", type=Path)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--tables-only", action="store_true")
    args = parser.parse_args()
    if not args.tables_only:
        if args.guided_diffusion is None or args.sr3_port is None:
            parser.error("--guided-diffusion and --sr3-port are needed")
        import_adm(args.guided_diffusion)
        port = import_port(args.sr3_port)
        numbers = json.loads(NUMBERS.read_text()) if NUMBERS.is_file() else {}
        numbers |= {"tiny": compare_tiny(port), "steps": compare_steps()}
        if args.full:
            with tempfile.TemporaryDirectory() as folder:
                numbers["full"] = compare_full(args.guided_diffusion, Path(folder), port, args.sr3_port)
        NUMBERS.write_text(json.dumps(numbers, indent=1) + "\n")
    write_tables()


if __name__ == "__main__":
    main()
