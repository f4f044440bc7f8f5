"""Evaluations as text: intervals, tables that line up, files that other programs read."""

from __future__ import annotations

import csv
import io
import math

import numpy as np
import pytest

from sr3_jax import tables


def row(method="bicubic", *, solver=None, steps=None, mean=20.0, low=19.0, high=21.0):
    ends = {"mean": mean, "low": low, "high": high}
    return {
        "method": method,
        "scale": 4,
        "solver": solver,
        "steps": steps,
        "evaluations": steps or 0,
        "summary": {column.key: dict(ends) for column in tables.COLUMNS},
    }


def evaluation(rows, **how):
    protocol = {"source": "photos:test", "pictures": 3, "samples": 1, "seed": 7, "crop": None}
    model = {"label": "m", "name": "m.safetensors", "scale": 4, "parameters": 2_500_000, "sha256": "ab" * 32}
    return {"protocol": protocol | how, "hardware": "a slide rule", "models": [model], "rows": rows}


def test_the_interval_of_normal_values_is_that_of_their_mean():
    values = np.random.default_rng(3).normal(5.0, 2.0, 400)
    found = tables.bootstrap(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert found["mean"] == pytest.approx(values.mean())
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert found == tables.bootstrap(values)


def test_rows_over_the_same_pictures_see_the_same_resamples():
    values = np.random.default_rng(0).normal(size=12)
    shifted = tables.bootstrap(values + 3.0)
    assert shifted == pytest.approx({key: end + 3.0 for key, end in tables.bootstrap(values).items()})


def test_one_value_is_its_own_interval_and_an_infinite_one_gives_no_nan():
    assert tables.bootstrap(np.array([4.0])) == {"mean": 4.0, "low": 4.0, "high": 4.0}
    found = tables.bootstrap(np.array([20.0, 30.0, math.inf]))
    assert found["mean"] == found["high"] == math.inf
    assert found["low"] >= 20.0


def test_samples_of_a_picture_are_averaged_before_pictures_are_resampled():
    noisy = np.array([[0.0, 10.0], [10.0, 0.0], [5.0, 5.0]])  # equal pictures, whose samples differ
    assert tables.summary({"psnr": noisy})["psnr"] == {"mean": 5.0, "low": 5.0, "high": 5.0}


def test_the_table_lines_up_and_is_markdown():
    rows = [row(), row("a-long-name", solver="dpmpp_2m", steps=100, mean=0.123456)]
    lines = tables.means_table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert {tuple(i for i, c in enumerate(line) if c == "|") for line in lines} == {
        tuple(i for i, c in enumerate(lines[0]) if c == "|")
    }
    rule = [cell.strip() for cell in lines[1].strip("|").split("|")]
    assert all(len(cell) >= 3 and set(cell) <= {"-", ":"} for cell in rule)
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert cells[:7] == ["a-long-name", "4x", "dpmpp_2m", "100", "100", "0.12", "0.1235"]
    assert [cell.strip() for cell in lines[2].strip("|").split("|")][2:5] == ["", "", "0"]


def test_intervals_and_infinite_figures_are_written_out():
    text = tables.intervals_table([row(low=19.994, high=None)])
    assert "19.99..inf" in text and "19.9940..inf" in text
    assert tables.figure(0.00123, None) == "0.00123" and tables.figure(123.4, None) == "123"


def test_csv_holds_every_digit():
    rows = [row(), row("m", solver="ddim", steps=5, mean=1 / 3, high=None)]
    read = list(csv.DictReader(io.StringIO(tables.comma_separated(evaluation(rows)))))
    assert [line["method"] for line in read] == ["bicubic", "m"]
    assert (read[0]["solver"], read[1]["solver"], read[1]["steps"]) == ("", "ddim", "5")
    assert float(read[1]["ssim_luma_mean"]) == 1 / 3 and float(read[1]["psnr_high"]) == math.inf


def test_the_page_says_how_each_figure_was_made():
    text = tables.markdown(evaluation([row()], samples=2, crop=64))
    wanted = ["3 pictures of photos:test, the centre 64x64", "2 outputs each", "seed 7", "BT.601", "8 bits"]
    wanted += [
        "RGB, 0-255, no border crop",
        "a slide rule",
        "95% intervals from 1000",
        "2,500,000 weights",
    ]
    assert [words for words in wanted if words not in text] == []
    assert "1 picture of Set14" in tables.markdown(evaluation([row()], pictures=1), source="Set14")
