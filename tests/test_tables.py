"""Evaluations as text: intervals, tables that line up, files that other programs read."""

from __future__ import annotations

import csv
import io
import math

import numpy as np
import pytest

from sr3_jax.evaluation import tables


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
    protocol = {"source": "photos:test", "images": 3, "samples": 1, "seed": 7, "crop": None}
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


def test_rows_over_the_same_images_see_the_same_resamples():
    values = np.random.default_rng(0).normal(size=12)
    shifted = tables.bootstrap(values + 3.0)
    assert shifted == pytest.approx({key: end + 3.0 for key, end in tables.bootstrap(values).items()})


def test_one_value_is_its_own_interval_and_an_infinite_one_gives_no_nan():
    assert tables.bootstrap(np.array([4.0])) == {"mean": 4.0, "low": 4.0, "high": 4.0}
    found = tables.bootstrap(np.array([20.0, 30.0, math.inf]))
    assert found["mean"] == found["high"] == math.inf
    assert found["low"] >= 20.0


def test_samples_of_a_image_are_averaged_before_images_are_resampled():
    noisy = np.array([[0.0, 10.0], [10.0, 0.0], [5.0, 5.0]])  # equal images, whose samples differ
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
    wanted = ["3 images of photos:test, the centre 64x64", "2 outputs each", "seed 7", "BT.601", "8 bits"]
    wanted += [
        "RGB, 0-255, no border crop",
        "a slide rule",
        "95% intervals from 1000",
        "2,500,000 weights",
    ]
    assert [words for words in wanted if words not in text] == []
    assert "1 image of Set14" in tables.markdown(evaluation([row()], images=1), source="Set14")


def test_a_column_that_only_some_rows_have_is_blank_elsewhere():
    rows = [row(), row("m", solver="ddim", steps=5)]
    for one in rows:
        one["summary"] = {"psnr": one["summary"]["psnr"]}
    rows[1]["summary"] |= {"fid": {"mean": 3.25}, "diversity": {"mean": 1.0, "low": 0.5, "high": 1.5}}
    rows[1]["detail"] = "spacing karras"
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in tables.means_table(rows).splitlines()
    ]
    assert lines[0][5:] == ["PSNR", "FID", "diversity"]
    assert lines[2][5:] == ["20.00", "", ""] and lines[3][2:] == [
        "ddim (spacing karras)", "5", "5", "20.00", "3.25", "1.00"
    ]  # fmt: skip
    text = tables.intervals_table(rows).splitlines()[3]
    assert "| 3.25 |" in " ".join(text.split()) and "0.50..1.50" in text
    read = list(csv.DictReader(io.StringIO(tables.comma_separated(evaluation(rows)))))
    assert (read[0]["fid_mean"], read[1]["fid_mean"], read[1]["fid_low"]) == ("", "3.25", "")
    assert "ssim_mean" not in read[0]


def test_each_network_is_named_with_its_weights_and_the_reference():
    networks = {
        "lpips": {"network": "lpips_alex", "sha256": "1" * 64},
        "classifier": {"network": "clothes", "sha256": "2" * 64, "classes": 10},
        "features": {
            "network": "alexnet", "sha256": "3" * 64, "distance": "frechet_alexnet", "preprocessing": "as is",
            "count": 3, "reference": "their own originals", "original": "", "subset": 1000, "splits": 10,
            "resamples": 50,
        },
        "absent": ["IS is left out: no logits."],
        "batch": 16,
        "processes": 2,
    }  # fmt: skip
    text = " ".join(tables.protocol(evaluation([row(), row("original")], **networks)))
    wanted = ["lpips_alex, weights sha256 1111", "clothes, weights sha256 2222222222222222, 10 classes"]
    wanted += ["alexnet, weights sha256 3333", "N = 3 in every row, to their own originals", "IS is left out"]
    wanted += [
        "16 at a time, the batch's time divided by 16",
        "2 processes",
        "one random half of the original images",
    ]
    assert [words for words in wanted if words not in text] == []
    assert "KID (AlexNet): kernel" in text and "FID:" not in text
