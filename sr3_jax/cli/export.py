"""Export the EMA weights of a run and its config as one .safetensors file."""

from __future__ import annotations

import argparse

from sr3_jax.cli._options import local_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model to export and the file to write."""
    parser.add_argument("model", help="a workdir of sr3 train, an exported file or a shipped name")
    parser.add_argument(
        "-o", "--output", required=True, type=local_path, help="the .safetensors file to write"
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))


def run(args: argparse.Namespace) -> int:
    """Export; exit code 0."""
    from sr3_jax.errors import UserError
    from sr3_jax.inference.loading import load
    from sr3_jax.inference.sampling_file import copy_sampling, sampling_path
    from sr3_jax.train.weights import export, locate_model, read_export

    if args.output.suffix != ".safetensors":
        raise UserError(f"-o {args.output} must end in .safetensors")
    model = load(args.model)
    export(args.output, model.params, model.config, dtype=args.dtype)
    written, _ = read_export(args.output)
    if copy_sampling(
        locate_model(args.model), args.output, model.sampling, params=written, name=args.output.name
    ):
        print(f"wrote its sampling settings to {sampling_path(args.output)}")
    print(f"wrote {model.name} to {args.output}, {args.output.stat().st_size / 1e6:.2f} MB")
    return 0
