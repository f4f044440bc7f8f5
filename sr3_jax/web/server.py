"""The HTTP server of `sr3 web`: private files, limits, headers, and who may connect."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import signal
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sr3_jax.errors import UserError
from sr3_jax.image_io.errors import printable, reason
from sr3_jax.storage import try_lock

_PREFIX = "sr3-web-"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Callable[[], Awaitable[Message]], Send], Awaitable[None]]


@dataclass(frozen=True)
class Site:
    """What the page offers, and to whom.

    Attributes:
        models: the name that the page shows, and what `sr3_jax.load` takes; the first is the default.
        host, port: to listen on; port 0 for a free one.
        users: (name, password) of those who may log in; empty for no log-in.
        queue: requests that may wait.
        max_megapixels, max_megabytes: of an uploaded image.
        workdir: of a training run to show.
        evaluation: folder of an evaluation to show.
    """

    models: Mapping[str, str]
    host: str = "127.0.0.1"
    port: int = 7860
    users: tuple[tuple[str, str], ...] = ()
    queue: int = 16
    max_megapixels: float = 64.0
    max_megabytes: float = 256.0
    workdir: Path | None = None
    evaluation: Path | None = None

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        return self.host in LOOPBACK


def serve(site: Site, *, on_start: Callable[[str], object] = lambda address: None) -> None:
    """Serve the page until SIGINT or SIGTERM.

    Args:
        on_start: gets the address as soon as the server listens.

    Raises:
        UserError: the address cannot be used, or a folder to show is not what it should be.
    """
    if site.workdir is not None:
        check_workdir(site.workdir)
    with _listen(site.host, site.port) as listener, private_folder() as root:
        _configure_gradio(root)
        import uvicorn

        from sr3_jax.web.jobs import Device

        device = Device(site.models, max_megapixels=site.max_megapixels)
        app = _application(site, device, root)
        config = uvicorn.Config(
            app, log_level="error", timeout_graceful_shutdown=1, access_log=False, server_header=False
        )
        host = f"[{site.host}]" if ":" in site.host else site.host
        on_start(f"http://{host}:{listener.getsockname()[1]}")
        # uvicorn ends at these signals, and raises them again for the handlers that it found.
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            with suppress(KeyboardInterrupt):
                uvicorn.Server(config).run(sockets=[listener])
        finally:
            device.close()
            signal.signal(signal.SIGTERM, before)


def check_workdir(workdir: Path) -> None:
    """UserError unless this is a folder. The run in it may start later."""
    if not workdir.is_dir():
        raise UserError(f"--workdir={printable(workdir)} is not a folder: give the workdir of a training run")


def check_extra() -> None:
    """UserError if the extra is not installed."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError(
            "the page needs the extra sr3_jax[web]: pip install 'sr3_jax[web]', in a clone -e '.[web]'"
        )


def _configure_gradio(root: Path) -> None:
    """Settings that Gradio reads when it is imported: no reports to its makers, and files in our folder only."""
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(root),
        "GRADIO_SSR_MODE": "False",
        "GRADIO_MCP_SERVER": "False",
        "GRADIO_SHARE": "False",
        "GRADIO_ALLOWED_PATHS": "",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def _application(site: Site, device: Any, root: Path) -> App:
    import fastapi
    import gradio as gr

    from sr3_jax.web.monitor import evaluation_tab, training_tab
    from sr3_jax.web.page import upscale_tab

    with gr.Blocks(
        title="sr3", analytics_enabled=False, fill_width=True, delete_cache=(3600, 24 * 3600)
    ) as blocks:
        gr.HTML("<h1>sr3</h1><p>Image super-resolution by iterative refinement</p>", elem_id="title")
        with gr.Tabs():
            with gr.Tab("Upscale"):
                upscale_tab(device, root, blocks)
            if site.workdir is not None:
                with gr.Tab("Training run"):
                    training_tab(site.workdir, blocks)
            if site.evaluation is not None:
                with gr.Tab("Evaluation"):
                    evaluation_tab(site.evaluation)
    blocks.queue(max_size=site.queue, default_concurrency_limit=4)
    fonts = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(
        primary_hue="blue", neutral_hue="gray", font=fonts, font_mono=["ui-monospace", "monospace"]
    )
    app = gr.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        blocks,
        path="/",
        server_name=site.host,
        server_port=site.port,
        footer_links=["api"],
        run_history=False,
        auth=[*site.users] or None,
        show_error=False,  # texts of unexpected errors may have paths
        max_file_size=int(site.max_megabytes * 1e6),
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        theme=theme,
        css_paths=[Path(__file__).with_name("page.css")],
    )
    return guarded(app, hosts=LOOPBACK if site.is_local else ())


_HEADERS = {
    # The browser itself refuses to load or to report anything from elsewhere. Gradio needs inline scripts and eval.
    "content-security-policy": "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'self'; "
    "form-action 'self'; base-uri 'self'; object-src 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def guarded(app: App, *, hosts: Sequence[str]) -> App:
    """An ASGI application that refuses requests for other host names and adds headers to all answers.

    Args:
        hosts: names by which the server may be called, against pages of other sites whose name resolves to this
            machine; empty for any.
    """

    async def call(scope: Message, receive: Callable[[], Awaitable[Message]], send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                ours = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                theirs = [
                    pair for pair in message.get("headers", []) if pair[0].lower().decode() not in _HEADERS
                ]
                message["headers"] = [*theirs, *ours]
            await send(message)

        if scope["type"] == "http" and hosts:
            named = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
            if named.rpartition(":")[0].strip("[]") not in hosts and named.strip("[]") not in hosts:
                start = {
                    "type": "http.response.start",
                    "status": 421,
                    "headers": [(b"content-type", b"text/plain")],
                }
                await send_with_headers(start)
                await send({"type": "http.response.body", "body": b"This server is for this machine only.\n"})
                return
        await app(scope, receive, send_with_headers)

    return call


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens. UserError if the address is unknown or in use."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        fix = "use another --port" if not isinstance(error, socket.gaierror) else "use another --host"
        why = error.strerror or reason(error)
        raise UserError(f"{printable(host)} port {port} cannot be used ({why.lower()}): {fix}") from error


@contextmanager
def private_folder() -> Iterator[Path]:
    """A temporary folder of this user only, removed at the end, as are those that killed servers have left."""
    base = Path(tempfile.gettempdir())
    for other in base.glob(f"{_PREFIX}*"):
        with suppress(OSError), (other / ".lock").open("r+b") as file:
            if other.lstat().st_uid == os.getuid() and try_lock(file):
                shutil.rmtree(other, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX)).resolve()  # mode 0700
    try:
        with (folder / ".lock").open("x+b") as file:
            try_lock(file)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_users(file: str) -> tuple[tuple[str, str], ...]:
    """The users of `--auth`: lines USER:PASSWORD of a file; or 'random' for user sr3 with a new password.

    Raises:
        UserError: the file cannot be read, or a line is something else.
    """
    if file == "random":
        return (("sr3", secrets.token_urlsafe(12)),)
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = reason(error) if isinstance(error, OSError) else "is not text"
        raise UserError(f"--auth={printable(file)} {why}: give a file of lines USER:PASSWORD") from error
    users = []
    for number, line in enumerate(lines, 1):
        name, colon, password = line.strip().partition(":")
        if not line.strip():
            continue
        if not (name and colon and len(password) >= 8):
            raise UserError(
                f"--auth={printable(file)} line {number} must be USER:PASSWORD with a password of 8 characters or more"
            )
        users.append((name, password))
    if not users:
        raise UserError(f"--auth={printable(file)} is empty: give a file of lines USER:PASSWORD")
    return tuple(users)
