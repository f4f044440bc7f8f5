"""What costs mean: seconds by law, state by the sharding rule, and advice that is enough, valid and no more."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import tiny

from sr3_jax.config.load import complete
from sr3_jax.planning import topologies, verdict
from sr3_jax.train import experiment

V6E = topologies.parse("v6e:4x4")
GIB = 2**30
MB4 = (1024, 1024)  # float32: 4 MB, the least that is sharded


def config(**sections):
    return complete(tiny.config(**sections))


def test_seconds_are_the_longest_and_the_sum_of_three():
    chip = topologies.Chip("x", "tpu", GIB, flops=100.0, bandwidth=10.0, interconnect=1.0)
    found = verdict.seconds(chip, flops=200.0, memory=16.0, interconnect=0.5)
    assert found == pytest.approx({"flops": 4.0, "memory": 2.0, "interconnect": 1.0, "low": 4.0, "high": 7.0})
    assert verdict.seconds(topologies.CHIPS["cpu"], flops=1.0, memory=1.0, interconnect=1.0) is None


def test_state_is_sharded_by_the_rule():
    shapes = [(MB4, 4), ((1000,), 4), ((3, 3, 511, 513), 4)]
    small, odd = 4000, 3 * 3 * 511 * 513 * 4
    assert verdict.state_bytes(shapes, 1) == 4 * 2**20 + small + odd
    assert verdict.state_bytes(shapes, 8) == 2**19 + small + odd  # 8 divides no side of the last
    assert verdict.state_bytes(shapes, 3) == 4 * 2**20 + small + odd // 3


def test_weight_traffic_by_hand():
    options = {"data": 2, "fsdp": 4, "rounds": 3, "itemsize": 2}
    training = verdict.weight_traffic([(MB4, 4), ((10,), 4)], gradients=True, **options)
    size = 2 * 2**20  # in bfloat16
    assert training == {
        "all-gather": [6, pytest.approx(6 * size * 3 / 4)],
        "reduce-scatter": [3, pytest.approx(3 * size * 3 / 4)],
        "all-reduce": [6, pytest.approx(3 * size / 4 + 3 * 2 * 7 / 8 * 40)],
    }
    sampling = verdict.weight_traffic([(MB4, 4), ((10,), 4)], gradients=False, **options)
    assert sampling == {"all-gather": [3, pytest.approx(3 * size * 3 / 4)]}
    assert verdict.weight_traffic([(MB4, 4)], data=1, fsdp=1, rounds=1, itemsize=4, gradients=True) == {}


def test_rings_lie_along_whole_sides():
    assert verdict.fsdp_sizes(V6E) == [1, 4, 16]
    assert verdict.fsdp_sizes(topologies.parse("v4:2x2x4")) == [1, 2, 4, 8, 16]
    assert verdict.fsdp_sizes(topologies.parse("gpu:6xh100")) == [1, 2, 3, 6]


def advise(*, state, temporaries, topology=V6E, fsdp=1, program="train", **sections):
    return verdict.advise(
        config(**sections),
        topology,
        fsdp=fsdp,
        resident=lambda size: int(state / size),
        temporaries=int(temporaries),
        program=program,
    )


def test_a_state_that_is_too_large_is_sharded_no_more_than_needed():
    change = advise(state=40 * GIB, temporaries=2 * GIB)
    assert change == {"overrides": ["--config.mesh.fsdp=4"], "bytes": 12 * GIB, "enough": True}
    change = advise(state=200 * GIB, temporaries=2 * GIB)
    assert change["overrides"] == ["--config.mesh.fsdp=16"]
    change = advise(state=2000 * GIB, temporaries=2 * GIB, train={"batch_size": 16})
    assert not change["enough"] and change["overrides"][0] == "--config.mesh.fsdp=16"


def test_activations_are_narrowed_then_recomputed_then_split():
    given = {"state": GIB, "train": {"batch_size": 256}}
    wide, remat = {"dtype": "float32"}, {"dtype": "bfloat16", "remat": True}
    assert advise(temporaries=40 * GIB, model=wide, **given)["overrides"] == ["--config.model.dtype=bfloat16"]
    assert advise(temporaries=100 * GIB, model=wide, **given)["overrides"] == [
        "--config.model.dtype=bfloat16",
        "--config.model.remat=True",
    ]
    change = advise(temporaries=60 * GIB, model=remat, **given)
    assert change == {"overrides": ["--config.train.accumulation=4"], "bytes": 16 * GIB, "enough": True}
    # 16 examples a chip: beyond one at a time there is nothing left to split.
    change = advise(temporaries=1000 * GIB, model=remat, **given)
    assert change["overrides"] == ["--config.train.accumulation=16"] and not change["enough"]


def test_no_way_out_is_said():
    remat = {"dtype": "bfloat16", "remat": True}
    change = advise(state=GIB, temporaries=40 * GIB, model=remat, train={"batch_size": 16})
    assert change == {"overrides": [], "bytes": 41 * GIB, "enough": False}


def test_sampling_takes_fewer_images_and_never_touches_training():
    change = advise(
        state=GIB,
        temporaries=60 * GIB,
        program="sample",
        eval={"num_images": 256},
        model={"dtype": "bfloat16"},
    )
    assert change["overrides"] == ["--config.eval.num_images=112"] and change["enough"]


@pytest.mark.parametrize("topology", [V6E, topologies.parse("v5e:16x16"), topologies.parse("gpu:8xh100")])
def test_advice_is_always_a_config_that_can_run(topology):
    tried = 0
    for state, temporaries, fsdp, program in itertools.product(
        (1, 20, 200), (1, 30, 100, 3000), (1, 4), ("train", "sample")
    ):
        sections = {"train": {"batch_size": 512, "accumulation": 1}, "eval": {"num_images": 512}}
        change = advise(
            state=state * GIB,
            temporaries=temporaries * GIB,
            topology=topology,
            fsdp=fsdp,
            program=program,
            **sections,
        )
        changed = config(**sections)
        for override in change["overrides"]:
            section, field = override.removeprefix("--config.").partition("=")[0].split(".")
            changed[section][field] = experiment.parse(section, field, override.partition("=")[2])
        experiment.check_batch(changed, devices=topology.count, processes=1)
        assert topology.count % changed["mesh"]["fsdp"] == 0
        assert change["enough"] == (change["bytes"] <= topology.memory)
        assert changed["mesh"]["fsdp"] >= 1
        tried += bool(change["overrides"])
    assert tried > 5


def test_a_larger_chip_needs_no_more_changes():
    larger = dataclasses.replace(V6E, chip=dataclasses.replace(V6E.chip, memory=400 * GIB))
    assert advise(state=40 * GIB, temporaries=200 * GIB, topology=larger)["overrides"] == []
