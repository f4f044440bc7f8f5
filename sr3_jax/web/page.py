"""The tab that upscales images, and its endpoint for programs."""

from __future__ import annotations

import secrets
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr

from sr3_jax.errors import UserError
from sr3_jax.files import unique_file_name
from sr3_jax.image_io.image_file import OUTPUT_FORMATS
from sr3_jax.web import views
from sr3_jax.web.jobs import MAX_SAMPLES, Cancelled, Device, Outcome, Output, Progress, Request

_REFRESH = 0.7  # seconds between two looks at the progress
_PRIVATE: dict[str, Any] = {"api_visibility": "private"}
DEVICE_QUEUE: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "device"}

T = TypeVar("T")
Outputs = tuple[Output, ...]
Update = dict[Any, Any]


def _uploads_only(component: gr.File) -> gr.File:
    """Make a component take uploads only. By itself Gradio also downloads from an address that a client names.

    Not a subclass: for those, Gradio writes a stub file next to the module.
    """
    move, move_later = component.move_resource_to_block_cache, component.async_move_resource_to_block_cache

    def check(path: Any) -> None:
        if "://" in str(path):
            raise gr.Error("addresses are not fetched: upload the file", print_exception=False)

    def checked(path: Any) -> str | None:
        check(path)
        return move(path)

    async def checked_later(path: Any) -> str | None:
        check(path)
        return await move_later(path)

    component.move_resource_to_block_cache = checked  # type: ignore[assignment,method-assign]
    component.async_move_resource_to_block_cache = checked_later  # type: ignore[assignment,method-assign]
    return component


def upscale_tab(device: Device, root: Path, blocks: gr.Blocks) -> None:
    """Add the components and events of the tab to `blocks`, inside its context.

    Args:
        root: a private folder for the outputs.
    """
    with gr.Row(elem_id="upscale"):
        with gr.Column(scale=2, min_width=300):
            files = _uploads_only(
                gr.File(file_count="multiple", label="Images to upscale", height=150, elem_id="images")
            )
            model = gr.Dropdown(list(device.names), value=next(iter(device.names)), label="Model")
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, info="same seed, same bytes", min_width=120)
                samples = gr.Number(
                    1, label="Samples", precision=0, info=f"of each image, 1 to {MAX_SAMPLES}", min_width=120
                )
            with gr.Row():
                outscale = gr.Textbox(
                    value="",
                    label="Outscale",
                    placeholder="the model's",
                    info="2, 1.5, 8, ...",
                    min_width=120,
                )
                file_format = gr.Dropdown(
                    [("as the input", ""), *((one, one) for one in OUTPUT_FORMATS)],
                    value="",
                    label="Format",
                    info="of the outputs",
                    min_width=120,
                )
            with gr.Row():
                steps = gr.Textbox(
                    value="", label="Steps", placeholder="the model's", info="more is slower", min_width=120
                )
                denoise = gr.Textbox(
                    value="",
                    label="Denoise",
                    placeholder="the model's",
                    info="0 to 1, robust models",
                    min_width=120,
                )
            with gr.Row():
                go = gr.Button("Upscale", variant="primary", elem_id="go", min_width=120)
                cancel = gr.Button(
                    "Cancel", variant="stop", interactive=False, elem_id="cancel", min_width=120
                )
        with gr.Column(scale=5, min_width=320):
            status = gr.HTML(views.message("Drop an image, or choose a file."), elem_id="status")
            preview = gr.HTML(visible=False, elem_id="preview")
            with gr.Column(visible=False, elem_id="result") as result:
                compare = gr.HTML(elem_id="compare")
                with gr.Row(elem_id="zoom"):
                    zoom = gr.Radio([("whole image", 0), ("100 %", 1), ("400 %", 4)], value=0, label="Zoom")
                    x = gr.Slider(0, 100, 50, step=1, label="Across, %", visible=False, min_width=160)
                    y = gr.Slider(0, 100, 50, step=1, label="Down, %", visible=False, min_width=160)
                gallery = gr.Gallery(
                    label="Outputs",
                    columns=4,
                    height=330,
                    allow_preview=False,
                    visible=False,
                    elem_id="gallery",
                )
                facts = gr.HTML(elem_id="facts")
                downloads = gr.File(
                    label="Download", file_count="multiple", interactive=False, elem_id="files"
                )
                with gr.Row():
                    another = gr.Button("Another sample", elem_id="another", min_width=160)
                    archive = gr.DownloadButton(
                        "Download all (zip)", visible=False, elem_id="zip", min_width=160
                    )
                spread = gr.HTML(visible=False, elem_id="spread")
    outputs = gr.State((), delete_callback=_remove)
    chosen = gr.State(0)
    running: dict[str, Progress] = {}  # by session

    def show(found: Outputs, index: int, zoom_value: int) -> Update:
        output = found[index]
        same = [one for one in found if one.source == output.source]
        known = {
            compare: views.compare(output, zoom=zoom_value, x=0.5, y=0.5),
            facts: views.facts(output),
            spread: gr.HTML(views.spread_view(same) if len(same) > 1 else "", visible=len(same) > 1),
            chosen: index,
        }
        return known | ({x: 50, y: 50} if zoom_value else {})

    def run(
        request: Request, before: Outputs, kept: Outputs, zoom_value: int, session: str
    ) -> Iterator[Update]:
        """Run a request; `before` are the outputs shown so far, of which `kept` stay."""
        folder, progress = root / secrets.token_hex(16), Progress()
        running[session] = progress
        future = device.submit(request, folder, progress)
        busy = {go: gr.Button(interactive=False), another: gr.Button(interactive=False)}
        yield busy | {cancel: gr.Button(interactive=True), result: gr.Column(visible=bool(kept))}
        end: Update = {
            go: gr.Button(interactive=True),
            another: gr.Button(interactive=True),
            cancel: gr.Button(interactive=False),
            preview: gr.HTML("", visible=False),
        }
        try:
            yield from _watched(future, progress, status, preview)
            outcome = future.result()
        except UserError as error:
            _discard(folder)
            text = "Cancelled." if isinstance(error, Cancelled) else f"{error}"
            yield end | {status: views.message(text), result: gr.Column(visible=bool(kept))}
            return
        finally:
            progress.cancel()  # the page was closed, or the request is done
            running.pop(session, None)
        if not outcome.outputs:
            _discard(folder)
        found = kept + outcome.outputs
        _remove(tuple(one for one in before if one not in kept))
        end |= {status: views.message(_summary(outcome), failures=outcome.failed), outputs: found}
        if found:
            targets = [str(one.target) for one in found]
            end |= {
                result: gr.Column(visible=True),
                gallery: gr.Gallery(list(views.thumbnails(found)), visible=len(found) > 1),
                downloads: targets,
                archive: gr.DownloadButton(
                    value=str(_zip(found, folder)) if len(found) > 1 else None, visible=len(found) > 1
                ),
            }
            end |= show(found, len(kept) if outcome.outputs else 0, zoom_value)
        yield end

    def first(
        files: list[str] | None,
        model: str,
        seed: float | None,
        steps: str,
        denoise: str,
        outscale: str,
        file_format: str,
        samples: float | None,
        before: Outputs,
        zoom_value: int,
        session: gr.Request,
    ) -> Iterator[Update]:
        try:
            request = _request(files, model, seed, steps, denoise, outscale, file_format, samples)
        except UserError as error:
            yield {status: views.message(str(error))}
            return
        yield from run(request, before, (), zoom_value, str(session.session_hash))

    def more(before: Outputs, zoom_value: int, session: gr.Request) -> Iterator[Update]:
        if not before:
            return
        sources = tuple(dict.fromkeys(one.source for one in before))
        seed = (max(one.request.seed for one in before) + 1) % 2**32
        request = replace(before[-1].request, files=sources, seed=seed, samples=1)
        yield from run(request, before, before, zoom_value, str(session.session_hash))

    def stop(session: gr.Request) -> None:
        if (progress := running.get(str(session.session_hash))) is not None:
            progress.cancel()

    def look(found: Outputs, index: int, zoom_value: int, x_value: float, y_value: float) -> Update:
        moving = {one: gr.Slider(visible=zoom_value > 0) for one in (x, y)}
        if not found:
            return moving
        view = views.compare(found[index], zoom=zoom_value, x=x_value / 100, y=y_value / 100)
        return moving | {compare: view}

    def choose(found: Outputs, zoom_value: int, event: gr.SelectData) -> Update:
        return show(found, event.index, zoom_value)

    def program(
        files: list[str] | None,
        model: str,
        seed: float | None,
        steps: str,
        denoise: str,
        outscale: str,
        file_format: str,
        samples: float | None,
    ) -> list[str]:
        folder, progress = root / secrets.token_hex(16), Progress()
        try:
            request = _request(files, model, seed, steps, denoise, outscale, file_format, samples)
            future = device.submit(request, folder, progress)
            while not wait([future], timeout=_REFRESH).done:
                progress.look()
            outcome = future.result()
        except UserError as error:
            _discard(folder)
            raise gr.Error(str(error), print_exception=False) from None
        if outcome.failed:
            _discard(folder)
            raise gr.Error("; ".join(f"{name}: {why}" for name, why in outcome.failed), print_exception=False)
        for output in outcome.outputs:
            output.pixels.unlink()  # of no use to a program
            output.low_res.unlink()
        return [str(output.target) for output in outcome.outputs]

    settings = [files, model, seed, steps, denoise, outscale, file_format, samples]
    everything = [
        *(go, another, cancel, status, preview, result, compare, gallery, facts, downloads, archive, spread),
        *(x, y, outputs, chosen),
    ]
    hidden = {"show_progress": "hidden", **_PRIVATE}
    on_device = {"show_progress": "minimal", "show_progress_on": status, **DEVICE_QUEUE, **_PRIVATE}
    go.click(first, [*settings, outputs, zoom], everything, **on_device)
    another.click(more, [outputs, zoom], everything, **on_device)
    cancel.click(stop, None, None, queue=False, **hidden)
    blocks.unload(stop)
    looked = [outputs, chosen, zoom, x, y]
    zoom.change(look, looked, [compare, x, y], **hidden)
    x.release(look, looked, [compare, x, y], **hidden)
    y.release(look, looked, [compare, x, y], **hidden)
    gallery.select(choose, [outputs, zoom], everything, **hidden)
    for_programs = gr.File(visible=False, file_count="multiple", label="outputs")
    button = gr.Button(visible=False)
    button.click(program, settings, for_programs, api_name="upscale", **DEVICE_QUEUE)


def _watched(
    future: Future[Outcome], progress: Progress, status: gr.HTML, preview: gr.HTML
) -> Iterator[Update]:
    """Updates of the status and the preview until the future is done."""
    started, shown = time.monotonic(), None
    while True:
        progress.look()
        update: Update = {status: views.progress_bar(progress, time.monotonic() - started)}
        if (image := progress.preview) is not None and image is not shown:
            update[preview] = gr.HTML(views.preview(image), visible=True)
            shown = image
        yield update
        if wait([future], timeout=_REFRESH).done:
            return


def _request(
    files: Sequence[str] | None,
    model: str,
    seed: float | None,
    steps: str | None,
    denoise: str | None,
    outscale: str | None,
    file_format: str | None,
    samples: float | None,
) -> Request:
    """The values of the form as a request. UserError if one is no number."""
    return Request(
        files=tuple(Path(file) for file in files or ()),
        model=model,
        seed=int(seed or 0),
        steps=_number("steps", steps, int),
        denoise=_number("denoise", denoise, float),
        outscale=_number("outscale", outscale, float),
        file_format=file_format or None,
        samples=1 if samples is None else int(samples),
    )


def _number(name: str, text: object, kind: Callable[[str], T]) -> T | None:
    """The number in a field; None if it is empty."""
    if text is None or not str(text).strip():
        return None
    try:
        return kind(str(text).strip())
    except ValueError:
        whole = "an integer" if kind is int else "a number"
        raise UserError(f"{name} must be {whole}, got {str(text)[:40]!r}") from None


def _summary(outcome: Outcome) -> str:
    done, failed = len(outcome.outputs), len(outcome.failed)
    seconds = sum(output.seconds for output in outcome.outputs)
    text = f"{done} done in {seconds:.1f} s" if done else "Nothing was upscaled"
    return f"{text}, {failed} failed." if failed else f"{text}."


def _zip(outputs: Outputs, folder: Path) -> Path:
    """All outputs in one archive, uncompressed, since images are compressed."""
    path, taken = folder / "sr3_outputs.zip", set[str]()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for output in outputs:
            name = unique_file_name(output.target.stem, taken) + output.target.suffix
            file.write(output.target, name)
    return path


def _remove(outputs: Outputs) -> None:
    """Remove the folders of requests whose outputs are not shown any more."""
    for folder in {output.target.parent.parent for output in outputs}:
        _discard(folder)


def _discard(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
