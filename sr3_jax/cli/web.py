"""Serve a page that upscales images in the browser, and shows a training run and an evaluation.

Needs the extra sr3_jax[web]. Only this machine can connect, unless --allow-remote is given, which requires --auth.
Outputs are the same bytes as those of `sr3 upscale`. Uploads and outputs are in a private temporary folder, which is
removed at the end.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sr3_jax.cli._options import count, local_path, positive


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**16:
        raise argparse.ArgumentTypeError(f"{value} is out of range: a port is from 0 to 65535")
    return value


_port.__name__ = "integer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", action="append", default=[], metavar="PATH_OR_NAME",
        help="offer this workdir, .safetensors file or shipped model first; may be repeated (default: photo_4x)",
    )  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", type=_port, default=7860, metavar="N", help="default: %(default)s; 0: a free one"
    )
    parser.add_argument(
        "--allow-remote", action="store_true", help="let other machines connect to --host; requires --auth"
    )
    parser.add_argument(
        "--auth", metavar="FILE",
        help="require a log-in: a file of lines USER:PASSWORD, or 'random' to print a new password at the start",
    )  # fmt: skip
    parser.add_argument(
        "--workdir",
        type=local_path,
        metavar="DIR",
        help="show this training run: metrics and samples, refreshed",
    )
    parser.add_argument(
        "--evaluation", type=local_path, metavar="DIR", help="show this folder of sr3 evaluate"
    )
    parser.add_argument(
        "--device", choices=("cpu", "gpu", "tpu"), help="where to compute (default: the best one present)"
    )
    parser.add_argument(
        "--queue", type=count, default=16, metavar="N", help="requests that may wait (default: %(default)s)"
    )
    parser.add_argument(
        "--max-megapixels", type=positive, default=64.0, metavar="N",
        help="refuse images above N megapixels (default: 64)",
    )  # fmt: skip
    parser.add_argument(
        "--max-megabytes", type=positive, default=256.0, metavar="N",
        help="refuse files above N megabytes (default: 256)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; exit code 0 then."""
    import logging
    import os

    from sr3_jax.errors import UserError
    from sr3_jax.web.server import Site, check_extra, read_users, serve

    check_extra()
    if args.device:
        os.environ["JAX_PLATFORMS"] = {"gpu": "cuda"}.get(args.device, args.device)
    users = () if args.auth is None else read_users(args.auth)
    site = Site(
        models=_offered(args.model),
        host=args.host,
        port=args.port,
        users=users,
        queue=args.queue,
        max_megapixels=args.max_megapixels,
        max_megabytes=args.max_megabytes,
        workdir=args.workdir,
        evaluation=args.evaluation,
    )
    if not site.is_local and not args.allow_remote:
        raise UserError(
            f"--host={args.host} lets other machines connect: add --allow-remote and --auth FILE, or use 127.0.0.1"
        )
    if not site.is_local and not users:
        raise UserError("--allow-remote requires --auth: give a file of lines USER:PASSWORD, or 'random'")
    logging.getLogger("httpx").setLevel(logging.ERROR)

    def started(address: str) -> None:
        print(f"sr3 web: {address} (Ctrl+C to stop)", flush=True)
        if not site.is_local:
            print(
                "Other machines can connect, and passwords and images travel unencrypted: use a trusted network, or a "
                "proxy with TLS.",
                flush=True,
            )
        if args.auth == "random":
            print(f"user {users[0][0]}, password {users[0][1]}", flush=True)

    serve(site, on_start=started)
    return 0


def _offered(given: list[str]) -> dict[str, str]:
    """The models of the page: the given ones, the default and the other shipped ones that upscale."""
    from sr3_jax.cli.models import FOLDER
    from sr3_jax.errors import UserError
    from sr3_jax.inference.loading import load

    offered: dict[str, str] = {}
    for name in given:
        if not load(name).network.low_res:
            raise UserError(f"--model={name} takes no low-res image: use one that upscales")
        label, number = Path(name).name.removesuffix(".safetensors") or name, 2
        while label in offered:
            label, number = f"{Path(name).name} ({number})", number + 1
        offered[label] = name
    shipped = sorted(path.stem for path in FOLDER.glob("photo_*.safetensors"))
    for name in shipped:
        offered.setdefault(name, name)
    return offered
