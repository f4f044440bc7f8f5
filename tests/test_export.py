"""Models exported for other programs, run by the code of the documentation's page on it."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image as PillowImage

from sr3_jax import diffusion
from sr3_jax.cli.main import main
from sr3_jax.config import build
from sr3_jax.config.load import complete
from sr3_jax.image_ops import upsample
from sr3_jax.inference.loading import load
from sr3_jax.sampling import Sampling
from sr3_jax.train.weights import export
from tests import tiny

PAGE = Path(__file__).resolve().parent.parent / "docs" / "how_to" / "export.md"
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with tiny.quick_compilation():
        yield


def write(path: Path, **sections) -> str:
    """A tiny model with random weights; the path of its file."""
    config = complete(tiny.config(**sections))
    params = build.init_params(build.build_network(config["model"]), jax.random.key(0))
    export(path, tiny.perturbed(params), config)
    return str(path)


def run_page(monkeypatch, folder: Path, index: int) -> dict:
    """The names that a Python block of the page defines, run where the exported files are."""
    monkeypatch.chdir(folder)
    namespace: dict = {}
    exec(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[index], namespace)
    return namespace


def test_sampling_program_equals_upscale_for_any_batch_and_size(tmp_path, monkeypatch):
    model = write(tmp_path / "m.safetensors", sampling={"back_projection": 1})
    output = str(tmp_path / "photo_4x.stablehlo")
    assert main(["export", model, "-o", output, "--solver=ancestral", "--steps=3"]) == 0
    page = run_page(monkeypatch, tmp_path, 0)
    sampling = Sampling("ancestral", 3, back_projection=1)
    odd = IMAGES[0, :7, :8]
    one = page["upscale"](odd, seed=5)
    got, wanted = (
        page["program"].call(IMAGES, np.uint32(5)),
        load(model).upscale(IMAGES, 5, sampling=sampling),
    )
    assert got.shape == wanted.shape
    assert np.abs(np.asarray(got).astype(int) - wanted).max() <= 1
    # `upscale` pads small odd sizes further than the program needs, which changes the output at that border only.
    assert one.shape == (28, 32, 3)
    top = load(model).upscale(odd, 5, sampling=sampling)[:8].astype(int)
    assert np.abs(one[:8] - top).max() <= 1
    assert np.any(one != page["upscale"](odd, seed=6))
    about = page["about"]
    assert (about["scale"], about["sampling"]["solver"], about["size"]) == (4, "ancestral", None)
    assert about["platforms"] == ["cpu", "cuda", "tpu"]


def test_sampling_program_of_a_fixed_size_with_labels_and_bfloat16(tmp_path):
    sections = {"model": {"num_classes": 3}, "data": {"scale": 2, "label_dropout": 0.1}}
    model = write(tmp_path / "m.safetensors", **sections)
    half = write(tmp_path / "half.safetensors", **sections)
    export(Path(half), load(half).params, load(half).config, dtype="bfloat16")
    path = tmp_path / "m.stablehlo"
    options = ["--size=8X4", "--platforms=cpu", "--dtype=bfloat16"]
    assert main(["export", model, "-o", str(path), *options]) == 0
    program = jax.export.deserialize(path.read_bytes())
    assert program.platforms == ("cpu",)
    labels = np.array([2, 0], np.int32)
    got = np.asarray(program.call(IMAGES[:, :8, :4], np.uint32(1), labels))
    wanted = load(half).upscale(IMAGES[:, :8, :4], 1, labels=labels)
    assert np.abs(got.astype(int) - wanted).max() <= 1
    with pytest.raises(ValueError, match="shape"):
        program.call(IMAGES, np.uint32(1), labels)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["photo_4x", "-o", "m.stablehlo", "--size=7x8"], "7x8"),
        (["photo_4x", "-o", "m.stablehlo", "--size=8"], "--size"),
        (["photo_4x", "-o", "m.stablehlo", "--platforms=gpu"], "--platforms=gpu"),
        (["photo_4x", "-o", "m.onnx", "--solver=ddim"], "--solver"),
        (["photo_4x", "-o", "m.safetensors", "--size=8x8"], "--size"),
        (["photo_4x", "-o", "m.pth"], "m.pth"),
        (["fashion_base_8", "-o", "m.stablehlo"], "config.model.low_res"),
    ],
)
def test_what_cannot_be_exported_is_a_users_error(arguments, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", *arguments]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


ADM = {
    "network": "adm",
    "channels": 8,
    "multipliers": (1, 2),
    "num_blocks": (1, 1),
    "attention_levels": (1,),
    "heads": 2,
    "norm_groups": 4,
    "num_classes": 5,
    "learned_variance": True,
}


@pytest.mark.parametrize("kind", ["residual", "paper", "adm"])
def test_denoiser_in_onnx_and_its_numpy_sampler(kind, tmp_path, monkeypatch):
    """The same network at other sizes and batches, and the same image from the same noise."""
    pytest.importorskip("jax2onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    sections = {"sampling": {"steps": 4}}
    if kind == "paper":
        sections |= {
            "model": {
                "layout": "biggan",
                "norm": "group",
                "patch": 1,
                "multipliers": (1, 2),
                "num_blocks": (1, 1),
                "mid_attention": True,
                "augment": True,
            },
            "diffusion": {"space": "image", "prediction": "eps", "residual_scale": 1.0},
            "data": {"augment": "noise"},
        }
    elif kind == "adm":  # whose labels have none for "no label", and which predicts its variance, too
        defaults = {key: complete({})["model"][key] for key in tiny.CONFIG["model"]}
        sections = {
            "model": defaults | ADM,
            "diffusion": {"space": "image", "prediction": "eps", "residual_scale": 1.0, "num_steps": 1000},
            "data": {"upsampling": "bilinear"},
            "sampling": {"solver": "ancestral_learned", "steps": 4},
        }
    name = write(tmp_path / "m.safetensors", **sections)
    model, path = load(name), str(tmp_path / "photo_4x.onnx")
    assert main(["export", name, "-o", path]) == 0
    session = onnxruntime.InferenceSession(path)
    rng = np.random.default_rng(0)
    y_t, upsampled = rng.standard_normal((2, 3, 12, 20, 3), np.float32)
    inputs = {"y_t": y_t, "gamma": np.float32([0.1, 0.5, 0.99]), "upsampled": upsampled}
    inputs |= {"augment": np.float32([0, 0.3, 1])} if kind == "paper" else {}
    inputs |= {"label": np.int32([0, 4, 2])} if kind == "adm" else {}
    (output,) = session.run(None, inputs)
    cond = {key: inputs[key] for key in inputs if key not in ("y_t", "gamma")}
    wanted = model.denoiser()(y_t, inputs["gamma"], cond)[..., :3]
    np.testing.assert_allclose(output, wanted, atol=1e-4, rtol=1e-4)

    page = run_page(monkeypatch, tmp_path, 1)
    image = np.asarray(PillowImage.fromarray(IMAGES[0]).resize((12, 10)))
    got = page["upscale"](image, seed=3, label=2)
    noise = np.random.default_rng(3).standard_normal((1, 40, 48, 3), np.float32)
    low_res = np.float32(image) / 127.5 - 1
    up = page["resize"](low_res, 40, 48)[None]
    np.testing.assert_allclose(up, upsample(low_res[None], 4, model.config["data"]["upsampling"]), atol=1e-5)
    with monkeypatch.context() as patch:
        patch.setattr(jax.random, "normal", lambda key, shape: jax.numpy.asarray(noise))
        samples = diffusion.sample(
            lambda *given: model.denoiser()(*given)[..., :3],
            jax.random.key(0),
            {"upsampled": up} | ({"label": np.int32([2])} if kind == "adm" else {}),
            shape=noise.shape,
            schedule=model.sampling.grid(model.schedule),
            solver=diffusion.ddim(),
            prediction=model.prediction,
            space=model.space,
        )
    assert np.abs(got - (np.asarray(samples.image)[0] + 1) * 127.5).max() < 1
