"""Weights of other projects: the same outputs as their code, refusals, and a converted model in every command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from experiments.convert_parity import STEPS, TINY, formula_inputs, formula_weights, gammas
from sr3_jax.cli import main as cli
from sr3_jax.config.build import build_network, build_schedule
from sr3_jax.config.load import complete, load_config
from sr3_jax.conversion.convert import adm_config, shapes_of_tensors, to_params
from sr3_jax.conversion.settings import PUBLISHED, flags_config, port_config, read_json_with_comments
from sr3_jax.errors import UserError
from sr3_jax.image_ops import upsample
from sr3_jax.inference import loading
from sr3_jax.inference.model import Model
from sr3_jax.nn.adm_unet import timestep
from sr3_jax.train.weights import export, read_export_config
from tests import tiny

# Of their PyTorch code, on the weights and inputs of experiments/convert_parity.py, which wrote these numbers.
GOLDEN = {
    "adm, 4 heads": [
        *(0.14293, -0.4065, 0.39615, -0.35703, -0.07213, 0.5888),
        *(-0.01931, 0.2021, -0.01216, 0.16574, 0.87214, 0.83467),
    ],
    "adm, heads of 16 channels, no FiLM": [
        *(-0.21351, -0.38669, -0.2919, 0.1689, 0.33531, 1.15218),
        *(0.52982, -0.62058, -0.55711, -0.12733, -0.23012, -0.09586),
    ],
    "sr3_port": [
        *(0.1188, -0.36386, 0.26123, 0.06889, -0.48009, -0.80314),
        *(0.17755, -0.07914, -0.29604, 0.72153, -0.83767, 0.86326),
    ],
}
JSON = """{
    "datasets": {"train": {"l_resolution": 4, "r_resolution": 16}}, // low, high
    "model": {
        "which_model_G": "sr3", // ddpm or sr3
        "unet": {"in_channel": 6, "out_channel": 3, "inner_channel": 8, "norm_groups": 4, "res_blocks": 1,
                 "channel_multiplier": [1, 2 // , 4
                 ], "attn_res": [8], "dropout": 0.2},
        "beta_schedule": {"train": {"schedule": "linear", "n_timestep": 200, "linear_start": 1e-4, "linear_end": 0.1}},
        "diffusion": {"image_size": 16, "channels": 3, "conditional": true}
    }
}"""
FLAGS = (
    "--large_size 64 --small_size 16 --num_channels 32 --num_res_blocks 1 --num_head_channels 16 "
    "--resblock_updown True"
)


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with tiny.quick_compilation():
        yield


def tensors(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The state dict of a config's network with the formula's weights."""
    return {name: formula_weights(name, shape) for name, shape in shapes_of_tensors(config).items()}


def small(title: str) -> dict[str, Any]:
    upsampling = "bilinear" if TINY[title]["network"] == "adm" else "bicubic"
    return complete(
        {
            "model": TINY[title],
            "diffusion": {"num_steps": 1000, "beta_start": 1e-4, "beta_end": 0.02},
            "data": {"crop": 16, "scale": 4, "upsampling": upsampling},
        }
    )


def small_model(title: str, **sections: dict[str, Any]) -> Model:
    config = small(title)
    for name, fields in sections.items():
        config[name] |= fields
    params = to_params(tensors(config), config, title)
    return loading.from_config(config, params, name=title)


def tiny_pixels(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def port(tmp_path) -> list[str]:
    """A port's weights and JSON: arguments of sr3 convert."""
    (tmp_path / "tiny.json").write_text(JSON)
    config = port_config(read_json_with_comments(tmp_path / "tiny.json"), "tiny.json")
    betas = build_schedule(config["diffusion"]).beta
    arrays = {f"denoise_fn.{name}": value for name, value in tensors(config).items()} | {"betas": betas}
    save_file(arrays, tmp_path / "gen.pth")
    return [str(tmp_path / "gen.pth"), "--json", str(tmp_path / "tiny.json")]


# ---- The networks


@pytest.mark.parametrize("title", TINY)
def test_a_network_predicts_what_its_pytorch_code_predicts(title):
    config = small(title)
    y_t, low_res = formula_inputs(len(STEPS), 16)
    cond = {"upsampled": upsample(low_res, 4, config["data"]["upsampling"])}
    if config["model"]["num_classes"]:
        cond["label"] = jnp.arange(len(STEPS))
    params = to_params(tensors(config), config, title)
    network = build_network(config["model"] | {"remat": title == "sr3_port"})  # which changes nothing
    apply = jax.jit(network.apply)
    prediction = np.asarray(apply({"params": params}, y_t, jnp.asarray(gammas(config, STEPS)), cond))
    found = prediction.ravel()[:: prediction.size // 12 + 1]
    np.testing.assert_allclose(found, GOLDEN[title], atol=1e-4)


def test_a_noise_level_of_adms_schedule_is_its_step():
    levels = gammas(small("adm, 4 heads"), tuple(range(1000)))
    between = (levels[1:] + levels[:-1]) / 2
    every = jnp.concatenate([levels, between, jnp.array([1.0, 1e-7])])
    steps, fractions, ends = np.split(jax.jit(timestep, static_argnums=1)(every, 1000), [1000, 1999])
    np.testing.assert_array_equal(steps, np.arange(1000))
    assert np.all((fractions > np.arange(999)) & (fractions < np.arange(1, 1000)))
    np.testing.assert_array_equal(ends, [0.0, 999.0])


@pytest.mark.parametrize(("name", "variance"), [(PUBLISHED[0], "drop"), (PUBLISHED[1], "learned")])
def test_the_published_upsamplers_are_recognized_by_their_tensors(name, variance):
    wanted = load_config(name)
    with_variance = wanted | {"model": wanted["model"] | {"learned_variance": True}}
    arrays = {key: np.empty(shape, np.bool_) for key, shape in shapes_of_tensors(with_variance).items()}
    config, notes = adm_config(arrays, None, "file", variance)
    if variance == "learned":
        assert (config["sampling"]["solver"], config["model"]) == (
            "ancestral_learned",
            with_variance["model"],
        )
    else:
        assert config == wanted and name in notes[0]


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"layout": "efficient"}, "layout"),
        ({"norm_groups": 3}, "norm_groups"),
        ({"head_channels": 5}, "head_channels"),
        ({"heads": 3}, "heads"),
        ({"attention_levels": (2,)}, "attention_levels"),
        ({"network": "unet", "num_blocks": (1, 1)}, "heads"),
    ],
)
def test_fields_that_a_network_does_not_have_are_refused(fields, wrong):
    with pytest.raises(UserError, match=f"config.model.{wrong} "):
        build_network(small("adm, 4 heads")["model"] | fields)


# ---- Converted models in use


def test_a_port_is_converted_and_used(port, tmp_path, capsys):
    out = str(tmp_path / "port.safetensors")
    assert cli.main(["convert", *port, "-o", out]) == 0
    assert "parameters" in capsys.readouterr().out
    config = read_export_config(Path(out))
    assert config["model"]["attention_levels"] == (1,) and config["model"]["dropout"] == 0.2
    assert config["data"]["scale"] == 4 and config["diffusion"]["beta_end"] == 0.1
    model, images = loading.load(out), np.stack([tiny_pixels(5, 6, seed=seed) for seed in range(8)])
    one = model.upscale(images[3], steps=2)
    assert one.shape == (20, 24, 3) and one.std() > 1
    assert jax.local_device_count() == 8  # over which a batch is divided
    assert np.max(np.abs(model.upscale(images, steps=2)[3].astype(int) - one)) <= 1
    plan = ["plan", f"--config={out}", "--topology=gpu:8xh100", "--estimate", "--only=train"]
    assert cli.main([*plan, "--config.train.batch_size=8"]) == 0
    assert "FITS" in capsys.readouterr().out.upper()


def test_an_upsampler_with_flags_and_any_prefix_is_converted(tmp_path):
    wanted = complete(
        load_config(PUBLISHED[0])
        | {
            "model": load_config(PUBLISHED[0])["model"]
            | {
                "channels": 32,
                "multipliers": (1, 2, 3, 4),
                "num_blocks": (1,) * 4,
                "attention_levels": (2, 3),
            }
            | {"heads": 1, "head_channels": 16, "num_classes": 7, "learned_variance": True},
        }
    )
    arrays = tensors(wanted)
    save_file({f"module.{name}": value for name, value in arrays.items()}, tmp_path / "ema.pt")
    out = tmp_path / "adm.safetensors"
    assert cli.main(["convert", str(tmp_path / "ema.pt"), "-o", str(out), "--flags", FLAGS]) == 0
    config = read_export_config(out)
    assert config["model"] == wanted["model"] | {"learned_variance": False}
    assert (config["data"]["crop"], config["data"]["scale"], config["data"]["upsampling"]) == (
        64,
        4,
        "bilinear",
    )
    np.testing.assert_array_equal(load_file(out)["conv_out.bias"], arrays["out.2.bias"][:3])


def test_a_class_conditional_upsampler_with_its_variance_upscales(tmp_path, capsys):
    model = small_model("adm, 4 heads", sampling={"solver": "ancestral_learned", "steps": 4})
    export(tmp_path / "adm.safetensors", model.params, model.config)
    Image.fromarray(tiny_pixels(4, 4)).save(tmp_path / "in.png")
    command = ["upscale", str(tmp_path / "in.png"), "--model", str(tmp_path / "adm.safetensors"), "-o"]
    assert cli.main([*command, str(tmp_path / "none.png")]) == 2
    assert "--label" in capsys.readouterr().err
    plan = [
        "plan",
        f"--config={tmp_path / 'adm.safetensors'}",
        "--topology=gpu:8xh100",
        "--estimate",
        "--only=sample",
    ]
    assert cli.main(plan) == 0
    outputs = []
    for label in (1, 2):
        assert cli.main([*command, str(tmp_path / f"{label}.png"), f"--label={label}"]) == 0
        outputs.append(np.asarray(Image.open(tmp_path / f"{label}.png")))
    assert not np.array_equal(*outputs)
    with pytest.raises(UserError, match="0 to 4, got 5"):
        replace(model, label=5).upscale(tiny_pixels(4, 4))
    with pytest.raises(UserError, match="ancestral_learned"):
        small_model("sr3_port").upscale(tiny_pixels(4, 4), solver="ancestral_learned", steps=2)


def test_the_check_tells_a_good_model_from_random_weights(port, tmp_path, capsys):
    assert cli.main(["convert", "--check", "photo_4x"]) == 0
    assert "SHA-256" in capsys.readouterr().out
    assert cli.main(["convert", "--check", *port]) == 2
    captured = capsys.readouterr()
    assert "worse" in captured.out and "does not denoise" in captured.err


# ---- Refusals


def refused(arguments: list[str], capsys) -> str:
    """The one sentence of a refusal."""
    assert cli.main(["convert", *arguments]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def test_another_file_is_refused(port, tmp_path, capsys):
    out = ["-o", str(tmp_path / "out.safetensors")]
    assert "nothing to do" in refused(port, capsys)
    assert ".safetensors" in refused([*port, "-o", str(tmp_path / "out.bin")], capsys)
    assert "none.pt" in refused([str(tmp_path / "none.pt"), *out], capsys)
    assert "--json" in refused([port[0], *out], capsys)
    assert "--flags" in refused([*port, *out, "--flags", FLAGS], capsys)
    content = Path(port[0]).read_bytes()
    (tmp_path / "half.pth").write_bytes(content[: len(content) // 2])
    assert "half.pth" in refused([str(tmp_path / "half.pth"), *out], capsys)
    arrays = load_file(port[0])
    cases = {
        "ups.0.res_block.block1.block.3.weight is missing": "ups.0.res_block.block1.block.3.w",
        "neither": "noise_level_mlp",
    }
    for wanted, left_out in cases.items():
        kept = {name: value for name, value in arrays.items() if left_out not in name}
        save_file({**kept, "time_mlp.1.weight": np.zeros((1, 1), np.float32)}, tmp_path / "other.pth")
        message = refused([str(tmp_path / "other.pth"), *port[1:], *out], capsys)
        assert wanted in message and ("--json" in message or wanted == "neither")
    save_file({**arrays, **{f"ema.{name}": value for name, value in arrays.items()}}, tmp_path / "two.pth")
    assert "several networks" in refused([str(tmp_path / "two.pth"), *port[1:], *out], capsys)
    wrong = arrays | {"denoise_fn.downs.0.bias": np.zeros(5, np.float32)}
    save_file(wrong, tmp_path / "wrong.pth")
    assert "(5,) instead of (8,)" in refused([str(tmp_path / "wrong.pth"), *port[1:], *out], capsys)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('"sr3",', '"ddpm",', "which_model_G"),
        ('"linear",', '"warmup10",', "schedule"),
        ('"linear_end": 0.1', '"linear_end": 0.05', "betas"),
        ('"inner_channel": 8', '"inner_channel": "wide"', "inner_channel"),
        ('"inner_channel": 8', '"inner_channel": 6', "channels"),
        ('"res_blocks": 1,', "", "res_blocks"),
        ('"l_resolution": 4', '"l_resolution": 5', "l_resolution"),
        ('"in_channel": 6', '"in_channel": 3', "in_channel"),
        ("[1, 2", "[1, 2, 2", "missing"),
        ('"conditional": true}', '"conditional": true', "JSON"),
    ],
)
def test_a_json_that_does_not_fit_is_refused(port, tmp_path, capsys, old, new, named):
    assert JSON.count(old) == 1
    Path(port[2]).write_text(JSON.replace(old, new))
    assert named in refused([*port, "-o", str(tmp_path / "out.safetensors")], capsys)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--large_size", "pairs"),
        ("--image_size 64", "image_size"),
        ("--resblock_updown False", "resblock_updown"),
        ("--resblock_updown True --noise_schedule cosine", "noise_schedule"),
        ("--resblock_updown True --num_channels wide", "wide"),
        ("--resblock_updown True --large_size 100", "large_size"),
        ("--resblock_updown True --num_channels 33", "channels"),
        ("--resblock_updown True --num_head_channels 12", "head_channels"),
        ("--resblock_updown True --diffusion_steps 0", "timesteps"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, named):
    with pytest.raises(UserError, match=f"--flags.*{named}"):
        flags_config(flags)


def test_an_unpublished_upsampler_needs_its_flags(tmp_path, capsys):
    config = small("adm, 4 heads")
    save_file(tensors(config), tmp_path / "other.pt")
    out = ["-o", str(tmp_path / "out.safetensors")]
    assert "--flags" in refused([str(tmp_path / "other.pt"), *out], capsys)
    message = refused([str(tmp_path / "other.pt"), *out, "--flags", FLAGS], capsys)
    assert "fit" in message and "--flags" in message
