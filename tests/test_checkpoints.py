"""Checkpoints by the bit, on any mesh; damaged ones named and never trained over; exports whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from sr3_jax.distributed import sharding
from sr3_jax.errors import UserError
from sr3_jax.train import checkpoints, weights
from sr3_jax.train.optim import adam, lr_schedule
from sr3_jax.train.state import TrainState, abstract_state, create_state
from tests import tiny

OPTIMIZER = adam(lr_schedule(1e-3, warmup_steps=3), clip_norm=1.0)


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with tiny.quick_compilation():
        yield


@pytest.fixture(autouse=True)
def small_arrays_are_split(monkeypatch):
    monkeypatch.setattr(sharding, "FSDP_MIN_BYTES", 64)


def init_params(key):
    return {
        "block": {"kernel": jax.random.normal(key, (8, 4)), "bias": jnp.ones((3,))},
        "scale": jnp.ones((5,)),
    }


def state_at(step: int, mesh) -> TrainState:
    """A state whose parts all differ from one another and from step to step."""
    state = create_state(init_params, OPTIMIZER, jax.random.key(0), mesh)
    generator = np.random.default_rng(step)

    def other(leaf):
        values = (
            generator.standard_normal(leaf.shape) if leaf.dtype == jnp.float32 else np.full(leaf.shape, step)
        )
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(other, state)


def same_bits(tree, wanted) -> bool:
    assert jax.tree.structure(tree) == jax.tree.structure(wanted)
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(wanted), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A workdir with checkpoints 3 and 5, saved from a mesh of 2 x 4."""
    workdir = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "FSDP_MIN_BYTES", 64)
        mesh = sharding.make_mesh(data=2, fsdp=4)
        with checkpoints.Checkpoints(workdir) as store:
            assert store.latest_step is None
            for step in (3, 5):
                store.save(state_at(step, mesh))
    return workdir


@pytest.fixture
def workdir(saved, tmp_path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(saved, tmp_path / "run")


# ---- Save and restore


@pytest.mark.parametrize(("data", "fsdp"), [(2, 4), (8, 1), (1, 8)])
def test_the_newest_state_comes_back_to_the_bit_on_any_mesh(saved, data, fsdp):
    abstract = abstract_state(init_params, OPTIMIZER, sharding.make_mesh(data=data, fsdp=fsdp))
    with checkpoints.Checkpoints(saved) as store:
        assert store.latest_step == 5
        state = store.restore(abstract)
    assert same_bits(state, state_at(5, sharding.make_mesh()))
    assert [leaf.sharding for leaf in jax.tree.leaves(state)] == [
        leaf.sharding for leaf in jax.tree.leaves(abstract)
    ]
    assert not state.params["block"]["kernel"].sharding.is_fully_replicated or fsdp == 1


def test_what_is_saved_is_the_state_of_that_moment_even_if_it_is_donated_at_once(tmp_path):
    """The save goes on in the background while training overwrites the donated buffers."""
    mesh = sharding.make_mesh()
    big = {"w": jnp.zeros((1024, 256))}
    state = create_state(lambda key: jax.tree.map(jnp.copy, big), optax.identity(), jax.random.key(0), mesh)
    advance = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    with checkpoints.Checkpoints(tmp_path, keep=9) as store:
        for _ in range(3):
            state = advance(state)
            store.save(state)
        state = advance(advance(state))
    for step in (3, 2, 1):
        ema, found = checkpoints.load_ema(tmp_path)
        assert found == step
        np.testing.assert_array_equal(ema["w"], step)
        shutil.rmtree(tmp_path / "checkpoints" / str(step))


def test_the_last_few_are_kept_and_the_same_step_is_saved_once(tmp_path):
    mesh = sharding.make_mesh()
    with checkpoints.Checkpoints(tmp_path, keep=2) as store:
        for step in (1, 2, 3):
            store.save(state_at(step, mesh))
        store.save(state_at(3, mesh), wait=True)
        assert store.latest_step == 3
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_the_moving_average_alone_is_that_of_the_newest_checkpoint(saved):
    ema, step = checkpoints.load_ema(saved)
    assert step == 5
    assert same_bits(ema, jax.device_get(state_at(5, sharding.make_mesh()).ema_params))
    devices = {device for leaf in jax.tree.leaves(ema) for device in leaf.devices()}
    assert devices == {jax.devices()[0]}  # eight copies would be seven too many


# ---- Damage


def cut(folder: Path) -> None:
    """Cut every data file of a folder in half, as a full disk or a broken copy would."""
    for path in folder.rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "empty": lambda step: (shutil.rmtree(step), step.mkdir()),
    "weights gone": lambda step: shutil.rmtree(step / "ema"),
    "moments gone": lambda step: shutil.rmtree(step / "train"),
    "cut": lambda step: cut(step),
    "moments cut": lambda step: cut(step / "train"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.filterwarnings("ignore")  # Orbax leaves coroutines behind
def test_a_damaged_newest_checkpoint_is_named_and_never_passed_over_unasked(workdir, damage, caplog):
    newest = workdir / "checkpoints" / "5"
    DAMAGE[damage](newest)
    with checkpoints.Checkpoints(workdir) as store:
        assert store.latest_step == 5  # so that training cannot start afresh, or from 3, unasked
        with pytest.raises(UserError) as error:
            store.restore(abstract_state(init_params, OPTIMIZER, sharding.make_mesh()))
    text = str(error.value)
    assert text.startswith(f"checkpoint {newest} cannot be restored (") and "\n" not in text
    assert text.endswith("; give --config.checkpoint.allow_older=true to go on from step 3, or a new workdir")
    if "moments" not in damage:
        with pytest.raises(UserError, match=f"checkpoint {newest} cannot be read") as error:
            checkpoints.load_ema(workdir)
        assert "\n" not in str(error.value)
    # The sentence's way out works, and keeps what is there.
    with checkpoints.Checkpoints(workdir, keep=9) as store:
        with caplog.at_level("WARNING", logger="sr3_jax"):
            abstract = abstract_state(init_params, OPTIMIZER, sharding.make_mesh())
            state = store.restore(abstract, allow_older=True)
        assert store.latest_step == 3
        store.save(state_at(5, sharding.make_mesh()))  # the run comes to that step again
    assert int(state.step) == 3 and same_bits(state, state_at(3, sharding.make_mesh()))
    assert f"checkpoint {newest} cannot be restored" in caplog.text and "going on from step 3" in caplog.text
    found = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert found == {"3", "5", "5.damaged"}
    assert checkpoints.load_ema(workdir)[1] == 5


@pytest.mark.filterwarnings("ignore")
def test_where_all_are_damaged_nothing_is_started_afresh(workdir):
    for step in (3, 5):
        cut(workdir / "checkpoints" / str(step))
    abstract = abstract_state(init_params, OPTIMIZER, sharding.make_mesh())
    with (
        checkpoints.Checkpoints(workdir) as store,
        pytest.raises(UserError, match=r"3 cannot be restored .* there is no older one: give a new workdir"),
    ):
        store.restore(abstract, allow_older=True)


def test_what_a_kill_left_half_written_is_no_checkpoint(workdir):
    half = workdir / "checkpoints" / "7.orbax-checkpoint-tmp"
    shutil.copytree(workdir / "checkpoints" / "5", half)
    assert checkpoints.load_ema(workdir)[1] == 5
    with checkpoints.Checkpoints(workdir) as store:
        assert store.latest_step == 5
        store.save(state_at(7, sharding.make_mesh()))  # the resumed run comes to that step again
    assert checkpoints.load_ema(workdir)[1] == 7 and not half.exists()


def test_a_checkpoint_of_another_network_is_refused(workdir):
    def wider(key):
        return init_params(key) | {"scale": jnp.ones((6,))}

    with (
        checkpoints.Checkpoints(workdir) as store,
        pytest.raises(UserError, match="cannot be restored"),
    ):
        store.restore(abstract_state(wider, OPTIMIZER, sharding.make_mesh()))


def test_a_workdir_without_checkpoints_has_no_weights(tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=f"{folder} has no checkpoint yet; train it first"):
            checkpoints.load_ema(folder)


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"workdir .*file cannot be written \(.*\): choose another"):
        checkpoints.Checkpoints(tmp_path / "file")


# ---- The config beside them


def test_the_config_is_written_whole_and_read_back(tmp_path):
    config = tiny.config("a folder")
    checkpoints.write_config(tmp_path / "new", config)
    assert json.loads(json.dumps(config)) == checkpoints.read_config(tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["config.json"]


@pytest.mark.parametrize("content", [b"", b'{"model": ', b"\xff\xfe"])
def test_a_damaged_config_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=f"{tmp_path}/config.json is damaged .* train in a new workdir"):
        checkpoints.read_config(tmp_path)


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} has no config.json, so it is not a run's workdir"):
        checkpoints.read_config(tmp_path)


# ---- Exports


WEIGHTS = {
    "block_0": {"kernel": np.random.default_rng(0).standard_normal((3, 3, 2, 4)).astype(np.float32)},
    "scale": np.array([1e-30, -3.1415927, 65504.0, 1 + 2**-8, 1 + 3 * 2**-8], np.float32),
}


def test_a_float32_export_is_exact(tmp_path):
    path = tmp_path / "new" / "model.safetensors"
    weights.export(path, jax.tree.map(jnp.asarray, WEIGHTS), {"model": {"multipliers": (1, 2)}})
    params, config = weights.read_export(path)
    assert same_bits(params, WEIGHTS)
    assert config == {"model": {"multipliers": [1, 2]}}
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]


def test_a_bfloat16_export_is_rounded_to_nearest_half_the_size_and_read_as_float32(tmp_path):
    path = tmp_path / "model.safetensors"
    weights.export(path, WEIGHTS, {}, dtype="bfloat16")
    with safe_open(path, framework="numpy") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    params, _ = weights.read_export(path)
    assert params["scale"].dtype == np.float32
    for ours, given in zip(jax.tree.leaves(params), jax.tree.leaves(WEIGHTS), strict=True):
        np.testing.assert_array_equal(ours, given.astype(ml_dtypes.bfloat16).astype(np.float32))
        np.testing.assert_allclose(ours, given, rtol=2**-8)
    assert params["scale"][3:].tolist() == [1.0, 1 + 2**-6]  # ties go to even


def test_another_precision_is_refused(tmp_path):
    with pytest.raises(UserError, match="dtype must be float32 or bfloat16, got 'float16'"):
        weights.export(tmp_path / "model.safetensors", WEIGHTS, {}, dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    weights.export(path, WEIGHTS, {"old": 1})

    def half(file, data):
        with open(file, "wb") as opened:
            opened.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(UserError, match=r"model\.safetensors cannot be written .*No space left"):
        weights.export(path, WEIGHTS, {"new": 1})
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert weights.read_export(path)[1] == {"old": 1}


def test_an_export_can_be_read_by_others(tmp_path):
    before = os.umask(0o022)
    try:
        weights.export(tmp_path / "model.safetensors", WEIGHTS, {})
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_an_export_to_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        weights.export(tmp_path / "file" / "model.safetensors", WEIGHTS, {})


def hostile(path: Path, kind: str) -> None:
    whole = path.with_name("whole.safetensors")
    weights.export(whole, WEIGHTS, {})
    content = whole.read_bytes()
    good = {"format": weights.FORMAT, "config": "{}"}
    if kind == "foreign":
        return save_file({"w": np.ones(3, np.float32)}, path, metadata={"format": "pt"})
    if kind == "bare":
        return save_file({"w": np.ones(3, np.float32)}, path)
    if kind == "no config":
        return save_file({"w": np.ones(3, np.float32)}, path, metadata={"format": weights.FORMAT})
    if kind == "config cut":
        return save_file({"w": np.ones(3, np.float32)}, path, metadata=good | {"config": '{"model"'})
    if kind == "clash":  # 'a' is a weight and a branch
        return save_file({"a": np.ones(3, np.float32), "a.b": np.ones(3, np.float32)}, path, metadata=good)
    contents = {
        "empty": b"",
        "text": b"not a model at all, only a few words",
        "header cut": content[:50],
        "data cut": content[:-10],
        "huge header": b"\xff" * 8 + content[8:],
        "pickle": b"\x80\x04\x95" + bytes(100),
        "tail": content + b"x",
    }
    path.write_bytes(contents[kind])


HOSTILE = (
    *("foreign", "bare", "no config", "config cut", "clash", "empty", "text"),
    *("header cut", "data cut", "huge header", "pickle", "tail"),
)


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_file_that_is_no_model_is_named_in_one_sentence(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    hostile(path, kind)
    with pytest.raises(UserError) as error:
        weights.read_export(path)
    text = str(error.value)
    assert text.startswith(str(path)) and "\n" not in text
    known = {
        "foreign": "is a safetensors file but not an sr3_jax model; make one with sr3 export",
        "bare": "is a safetensors file but not an sr3_jax model; make one with sr3 export",
        "no config": "carries no config; make it again with sr3 export",
    }
    assert known.get(kind, "cannot be read as a model (") in text


def test_reading_a_model_takes_no_pickle_and_no_torch():
    """A model file may come from anyone."""
    code = "import sys, sr3_jax.train.checkpoints; sys.exit('torch' in sys.modules or 'tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
