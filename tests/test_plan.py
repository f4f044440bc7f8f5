"""sr3 plan: exact argument sizes, FLOPs, the verdict and its suggestions, the cache, the command, libtpu."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sr3_jax.cli import main
from sr3_jax.cli import plan as command
from sr3_jax.distributed.sharding import make_mesh, mesh_sizes
from sr3_jax.errors import UserError
from sr3_jax.flops import flops as count_flops
from sr3_jax.flops import peak_flops
from sr3_jax.planning import plan as planning
from sr3_jax.planning import programs, topologies
from sr3_jax.planning.report import report
from sr3_jax.train import experiment
from sr3_jax.train.state import create_state

GIB = 2**30
MB4 = (1024, 1024)  # float32: 4 MB, the smallest array that is sharded
CPU8, V6E = topologies.parse("cpu:8"), topologies.parse("v6e:4x4")
# One convolution with over 4 MB of weights, so that the state is sharded, in a network that compiles quickly.
WIDE = {"channels": 64, "multipliers": (8,), "num_blocks": (1,), "patch": 4}


def read(**sections):
    return experiment.read(tiny.config(**sections))


@pytest.fixture(scope="module")
def wide():
    return read(model=WIDE, mesh={"fsdp": 4}, train={"batch_size": 16})


@pytest.fixture(scope="module")
def estimated(wide):
    return planning.plan(wide, CPU8)


# ---- FLOPs.


def trace(function, *shapes):
    return jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))


def conv(x, kernel, **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers, **options)


def test_flops_of_products_and_convolutions():
    assert count_flops(trace(lambda a, b: jnp.tanh(a @ b), (5, 7), (7, 3))) == 2 * 5 * 7 * 3
    assert count_flops(trace(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 5, 7), (4, 7, 3))) == 840
    assert count_flops(trace(conv, (2, 8, 8, 6), (3, 3, 6, 10))) == 2 * (2 * 8 * 8 * 10) * 9 * 6
    grouped = trace(lambda x, k: conv(x, k, feature_group_count=2), (2, 8, 8, 6), (3, 3, 3, 10))
    assert count_flops(grouped) == 2 * (2 * 8 * 8 * 10) * 9 * 3


def test_flops_of_a_scan_count_per_iteration_and_of_a_conditional_the_most_expensive_branch():
    def loop(x, weight):
        return jax.lax.scan(lambda x, _: (x @ weight, None), x, length=11)[0]

    def choose(x, weight):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ weight @ weight, lambda: x)

    assert count_flops(trace(loop, (5, 7), (7, 7))) == 11 * 2 * 5 * 7 * 7
    assert count_flops(trace(choose, (5, 7), (7, 7))) == 2 * 2 * 5 * 7 * 7
    assert count_flops(trace(jax.jit(loop), (5, 7), (7, 7))) == 11 * 2 * 5 * 7 * 7


def test_flops_include_recomputation():
    def loss(weight, x):
        return jnp.sum(jnp.sin(jnp.sin(x @ weight) @ weight))

    forward = count_flops(trace(loss, (8, 8), (8, 8)))
    # The gradient with respect to x is not needed.
    assert count_flops(trace(jax.grad(loss), (8, 8), (8, 8))) == pytest.approx(forward * 2.5)
    assert count_flops(trace(jax.grad(jax.checkpoint(loss)), (8, 8), (8, 8))) > forward * 2.5


def test_flops_of_a_convolutions_gradient_agree_with_xla():
    def loss(kernel, x):
        return jnp.sum(jnp.sin(conv(x, kernel)))

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 1, 16, 32), (4, 16, 16, 16))]
    compiled = jax.jit(jax.grad(loss)).lower(*shapes).compile().cost_analysis()["flops"]
    assert count_flops(jax.make_jaxpr(jax.grad(loss))(*shapes)) == pytest.approx(compiled, rel=0.1)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A10G", None),
        ("NVIDIA L40S", 362e12),
        ("cpu", None),
    ],
)
def test_peak_of_a_device(kind, peak):
    assert peak_flops(kind) == peak


# ---- The estimate.


def test_argument_bytes_match_the_real_state_on_one_device(wide, estimated):
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
    batch, key = 16 // 8 * tiny.CROP**2 * 3, 8
    assert memory["arguments"] == held + batch + key
    assert memory["peak"] == memory["arguments"] + memory["temporaries"]
    assert estimated["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(state.params))


def test_the_evaluation_counts_the_rest_of_the_training_state(estimated):
    train, sample = (estimated["programs"][name] for name in ("train", "sample"))
    batch, key = 16 // 8 * tiny.CROP**2 * 3, 8
    state = train["memory"]["arguments"] - batch - key
    weights = sample["memory"]["arguments"] - 8 // 8 * tiny.CROP**2 * 3 - key
    assert sample["other_state"] == state - weights > 2.9 * weights
    assert sample["peak"] == sample["memory"]["peak"] + sample["other_state"]
    assert train["other_state"] == 0


@pytest.mark.parametrize("program", ["train", "sample"])
def test_the_estimate_is_near_the_compiled_program_on_one_device(program):
    small = read(model={"channels": 16}, data={"crop": 64}, train={"batch_size": 4}, eval={"num_images": 4})
    found = planning.plan(small, topologies.parse("cpu:1"), programs=(program,))["programs"][program]
    mesh = make_mesh(devices=jax.devices()[:1])
    make = programs.train_program if program == "train" else programs.sample_program
    jitted, arguments = make(small, mesh)
    traced = jitted.trace(*arguments)
    stats = traced.lower().compile().memory_analysis()
    assert found["memory"]["arguments"] == stats.argument_size_in_bytes
    assert 1 / 3.5 < found["memory"]["temporaries"] / stats.temp_size_in_bytes < 3.5
    assert found["flops"] == pytest.approx(count_flops(traced.jaxpr), rel=0.25)


def test_flops_follow_the_batch_size_and_the_sampling_steps():
    def flops(program, **sections):
        return planning.plan(read(**sections), CPU8, programs=(program,))["programs"][program]["flops"]

    one = flops("train")
    assert flops("train", train={"batch_size": 32}) == pytest.approx(4 * one)
    assert flops("train", train={"batch_size": 32, "accumulation": 4}) == pytest.approx(4 * one)
    two, six = (flops("sample", sampling={"steps": steps}) for steps in (2, 6))
    assert two == pytest.approx(6 * (six - two) / 4)  # two steps, and four passes of the loss of eight images


def test_recomputation_and_accumulation_reduce_the_temporaries():
    def temporaries(**sections):
        found = planning.plan(read(**sections), CPU8, programs=("train",))
        return found["programs"]["train"]["memory"]["temporaries"]

    large = {"batch_size": 64}
    plain = temporaries(train=large)
    assert temporaries(train=large, model={"remat": True}) < plain
    assert temporaries(train=large | {"accumulation": 4}) < plain


def test_the_training_program_takes_the_real_state(wide):
    mesh = make_mesh(**wide.config["mesh"])
    _, (state, batch, key) = programs.train_program(wide, mesh)
    real = create_state(wide.init_params, wide.optimizer(), jax.random.key(0), mesh)
    same = jax.tree.map(
        lambda a, b: (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding), state, real
    )
    assert all(jax.tree.leaves(same))
    assert batch["image"].shape == (16, tiny.CROP, tiny.CROP, 3) and key.dtype == jax.random.key(0).dtype


def test_a_batch_that_does_not_divide_over_the_chips_is_an_error():
    with pytest.raises(UserError, match="16"):
        planning.plan(read(), V6E, estimate=True)


# ---- The verdict.


def test_the_state_is_sharded_by_the_rule():
    shapes = [(MB4, 4), ((1000,), 4), ((3, 3, 511, 513), 4)]
    small, odd = 4000, 3 * 3 * 511 * 513 * 4
    assert programs.state_bytes(shapes, 1) == 4 * 2**20 + small + odd
    assert programs.state_bytes(shapes, 8) == 2**19 + small + odd  # 8 divides no axis of the last array
    assert programs.state_bytes(shapes, 3) == 4 * 2**20 + small + odd // 3


def test_a_job_that_does_not_fit_gets_a_suggestion():
    given = read(train={"batch_size": 64})
    peak = planning.plan(given, CPU8, programs=("train",))["programs"]["train"]["peak"]
    small = topologies.Topology("cpu:8", topologies.Chip("cpu", "cpu", memory=peak - 1), (8,))
    found = planning.plan(given, small, programs=("train",))
    assert not found["fits"] and found["programs"]["train"]["peak"] == peak
    assert found["programs"]["train"]["suggestion"]["overrides"] == ["--config.model.dtype=bfloat16"]
    assert "DOES NOT FIT" in report(found) and "--config.model.dtype=bfloat16" in report(found)
    enough = topologies.Topology("cpu:8", topologies.Chip("cpu", "cpu", memory=peak), (8,))
    assert planning.plan(given, enough, programs=("train",))["fits"]


def test_fsdp_covers_whole_sides_of_a_slice():
    assert planning.fsdp_sizes(V6E) == [1, 4, 16]
    assert planning.fsdp_sizes(topologies.parse("v4:2x2x4")) == [1, 2, 4, 8, 16]
    assert planning.fsdp_sizes(topologies.parse("gpu:6xh100")) == [1, 2, 3, 6]
    assert planning.fsdp_sizes(topologies.parse("gpu:64xh100")) == [1, 2, 4, 8]


def suggest(*, state, temporaries, topology=V6E, fsdp=1, program="train", **sections):
    return planning.suggest(
        experiment.complete(tiny.config(**sections)),
        topology,
        fsdp=fsdp,
        resident=lambda size: int(state / size),
        temporaries=int(temporaries),
        program=program,
    )


def test_a_large_state_is_sharded_no_more_than_needed():
    change = suggest(state=40 * GIB, temporaries=2 * GIB)
    assert change == {"overrides": ["--config.mesh.fsdp=4"], "bytes": 12 * GIB, "enough": True}
    change = suggest(state=200 * GIB, temporaries=2 * GIB)
    assert change["overrides"] == ["--config.mesh.fsdp=16"]
    change = suggest(state=2000 * GIB, temporaries=2 * GIB, train={"batch_size": 16})
    assert not change["enough"] and change["overrides"][0] == "--config.mesh.fsdp=16"


def test_suggestions_for_activations_are_bfloat16_then_remat_then_accumulation():
    given = {"state": GIB, "train": {"batch_size": 256}}
    float32, remat = {"dtype": "float32"}, {"dtype": "bfloat16", "remat": True}
    assert suggest(temporaries=40 * GIB, model=float32, **given)["overrides"] == [
        "--config.model.dtype=bfloat16"
    ]
    assert suggest(temporaries=100 * GIB, model=float32, **given)["overrides"] == [
        "--config.model.dtype=bfloat16",
        "--config.model.remat=True",
    ]
    change = suggest(temporaries=60 * GIB, model=remat, **given)
    assert change == {"overrides": ["--config.train.accumulation=4"], "bytes": 16 * GIB, "enough": True}
    # 16 examples per chip: they can't be split further than one at a time.
    change = suggest(temporaries=1000 * GIB, model=remat, **given)
    assert change["overrides"] == ["--config.train.accumulation=16"] and not change["enough"]


def test_no_suggestion_where_no_setting_helps():
    remat = {"dtype": "bfloat16", "remat": True}
    change = suggest(state=GIB, temporaries=40 * GIB, model=remat, train={"batch_size": 16})
    assert change == {"overrides": [], "bytes": 41 * GIB, "enough": False}


def test_the_suggestion_for_sampling_is_fewer_images_and_no_change_of_training():
    change = suggest(
        state=GIB,
        temporaries=60 * GIB,
        program="sample",
        eval={"num_images": 256},
        model={"dtype": "bfloat16"},
    )
    assert change["overrides"] == ["--config.eval.num_images=112"] and change["enough"]


@pytest.mark.parametrize("topology", [V6E, topologies.parse("v5e:16x16"), topologies.parse("gpu:8xh100")])
def test_suggestions_are_valid_configs(topology):
    tried = 0
    for state, temporaries, fsdp, program in itertools.product(
        (1, 20, 200), (1, 30, 100, 3000), (1, 4), ("train", "sample")
    ):
        sections = {"train": {"batch_size": 512, "accumulation": 1}, "eval": {"num_images": 512}}
        change = suggest(
            state=state * GIB,
            temporaries=temporaries * GIB,
            topology=topology,
            fsdp=fsdp,
            program=program,
            **sections,
        )
        changed = experiment.complete(tiny.config(**sections))
        for override in change["overrides"]:
            path, _, value = override.removeprefix("--config.").partition("=")
            section, field = path.split(".")
            changed[section][field] = {"True": True, "bfloat16": "bfloat16"}.get(value) or int(value)
        experiment.check_batch(changed, devices=topology.count, processes=1)
        mesh_sizes(topology.count, **changed["mesh"])  # does not fail
        assert change["enough"] == (change["bytes"] <= topology.memory)
        tried += bool(change["overrides"])
    assert tried > 5


# ---- The compiler's out-of-memory errors.


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
def test_the_compilers_out_of_memory_error_is_parsed(message, size):
    assert programs.out_of_memory(message) == (None if size is None else int(size))


class FailsToCompile:
    """A jitted program whose compilation fails with a given message."""

    def __init__(self, message: str) -> None:
        self.message, self.jaxpr = message, jax.make_jaxpr(lambda x: x @ x)(np.ones((4, 4), np.float32))

    def trace(self, *arguments):
        return self

    def lower(self, **options):
        return self

    def compile(self, **options):
        raise jax.errors.JaxRuntimeError(self.message)


def compile_failing(message):
    weights = jax.ShapeDtypeStruct((2**20,), np.float32)
    return programs.compile_program(
        (FailsToCompile(message), (weights,)),
        title="training step",
        platform="tpu",
        options={},
        watch=lambda title: contextlib.nullcontext(),
    )


@pytest.mark.parametrize(
    ("message", "peak", "suggested"),
    [
        ("RESOURCE_EXHAUSTED: Ran out. Used 40.00G of 31.25G hbm. Exceeded", 40 * 2**30, True),
        (
            "RESOURCE_EXHAUSTED: HLO temporaries (40.00G) exceeds available HBM (31.25G).",
            40 * 2**30 + 2**22,
            True,
        ),
        ("RESOURCE_EXHAUSTED: Ran out. Used 20.0M of 16.0M vmem.", None, False),  # not the chip's main memory
    ],
)
def test_a_program_that_is_out_of_memory_does_not_fit(message, peak, suggested, monkeypatch):
    found = compile_failing(message)
    assert peak in (None, found["memory"]["peak"]) and found["flops"] == 2 * 4**3
    monkeypatch.setattr(programs, "estimate_program", lambda *_: found)  # the verdict, without libtpu
    result = planning.plan(read(train={"batch_size": 64}), V6E, programs=("train",), estimate=True)
    assert not result["fits"] and (result["programs"]["train"]["peak"] > V6E.memory) == suggested
    overrides = result["programs"]["train"]["suggestion"]["overrides"]
    assert overrides[:1] == ["--config.model.dtype=bfloat16"] * suggested
    assert "RESOURCE_EXHAUSTED" in report(result)


def test_other_compiler_errors_propagate():
    with pytest.raises(jax.errors.JaxRuntimeError, match="UNIMPLEMENTED"):
        compile_failing("UNIMPLEMENTED: something")


# ---- The cache.


def test_results_are_cached_and_refreshed(tmp_path):
    first = planning.plan(read(), CPU8, cache=tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2  # one per program
    for file in files:  # a recognizable value, to see which results are reused
        file.write_text(json.dumps(json.loads(file.read_text()) | {"flops": 7.0}))
    assert planning.plan(read(), CPU8, cache=tmp_path)["programs"]["train"]["flops"] == 7.0
    only = planning.plan(read(), CPU8, cache=tmp_path, programs=("train",), refresh=True)
    assert only["programs"] == {"train": first["programs"]["train"]}
    assert planning.plan(read(), CPU8, cache=tmp_path)["programs"]["sample"]["flops"] == 7.0
    for file in files:
        file.write_text("{half")
    assert planning.plan(read(), CPU8, cache=tmp_path) == json.loads(json.dumps(first))


def test_the_cache_key_depends_on_what_the_program_depends_on(monkeypatch):
    def key(topology="cpu:8", **sections):
        return planning.cache_key(read(**sections).config, topology=topology)

    same = [
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
        key(sampling={"steps": 3}),
        key(data={"crop": 32}),
    ]
    assert len({key(), *other}) == 8
    before = key()
    monkeypatch.setattr(planning, "versions", lambda: {"jax": "0.0"})
    assert key() != before


def test_a_cache_that_cannot_be_written_does_not_lose_the_result(tmp_path):
    (tmp_path / "plans").write_text("a file instead of the folder")
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
    assert "FITS" in text and "gpu:8xh100" in text
    assert written["batch_size"] == 32 and written["name"] == "tiny_config" and written["estimate"]
    assert written["command"].endswith("--topology=gpu:8xh100 --config.train.batch_size=32 --only=train")
    assert set(written["programs"]) == {"train"}
    assert set(written["programs"]["train"]["versions"]) >= {"sr3_jax", "jax", "flax"}


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--topology=v5e:3x3"], "--topology=v5e:3x3"),
        (["--topology=cpu:3"], "3 devices"),
        (["--topology=cpu:8", "--config.mesh.fsdp=3"], "mesh.fsdp=3"),
        (["--topology=gpu:2x4xh100", "--config.mesh.fsdp=8"], "nodes of 4"),
        (["--topology=cpu:8", "--config.model.channel=3"], "channels"),
        (["--topology=cpu:8", "--only=eval"], "--only"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(config_file, options, field, capsys):
    assert main.main(["plan", f"--config={config_file}", *options]) == 2
    error = capsys.readouterr().err
    assert field in error and "Traceback" not in error and error.count("\n") == 1


def test_exit_code_1_when_the_job_does_not_fit(config_file, monkeypatch, capsys):
    chip = topologies.Chip("cpu", "cpu", memory=1000)
    monkeypatch.setitem(topologies.CHIPS, "cpu", chip)
    assert main.main(["plan", f"--config={config_file}", "--topology=cpu:8", "--only=sample"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_long_work_reports_progress(monkeypatch, capsys):
    monkeypatch.setattr(command, "LINE_EVERY", 0.05)
    with command.watch("compiling the training step"):
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line.startswith("compiling the training step: ") for line in lines)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(command, "LINE_EVERY", 60)
    with command.watch("quick"):
        pass
    assert "quick:" not in capsys.readouterr().err


# ---- libtpu.

# ---- sr3 train --dry-run.


def dry_run(workdir, *options):
    synthetic = "--config.data.source=synthetic:100x24x24", "--config.data.eval_source=synthetic:8x24x24"
    return main.main(["train", f"--workdir={workdir}", "--dry-run", *synthetic, *options])


def test_dry_run_checks_everything_and_trains_nothing(config_file, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert dry_run(workdir, f"--config={config_file}") == 0
    out = capsys.readouterr().out
    for found in ("synthetic:100x24x24: 100 images", f"{workdir}: starts at step 0 of 4", "FITS"):
        assert found in out
    assert [path.name for path in workdir.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    "option",
    [
        "--config.train.batch_size=7",
        "--config.data.source=folder:absent",
        "--config.model.num_classes=3",
        "--config.train.init_from=absent",
    ],
)
def test_dry_run_finds_what_would_stop_a_run(option, config_file, tmp_path, capsys):
    assert dry_run(tmp_path / "run", f"--config={config_file}", option) == 2
    assert option.rpartition("=")[2].removeprefix("folder:") in capsys.readouterr().err


def test_dry_run_of_a_run_that_exists(config_file, tmp_path, capsys):
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    config = read().config
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert dry_run(tmp_path, f"--config={config_file}") == 0
    assert "resumes at step 3" in capsys.readouterr().out
    assert dry_run(tmp_path, f"--config={config_file}", "--config.data.scale=2") == 2
    assert "config.data.scale" in capsys.readouterr().err


def test_dry_run_of_a_job_that_does_not_fit_is_a_user_error(config_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(topologies, "device_memory", lambda: 1000)
    assert dry_run(tmp_path, f"--config={config_file}") == 2  # launchers restart a job that exits with 1
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.filterwarnings("error:.*persistent compilation cache")
def test_a_tiny_network_compiles_for_a_slice(tmp_path):
    pytest.importorskip("libtpu")
    topology = topologies.parse("v5e:2x2")
    given = read(
        train={"batch_size": 8, "accumulation": 2}, model={"dtype": "bfloat16"}, sampling={"steps": 3}
    )
    found = planning.plan(given, topology, cache=tmp_path)
    train, sample = (found["programs"][name] for name in ("train", "sample"))
    assert found["fits"] and not found["estimate"]
    memory = train["memory"]
    assert memory["aliased"] > 0.9 * memory["outputs"]  # the new state reuses the memory of the old one
    assert memory["peak"] > memory["arguments"] > 0
    estimate = planning.plan(given, topology, estimate=True)["programs"]
    assert train["flops"] == pytest.approx(estimate["train"]["flops"], rel=0.25)
    assert sample["flops"] == pytest.approx(estimate["sample"]["flops"], rel=0.25)
    assert "libtpu" in train["versions"] and train["seconds_to_compile"] > 0
    assert planning.plan(given, topology, cache=tmp_path) == json.loads(json.dumps(found))
