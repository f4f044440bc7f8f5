"""sr3 plan: the arguments of real programs to the byte, the verdict, the cache, the command, and libtpu where it is."""

from __future__ import annotations

import json
import sys

import jax
import numpy as np
import pytest
import tiny

from sr3_jax.cli import main
from sr3_jax.cli import plan as command
from sr3_jax.config import experiment
from sr3_jax.distributed.sharding import batch_sharding, make_mesh
from sr3_jax.errors import UserError
from sr3_jax.planning import cache as plan_cache
from sr3_jax.planning import costs, topologies
from sr3_jax.planning import plan as planning
from sr3_jax.planning import text as plan_text
from sr3_jax.train.state import create_state
from sr3_jax.train.step import jit_train_step

CPU8, V6E = topologies.parse("cpu:8"), topologies.parse("v6e:4x4")
# One convolution's weights above the 4 MB from which the state is sharded, in a network that is quick to compile.
WIDE = {"channels": 64, "multipliers": (8,), "num_blocks": (1,), "patch": 4}


def read(**sections):
    return experiment.read(tiny.config(**sections))


@pytest.fixture(scope="module")
def wide():
    return read(model=WIDE, mesh={"fsdp": 4}, train={"batch_size": 16})


@pytest.fixture(scope="module")
def estimated(wide):
    return planning.plan(wide, CPU8)


def test_arguments_are_those_of_the_real_state_on_eight_devices(wide, estimated):
    mesh = make_mesh(**wide.config["mesh"])
    state = create_state(wide.init_params, wide.optimizer(), jax.random.key(0), mesh)
    first = jax.devices()[0]
    held = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(state)
        for shard in leaf.addressable_shards
        if shard.device == first
    )
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert held < 0.7 * whole  # something is sharded
    memory = estimated["programs"]["train"]["memory"]
    batch = 16 // 8 * tiny.CROP**2 * 3
    assert memory["arguments"] == held + batch + 8  # and a key
    assert memory["peak"] == memory["arguments"] + memory["temporaries"]
    params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert estimated["parameters"] == params


def test_the_evaluation_has_the_rest_of_the_state_beside_it(estimated):
    train, sample = (estimated["programs"][name] for name in ("train", "sample"))
    batch, key = 16 // 8 * tiny.CROP**2 * 3, 8
    state = train["memory"]["arguments"] - batch - key
    weights = sample["memory"]["arguments"] - 8 // 8 * tiny.CROP**2 * 3 - key
    assert sample["beside"] == state - weights > 2.9 * weights
    assert sample["peak"] == sample["memory"]["peak"] + sample["beside"]
    assert train["beside"] == 0


def test_the_estimate_is_near_what_xla_compiles_for_one_device():
    small = read(model={"channels": 16}, data={"crop": 64}, train={"batch_size": 4})
    found = planning.plan(small, topologies.parse("cpu:1"), programs=("train",))["programs"]["train"]
    mesh = make_mesh(devices=jax.devices()[:1])
    jitted, arguments = planning._train_program(small, mesh)
    stats = jitted.lower(*arguments).compile().memory_analysis()
    assert found["memory"]["arguments"] == stats.argument_size_in_bytes
    assert 0.4 < found["memory"]["temporaries"] / stats.temp_size_in_bytes < 2.5


def test_flops_follow_the_batch_and_the_sampler_its_steps():
    def flops(program, **sections):
        return planning.plan(read(**sections), CPU8, programs=(program,))["programs"][program]["flops"]

    one = flops("train")
    assert flops("train", train={"batch_size": 32}) == pytest.approx(4 * one, rel=0.01)
    assert flops("train", train={"batch_size": 32, "accumulation": 4}) == pytest.approx(4 * one, rel=0.01)
    two, six = (flops("sample", eval={"steps": steps}) for steps in (2, 6))
    per_step = (six - two) / 4
    assert two == pytest.approx(3 * per_step, rel=0.3)  # two steps and the loss, and some bicubic


def test_the_real_step_on_a_plan_of_it_runs(wide):
    """The planned program is the one that trains: its shapes take real arrays, and its shardings are theirs."""
    mesh = make_mesh(**wide.config["mesh"])
    jitted, (state, batch, key) = planning._train_program(wide, mesh)
    real = create_state(wide.init_params, wide.optimizer(), jax.random.key(0), mesh)
    same = jax.tree.map(
        lambda a, b: (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding), state, real
    )
    assert all(jax.tree.leaves(same))
    assert batch["image"].sharding == batch_sharding(mesh) and key.dtype == jax.random.key(0).dtype
    assert type(jitted) is type(jit_train_step(lambda state, batch, key: (state, {}), real, mesh))


def test_a_plan_that_does_not_fit_says_what_to_change():
    given = read(train={"batch_size": 64})
    peak = planning.plan(given, CPU8, programs=("train",))["programs"]["train"]["peak"]
    small = topologies.Topology("cpu:8", topologies.Chip("cpu", "cpu", memory=peak - 1), (8,))
    found = planning.plan(given, small, programs=("train",))
    assert not found["fits"] and found["programs"]["train"]["peak"] == peak
    assert found["programs"]["train"]["change"]["overrides"] == ["--config.model.dtype=bfloat16"]
    text = plan_text.report(found)
    assert "DOES NOT FIT" in text and "--config.model.dtype=bfloat16" in text
    enough = topologies.Topology("cpu:8", topologies.Chip("cpu", "cpu", memory=peak), (8,))
    assert planning.plan(given, enough, programs=("train",))["fits"]


@pytest.mark.parametrize(
    ("mesh", "sizes"), [((-1, 1), (8, 1)), ((-1, 4), (2, 4)), ((2, -1), (2, 4)), ((1, 8), (1, 8))]
)
def test_mesh_sizes_are_make_meshs(mesh, sizes):
    section = {"data": mesh[0], "fsdp": mesh[1]}
    assert planning.mesh_sizes(section, 8) == sizes == tuple(make_mesh(**section).shape.values())


@pytest.mark.parametrize("mesh", [(-1, 3), (2, 2), (-1, -1), (0, 8), (-1, 0), (16, -1)])
def test_mesh_sizes_that_make_mesh_refuses_are_refused(mesh):
    section = {"data": mesh[0], "fsdp": mesh[1]}
    for function in (lambda: planning.mesh_sizes(section, 8), lambda: make_mesh(**section)):
        with pytest.raises(UserError, match="8 devices"):
            function()


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="multiple of 16"):
        planning.plan(read(), V6E, estimate=True)


# ---- What the compiler says when memory is short.


@pytest.mark.parametrize(
    ("message", "size"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
            "Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.",
            20.5 * 2**30,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (400.78G) "
            "exceeds available HBM (15.75G).",
            400.78 * 2**30,
        ),
        ("RESOURCE_EXHAUSTED: ... Used 512.5M of 16.0M vmem.", 512.5 * 2**20),
        ("RESOURCE_EXHAUSTED: Attempting to allocate", None),
        ("INVALID_ARGUMENT: Used 20.50G of 15.75G hbm", None),
    ],
)
def test_the_compilers_refusal_is_read(message, size):
    assert costs.out_of_memory(message) == (None if size is None else int(size))


class Refused:
    """A jitted program that no compiler takes."""

    def __init__(self, message: str) -> None:
        self.message, self.jaxpr = message, jax.make_jaxpr(lambda x: x @ x)(np.ones((4, 4), np.float32))

    def trace(self, *arguments):
        return self

    def lower(self, **options):
        return self

    def compile(self, **options):
        raise jax.errors.JaxRuntimeError(self.message)


def refused(message, monkeypatch):
    weights = jax.ShapeDtypeStruct((2**20,), np.float32, sharding=None)
    monkeypatch.setattr(planning, "_train_program", lambda *_: (Refused(message), (weights,)))
    monkeypatch.setattr(planning, "make_mesh", lambda **_: make_mesh())
    monkeypatch.setattr(planning, "compiler", lambda topology: planning.contextlib.nullcontext([]))
    return planning.plan(read(train={"batch_size": 64}), V6E, programs=("train",))


@pytest.mark.parametrize(
    ("message", "peak"),
    [
        ("RESOURCE_EXHAUSTED: Ran out. Used 40.00G of 31.25G hbm. Exceeded", 40 * 2**30),
        ("RESOURCE_EXHAUSTED: HLO temporaries (40.00G) exceeds available HBM (31.25G).", 40 * 2**30 + 2**22),
    ],
)
def test_a_refused_program_does_not_fit(message, peak, monkeypatch):
    found = refused(message, monkeypatch)
    train = found["programs"]["train"]
    assert not found["fits"] and train["peak"] == peak and train["flops"] == 2 * 4**3
    assert train["change"]["overrides"][0] == "--config.model.dtype=bfloat16"
    assert "The compiler says: RESOURCE_EXHAUSTED" in plan_text.report(found)


def test_other_failures_of_the_compiler_are_not_hidden(monkeypatch):
    with pytest.raises(jax.errors.JaxRuntimeError, match="UNIMPLEMENTED"):
        refused("UNIMPLEMENTED: something", monkeypatch)


# ---- The cache.


def test_results_are_kept_and_used_and_refreshed(tmp_path, monkeypatch):
    made = []
    estimate = planning._estimate
    monkeypatch.setattr(planning, "_estimate", lambda *given: made.append(given[1]) or estimate(*given))
    first = planning.plan(read(), CPU8, cache=tmp_path)
    again = planning.plan(read(), CPU8, cache=tmp_path)
    assert made == ["train", "sample"] and again == json.loads(json.dumps(first))
    assert planning.plan(read(), CPU8, cache=tmp_path, programs=("train",))["programs"].keys() == {"train"}
    assert len(made) == 2
    planning.plan(read(), CPU8, cache=tmp_path, programs=("train",), refresh=True)
    assert made == ["train", "sample", "train"]
    for file in tmp_path.iterdir():
        file.write_text("{half")
    planning.plan(read(), CPU8, cache=tmp_path, programs=("train",))
    assert len(made) == 4


def test_the_key_is_of_what_a_program_depends_on(monkeypatch):
    def key(topology="cpu:8", **sections):
        return plan_cache.key(read(**sections).config, topology=topology)

    same = [
        key(),
        key(),
        key(optim={"learning_rate": 0.5}),
        key(train={"num_steps": 7, "seed": 3}),
        key(data={"source": "elsewhere"}),
    ]
    assert len(set(same)) == 1
    other = [
        key(topology="cpu:4"),
        key(train={"batch_size": 16}),
        key(train={"accumulation": 2}),
        key(model={"dtype": "bfloat16"}),
        key(mesh={"fsdp": 2}),
        key(eval={"steps": 3}),
        key(data={"crop": 32}),
    ]
    assert len({key(), *other}) == 8
    before = key()
    monkeypatch.setattr(plan_cache, "versions", lambda: {"jax": "0.0"})
    assert key() != before
    monkeypatch.undo()
    monkeypatch.setattr(plan_cache, "source", lambda: "changed")
    assert key() != before


def test_the_cache_lies_with_the_other_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert plan_cache.folder() == tmp_path / "sr3_jax" / "plans"


def test_a_cache_that_cannot_be_written_loses_nothing(tmp_path):
    (tmp_path / "plans").write_text("a file where the folder should be")
    assert planning.plan(read(), CPU8, cache=tmp_path / "plans", programs=("train",))["programs"]["train"]


# ---- The command.


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "tiny_config.py"
    file.write_text(
        f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({tiny.config()!r})\n"
    )
    return file


def test_the_command_prints_and_writes_a_plan(config_file, tmp_path, capsys):
    out = tmp_path / "plan.json"
    arguments = ["plan", f"--config={config_file}", "--topology=gpu:8xh100", "--only=train", f"--json={out}"]
    assert main.main([*arguments, "--config.train.batch_size=32"]) == 0
    text, written = capsys.readouterr().out, json.loads(out.read_text())
    assert "FITS" in text and "gpu:8xh100: 8 chips" in text and "An estimate" in text
    assert written["batch_size"] == 32 and written["name"] == "tiny_config"
    assert written["command"].endswith("--topology=gpu:8xh100 --config.train.batch_size=32 --only=train")
    assert set(written["programs"]) == {"train"} and written["programs"]["train"]["seconds"]["low"] > 0
    assert set(written["programs"]["train"]["versions"]) >= {"sr3_jax", "jax", "flax"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--topology=v5e:3x3"], "v5e comes as"),
        (["--topology=cpu:3"], "does not divide over 3 devices"),
        (["--topology=cpu:8", "--config.mesh.fsdp=3"], "do not fit 8 devices"),
        (["--topology=cpu:8", "--config.model.channel=3"], "did you mean 'channels'"),
        (["--topology=cpu:8", "--only=eval"], "invalid choice"),
    ],
)
def test_mistakes_are_one_sentence(config_file, options, words, capsys):
    assert main.main(["plan", f"--config={config_file}", *options]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error and error.count("\n") == 1


def test_exit_code_1_when_it_does_not_fit(config_file, monkeypatch, capsys):
    chip = topologies.Chip("cpu", "cpu", memory=1000)
    monkeypatch.setitem(topologies.CHIPS, "cpu", chip)
    assert main.main(["plan", f"--config={config_file}", "--topology=cpu:8", "--only=sample"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_long_work_says_so_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(command, "LINE_EVERY", 0.05)
    with command.watch("compiling the training step"):
        planning.jax.block_until_ready(planning.jnp.zeros(3))
        command.time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line.startswith("compiling the training step: ") for line in lines)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(command, "LINE_EVERY", 60)
    with command.watch("quick"):
        pass
    assert "quick:" not in capsys.readouterr().err


# ---- libtpu.


@pytest.mark.filterwarnings("error:.*persistent compilation cache")
def test_a_tiny_network_compiles_for_a_real_slice(tmp_path):
    pytest.importorskip("libtpu")
    topology = topologies.parse("v5e:2x2")
    given = read(train={"batch_size": 8, "accumulation": 2}, model={"dtype": "bfloat16"}, eval={"steps": 3})
    found = planning.plan(given, topology, cache=tmp_path)
    train, sample = (found["programs"][name] for name in ("train", "sample"))
    assert found["fits"] and not found["estimate"]
    memory = train["memory"]
    assert memory["aliased"] > 0.9 * memory["outputs"]  # the new state lies where the old one was
    assert memory["peak"] > memory["arguments"] > 0 and train["traffic"] > 0
    assert train["collectives"]["all-reduce"][0] > 0  # gradients
    assert train["unknown_loops"] == sample["unknown_loops"] == 0  # accumulation, sampler
    estimate = planning.plan(given, topology, estimate=True)["programs"]
    assert train["flops"] == pytest.approx(estimate["train"]["flops"], rel=1e-6)
    assert "libtpu" in train["versions"] and train["seconds_to_compile"] > 0
    assert planning.plan(given, topology, cache=tmp_path) == json.loads(json.dumps(found))
