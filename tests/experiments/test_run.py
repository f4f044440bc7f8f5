"""An experiment is one command, whose dry run prints all of its commands."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def dry_run(*arguments, **environment):
    return subprocess.run(
        ["bash", str(ROOT / "experiments" / "run.sh"), "--dry-run", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        env={"PATH": "/usr/bin:/bin", **environment},
        check=False,
    )


@pytest.mark.parametrize("name", ["photos", "fashion", "orl"])
def test_an_experiment_uses_existing_configs_and_its_own_models(name):
    ran = dry_run(name, "out/x", *(["images"] if name == "photos" else []))
    assert ran.returncode == 0, ran.stderr
    lines = [line.split() for line in ran.stdout.splitlines()]
    made = set()
    for words in lines:
        made |= {word.partition("=")[2] for word in words if word.startswith("--workdir=")}
        if words[:2] == ["sr3", "export"]:
            assert words[2] in made
            made.add(words[4])
        if words[0] == "cp":
            assert words[1].removesuffix("/best.safetensors") in made
            made.add(words[2])
        for config in (word.partition("=")[2] for word in words if word.startswith("--config=")):
            assert (ROOT / config).is_file()
        assert {words[at + 1] for at, word in enumerate(words) if word == "--model"} <= made
    assert len(made) >= 4
    assert lines[-2][:5] == ["python", "-m", "experiments.collect", "results", name]
    assert lines[-1][:4] == ["python", "-m", "experiments.pages", "results"]


def test_a_rehearsal_of_one_stage_is_short_and_runs_only_that_stage():
    ran = dry_run("fashion", "out/x", SR3_STAGES="train", SR3_REHEARSE="1")
    assert "num_steps=2" in ran.stdout and "evaluate" not in ran.stdout and "make_dataset" not in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "stages", "named"),
    [
        (("cats", "out"), "train", "cats"),
        (("photos", "out"), "train", "PHOTOS"),
        (("fashion",), "train", "OUT"),
        (("orl", "out", "more"), "train", "more"),
        (("orl", "out"), "trian", "trian"),
    ],
)
def test_wrong_arguments_fail_with_one_sentence(arguments, stages, named):
    ran = dry_run(*arguments, SR3_STAGES=stages)
    assert ran.returncode == 2 and named in ran.stderr
    assert ran.stderr.count("\n") == 1 and not ran.stdout
