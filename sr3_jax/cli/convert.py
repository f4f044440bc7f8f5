"""Convert PyTorch weights of guided-diffusion's upsamplers (ADM) or of the SR3 port by Janspiry.

    sr3 convert 64_256_upsampler.pt -o adm_64_256.safetensors
    sr3 convert I640000_E37_gen.pth --json sr_sr3_16_128.json -o faces.safetensors
    sr3 convert --check adm_64_256.safetensors

The output is a model like any other: every command takes it as --model. No code in the input file is run.
"""

from __future__ import annotations

import argparse

from sr3_jax.cli._options import local_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", type=local_path, help="a .pt, .pth or .safetensors file; with --check, any model"
    )
    parser.add_argument("-o", "--output", type=local_path, help="the .safetensors file to write")
    parser.add_argument(
        "--variance", default="drop", choices=("drop", "learned"),
        help="of ADM: drop the variance that it predicts, or keep it for solver ancestral_learned (default: drop)",
    )  # fmt: skip
    parser.add_argument(
        "--flags", metavar="TEXT",
        help="of ADM: the flags of its training, '--large_size 256 --num_channels 192 ...', as one text (default: "
        "those of the published upsamplers)",
    )  # fmt: skip
    parser.add_argument(
        "--json", type=local_path, metavar="FILE", help="of the SR3 port: the JSON file of its training"
    )
    parser.add_argument(
        "--check", action="store_true",
        help="denoise a bundled photograph, which shows whether weights and settings fit",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Exit code 0; 2 if the model does not denoise."""
    import jax

    from sr3_jax.conversion.check import check_denoising
    from sr3_jax.conversion.convert import convert
    from sr3_jax.errors import UserError
    from sr3_jax.features.weights import read_file
    from sr3_jax.image_io.errors import printable
    from sr3_jax.inference import loading
    from sr3_jax.train.weights import export, locate_model

    if args.output is None and not args.check:
        raise UserError("nothing to do: give -o FILE.safetensors, --check or both")
    if args.output is not None and args.output.suffix != ".safetensors":
        raise UserError(f"-o {args.output} must end in .safetensors")
    if args.output is None and args.file.suffix not in (".pt", ".pth"):
        located = locate_model(args.file)
        model = loading.load(args.file)
        sha256 = "" if located.is_dir() else read_file(located)[1]
    else:
        converted = convert(args.file, variance=args.variance, flags=args.flags, json_file=args.json)
        model, sha256 = (
            loading.from_config(converted.config, converted.params, name=args.file.name),
            converted.sha256,
        )
        for note in converted.notes:
            print(f"note: {note}")
    print(model)
    count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    print(f"{count:,} parameters" + (f", SHA-256 of {printable(args.file)}: {sha256}" if sha256 else ""))
    if args.output is not None:
        export(args.output, model.params, model.config)
        print(f"wrote {printable(args.output)}, {args.output.stat().st_size / 1e6:.2f} MB")
    if args.check:
        checks = check_denoising(model)
        for check in checks:
            verdict = "ok" if check.passed else "worse than the reference"
            print(
                f"log-SNR {check.log_snr:+.0f}: PSNR {check.psnr:.2f} dB after denoising, reference "
                f"{check.reference:.2f} dB: {verdict}"
            )
        if not all(check.passed for check in checks):
            raise UserError(
                f"{printable(args.file)} does not denoise a photograph: check --flags or --json, or download it again"
            )
    return 0
