"""Checkpoints: bit-exact on any mesh, damage, and exports."""

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

from sr3_jax.config.load import complete
from sr3_jax.distributed import sharding
from sr3_jax.errors import UserError
from sr3_jax.train import checkpoints, weights
from sr3_jax.train.optim import lr_schedule, make_optimizer
from sr3_jax.train.state import TrainState, abstract_state, create_state
from tests import tiny

OPTIMIZER = make_optimizer("adam", lr_schedule(1e-3, warmup_steps=3), b1=0.9, b2=0.999, clip_norm=1.0)


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with tiny.quick_compilation():
        yield


@pytest.fixture(autouse=True)
def shard_small_arrays(monkeypatch):
    monkeypatch.setattr(sharding, "FSDP_MIN_BYTES", 64)


def init_params(key):
    return {
        "block": {"kernel": jax.random.normal(key, (8, 4)), "bias": jnp.ones((3,))},
        "scale": jnp.ones((5,)),
    }


def state_at(step: int, mesh) -> TrainState:
    """A state whose arrays all differ from each other and from step to step."""
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
    """A copy of `saved`, to damage."""
    return shutil.copytree(saved, tmp_path / "run")


# ---- Save and restore


@pytest.mark.parametrize(("data", "fsdp"), [(2, 4), (8, 1), (1, 8)])
def test_restore_is_bit_exact_on_any_mesh(saved, data, fsdp):
    abstract = abstract_state(init_params, OPTIMIZER, sharding.make_mesh(data=data, fsdp=fsdp))
    with checkpoints.Checkpoints(saved) as store:
        assert store.latest_step == 5
        state = store.restore(abstract)
    assert same_bits(state, state_at(5, sharding.make_mesh()))
    assert [leaf.sharding for leaf in jax.tree.leaves(state)] == [
        leaf.sharding for leaf in jax.tree.leaves(abstract)
    ]
    assert not state.params["block"]["kernel"].sharding.is_fully_replicated or fsdp == 1


def test_saved_state_is_not_changed_by_donation(tmp_path):
    """Saving continues in the background while training overwrites the donated buffers."""
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


@pytest.mark.parametrize("wait", [True, False])
def test_full_disk_at_a_save_names_the_last_good_step_and_leaves_nothing(tmp_path, capfd, wait):
    mesh = sharding.make_mesh()
    with (
        pytest.raises(checkpoints.SaveError, match="step 3") as error,
        checkpoints.Checkpoints(tmp_path) as store,
    ):
        store.save(state_at(3, mesh), wait=True)
        with tiny.small_disk(64):
            store.save(state_at(5, mesh), wait=wait)
            store.check(wait=True)
    assert error.value.exit_code == 2
    assert os.listdir(tmp_path / checkpoints.CHECKPOINTS) == ["3"]
    assert "Traceback" not in capfd.readouterr().err
    with checkpoints.Checkpoints(tmp_path) as store:
        store.save(state_at(5, mesh))
    assert checkpoints.newest_step(tmp_path) == 5


def test_keeps_the_newest_checkpoints_and_saves_a_step_once(tmp_path):
    mesh = sharding.make_mesh()
    with checkpoints.Checkpoints(tmp_path, keep=2) as store:
        for step in (1, 2, 3):
            store.save(state_at(step, mesh))
        store.save(state_at(3, mesh), wait=True)
        assert store.latest_step == 3
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_milestones_are_kept(tmp_path):
    mesh = sharding.make_mesh()
    with checkpoints.Checkpoints(tmp_path, keep=1, keep_period=4) as store:
        for step in (2, 4, 6, 8, 9):
            store.save(state_at(step, mesh), wait=True)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [4, 8, 9]


def test_load_ema_reads_the_newest_checkpoint(saved):
    ema, step = checkpoints.load_ema(saved)
    assert step == 5
    assert same_bits(ema, jax.device_get(state_at(5, sharding.make_mesh()).ema_params))
    devices = {device for leaf in jax.tree.leaves(ema) for device in leaf.devices()}
    assert devices == {jax.devices()[0]}  # not replicated


# ---- Damage


def cut(folder: Path) -> None:
    """Truncate every data file of a folder, like a full disk or a failed copy."""
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
@pytest.mark.filterwarnings("ignore")  # of Orbax, about coroutines
def test_damaged_newest_checkpoint_fails_unless_older_is_allowed(workdir, damage, caplog):
    newest = workdir / "checkpoints" / "5"
    DAMAGE[damage](newest)
    with checkpoints.Checkpoints(workdir) as store:
        assert store.latest_step == 5  # so that training does not silently start from 0 or 3
        with pytest.raises(UserError) as error:
            store.restore(abstract_state(init_params, OPTIMIZER, sharding.make_mesh()))
    text = str(error.value)
    assert str(newest) in text and "\n" not in text
    assert "--config.checkpoint.allow_older=true" in text and "step 3" in text
    if "moments" not in damage:
        with pytest.raises(UserError, match=f"{newest} ") as error:
            checkpoints.load_ema(workdir)
        assert "\n" not in str(error.value)
    # The fix in the error works, and the damaged checkpoint is kept.
    with checkpoints.Checkpoints(workdir, keep=9) as store:
        with caplog.at_level("WARNING", logger="sr3_jax"):
            abstract = abstract_state(init_params, OPTIMIZER, sharding.make_mesh())
            state = store.restore(abstract, allow_older=True)
        assert store.latest_step == 3
        store.save(state_at(5, sharding.make_mesh()))  # the resumed run reaches step 5 again
    assert int(state.step) == 3 and same_bits(state, state_at(3, sharding.make_mesh()))
    assert str(newest) in caplog.text and "step 3" in caplog.text
    found = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert found == {"3", "5", "5.damaged"}
    assert checkpoints.load_ema(workdir)[1] == 5


@pytest.mark.filterwarnings("ignore")
def test_fails_if_all_checkpoints_are_damaged(workdir):
    for step in (3, 5):
        cut(workdir / "checkpoints" / str(step))
    abstract = abstract_state(init_params, OPTIMIZER, sharding.make_mesh())
    with (
        checkpoints.Checkpoints(workdir) as store,
        pytest.raises(UserError, match=r"checkpoints/3 .*new workdir"),
    ):
        store.restore(abstract, allow_older=True)


def test_incomplete_checkpoints_are_ignored(workdir):
    half = workdir / "checkpoints" / "7.orbax-checkpoint-tmp"
    shutil.copytree(workdir / "checkpoints" / "5", half)
    assert checkpoints.load_ema(workdir)[1] == 5
    with checkpoints.Checkpoints(workdir) as store:
        assert store.latest_step == 5
        store.save(state_at(7, sharding.make_mesh()))  # the resumed run reaches step 7 again
    assert checkpoints.load_ema(workdir)[1] == 7 and not half.exists()


def test_checkpoint_of_another_network_fails(workdir):
    def wider(key):
        return init_params(key) | {"scale": jnp.ones((6,))}

    with (
        checkpoints.Checkpoints(workdir) as store,
        pytest.raises(UserError, match="checkpoints/5 "),
    ):
        store.restore(abstract_state(wider, OPTIMIZER, sharding.make_mesh()))


def test_load_ema_without_checkpoints_fails(tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=f"{folder} has no checkpoint"):
            checkpoints.load_ema(folder)


def test_unwritable_workdir_fails(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"workdir .*file "):
        checkpoints.Checkpoints(tmp_path / "file")


# ---- The config


def test_config_round_trip(tmp_path):
    config = tiny.config("a folder")
    checkpoints.write_config(tmp_path / "new", config)
    assert checkpoints.read_config(tmp_path / "new") == complete(config)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["config.json"]


@pytest.mark.parametrize("content", [b"", b'{"model": ', b"\xff\xfe"])
def test_damaged_config_fails(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=f"{tmp_path}/config.json is damaged"):
        checkpoints.read_config(tmp_path)


def test_missing_config_fails(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} has no config.json"):
        checkpoints.read_config(tmp_path)


# ---- Exports


WEIGHTS = {
    "block_0": {"kernel": np.random.default_rng(0).standard_normal((3, 3, 2, 4)).astype(np.float32)},
    "scale": np.array([1e-30, -3.1415927, 65504.0, 1 + 2**-8, 1 + 3 * 2**-8], np.float32),
}


def test_float32_export_is_exact(tmp_path):
    path = tmp_path / "new" / "model.safetensors"
    weights.export(path, jax.tree.map(jnp.asarray, WEIGHTS), tiny.config())
    params, config = weights.read_export(path)
    assert same_bits(params, WEIGHTS)
    assert config == complete(tiny.config())
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]


def test_bfloat16_export_is_rounded_and_read_as_float32(tmp_path):
    path = tmp_path / "model.safetensors"
    weights.export(path, WEIGHTS, tiny.config(), dtype="bfloat16")
    with safe_open(path, framework="numpy") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    params, _ = weights.read_export(path)
    assert params["scale"].dtype == np.float32
    for ours, given in zip(jax.tree.leaves(params), jax.tree.leaves(WEIGHTS), strict=True):
        np.testing.assert_array_equal(ours, given.astype(ml_dtypes.bfloat16).astype(np.float32))
        np.testing.assert_allclose(ours, given, rtol=2**-8)
    assert params["scale"][3:].tolist() == [1.0, 1 + 2**-6]  # ties go to even


def test_unknown_export_dtype_fails(tmp_path):
    with pytest.raises(UserError, match=r"dtype .*'float16'"):
        weights.export(tmp_path / "model.safetensors", WEIGHTS, {}, dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_failed_export_preserves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    weights.export(path, WEIGHTS, tiny.config("old"))

    with tiny.small_disk(64), pytest.raises(UserError, match=r"model\.safetensors .*large"):
        weights.export(path, WEIGHTS, tiny.config("new"))
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert weights.read_export(path)[1] == complete(tiny.config("old"))


def test_export_is_readable_by_other_users(tmp_path):
    before = os.umask(0o022)
    try:
        weights.export(tmp_path / "model.safetensors", WEIGHTS, {})
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_export_into_a_file_fails(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"model.safetensors "):
        weights.export(tmp_path / "file" / "model.safetensors", WEIGHTS, {})


def hostile(path: Path, kind: str) -> None:
    whole = path.with_name("whole.safetensors")
    weights.export(whole, WEIGHTS, tiny.config())
    content = whole.read_bytes()
    good = {"format": weights.FORMAT, "config": json.dumps(tiny.config())}
    if kind == "foreign":
        return save_file({"w": np.ones(3, np.float32)}, path, metadata={"format": "pt"})
    if kind == "bare":
        return save_file({"w": np.ones(3, np.float32)}, path)
    if kind == "no config":
        return save_file({"w": np.ones(3, np.float32)}, path, metadata={"format": weights.FORMAT})
    if kind == "config cut":
        return save_file({"w": np.ones(3, np.float32)}, path, metadata=good | {"config": '{"model"'})
    if kind == "clash":  # 'a' is both a weight and a branch
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
def test_invalid_model_files_fail_with_one_sentence(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    hostile(path, kind)
    with pytest.raises(UserError) as error:
        weights.read_export(path)
    text = str(error.value)
    assert str(path) in text and "\n" not in text
    assert "sr3 export" in text


@pytest.mark.parametrize(("name", "remedy"), [("adm.pt", "sr3 convert"), ("m.onnx", ".safetensors")])
def test_files_of_other_programs_are_no_models(tmp_path, name, remedy):
    (tmp_path / name).write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(UserError, match=f"{name} .*{remedy}"):
        weights.load_weights(tmp_path / name)


def test_reading_a_model_imports_neither_torch_nor_tensorflow():
    """Model files are not trusted."""
    code = "import sys, sr3_jax.train.checkpoints; sys.exit('torch' in sys.modules or 'tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
