"""Export a model as one file: .safetensors, its sampling program as .stablehlo, or its denoiser as .onnx.

The suffix of the output chooses the format. `sr3 upscale` and all other commands read .safetensors; the others are for
programs without this package.
"""

from __future__ import annotations

import argparse
from typing import Any

from sr3_jax.cli._options import any_path, count, names

FORMATS = (".safetensors", ".stablehlo", ".onnx")
_DEVICES = "cpu,cuda,tpu"


def size(text: str) -> tuple[int, int]:
    """HxW, two integers of at least 1."""
    height, _, width = text.lower().partition("x")
    return count(height), count(width)


size.__name__ = "size HxW"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model to export, the file to write and what the file is for."""
    parser.add_argument("model", help="a workdir of sr3 train, an exported file or a shipped name")
    parser.add_argument(
        "-o", "--output", required=True, type=any_path, help=f"the file to write: {', '.join(FORMATS)}"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the stored weights, float32 by default (.safetensors, .stablehlo)",
    )
    parser.add_argument(
        "--size", type=size, metavar="HxW", help="of the low-res images; any by default (.stablehlo, .onnx)"
    )
    parser.add_argument(
        "--steps", type=count, help="sampling steps; the model's by default (.stablehlo, .onnx)"
    )
    parser.add_argument("--solver", help="the model's by default (.stablehlo)")
    parser.add_argument(
        "--platforms", type=names, help=f"the devices that run the file, {_DEVICES} by default (.stablehlo)"
    )


def run(args: argparse.Namespace) -> int:
    """Export; exit code 0."""
    from sr3_jax.errors import UserError
    from sr3_jax.inference.export import PLATFORMS, export_onnx, export_stablehlo
    from sr3_jax.inference.loading import load
    from sr3_jax.storage import file_size

    suffix = args.output.suffix
    if suffix not in FORMATS:
        raise UserError(f"-o {args.output} must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    used = {
        ".safetensors": {"dtype"},
        ".stablehlo": {"dtype", "size", "steps", "solver", "platforms"},
        ".onnx": {"size", "steps"},
    }[suffix]
    for option in ("dtype", "size", "steps", "solver", "platforms"):
        if option not in used and getattr(args, option) is not None:
            raise UserError(f"--{option} has no effect on a {suffix} file: omit it")
    platforms = args.platforms or _DEVICES.split(",")
    if not set(platforms) <= set(PLATFORMS):
        raise UserError(f"--platforms={','.join(platforms)} must be of {', '.join(PLATFORMS)}")
    model, dtype = load(args.model), args.dtype or "float32"
    if suffix == ".safetensors":
        _export_safetensors(args, model, dtype)
    else:
        sampling = model.sampling.override(steps=args.steps, solver=args.solver)
        if suffix == ".stablehlo":
            export_stablehlo(
                args.output, model, sampling=sampling, size=args.size, platforms=platforms, dtype=dtype
            )
            print(f"wrote its description to {args.output}.json")
        else:
            export_onnx(args.output, model, sampling=sampling, size=args.size)
    print(f"wrote {model.name} to {args.output}, {file_size(args.output) / 1e6:.2f} MB")
    return 0


def _export_safetensors(args: argparse.Namespace, model: Any, dtype: str) -> None:
    from sr3_jax.inference.sampling_file import copy_sampling, sampling_path
    from sr3_jax.train.weights import export, locate_model, read_export

    export(args.output, model.params, model.config, dtype=dtype)
    written, _ = read_export(args.output)
    if copy_sampling(
        locate_model(args.model), args.output, model.sampling, params=written, name=args.output.name
    ):
        print(f"wrote its sampling settings to {sampling_path(args.output)}")
