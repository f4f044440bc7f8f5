"""Evaluations as text: intervals, aligned tables, CSV, and the protocol."""

from __future__ import annotations

import csv
import io
import math

import numpy as np
import pytest

from sr3_jax.evaluation import results
from sr3_jax.metrics import METRICS


def row(method="bicubic", *, solver=None, steps=None, mean=20.0, low=19.0, high=21.0):
    ends = {"mean": mean, "low": low, "high": high}
    return {
        "method": method,
        "scale": 4,
        "solver": solver,
        "steps": steps,
        "nfe": steps or 0,
        "summary": {key: dict(ends) for key in METRICS},
    }


def evaluation(rows, **how):
    protocol = {"source": "photos:test", "images": 3, "samples": 1, "seed": 7, "crop": None}
    model = {"label": "m", "name": "m.safetensors", "scale": 4, "parameters": 2_500_000, "sha256": "ab" * 32}
    return {"protocol": protocol | how, "hardware": "some CPU", "models": [model], "rows": rows}


def test_bootstrap_interval_matches_the_normal_approximation():
    values = np.random.default_rng(3).normal(5.0, 2.0, 400)
    found = results.bootstrap(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert found["mean"] == pytest.approx(values.mean())
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert found == results.bootstrap(values)


def test_rows_over_the_same_images_share_resamples():
    values = np.random.default_rng(0).normal(size=12)
    shifted = results.bootstrap(values + 3.0)
    assert shifted == pytest.approx({key: end + 3.0 for key, end in results.bootstrap(values).items()})


def test_bootstrap_of_one_value_and_of_infinite_values():
    assert results.bootstrap(np.array([4.0])) == {"mean": 4.0, "low": 4.0, "high": 4.0}
    found = results.bootstrap(np.array([20.0, 30.0, math.inf]))
    assert found["mean"] == found["high"] == math.inf
    assert found["low"] >= 20.0


def test_table_is_aligned_markdown():
    rows = [row(), row("a-long-name", solver="dpmpp_2m", steps=100, mean=0.123456)]
    lines = results.rows_table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert {tuple(i for i, c in enumerate(line) if c == "|") for line in lines} == {
        tuple(i for i, c in enumerate(lines[0]) if c == "|")
    }
    rule = [cell.strip() for cell in lines[1].strip("|").split("|")]
    assert all(len(cell) >= 3 and set(cell) <= {"-", ":"} for cell in rule)
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert cells[:7] == ["a-long-name", "4x", "dpmpp_2m", "100", "100", "0.12", "0.1235"]
    assert [cell.strip() for cell in lines[2].strip("|").split("|")][2:5] == ["", "", "0"]


def test_intervals_and_infinite_values_are_formatted():
    text = results.rows_table([row(low=19.994, high=None)], intervals=True)
    assert "19.99..inf" in text and "19.9940..inf" in text


def test_csv_has_full_precision():
    rows = [row(), row("m", solver="ddim", steps=5, mean=1 / 3, high=None)]
    read = list(csv.DictReader(io.StringIO(results.comma_separated(evaluation(rows)))))
    assert [line["method"] for line in read] == ["bicubic", "m"]
    assert (read[0]["solver"], read[1]["solver"], read[1]["steps"]) == ("", "ddim", "5")
    assert float(read[1]["ssim_luma_mean"]) == 1 / 3 and float(read[1]["psnr_high"]) == math.inf


def test_page_describes_the_protocol():
    text = results.markdown(evaluation([row()], samples=2, crop=64))
    wanted = [
        "3 images of photos:test",
        "center 64x64",
        "2 outputs each",
        "seed 7",
        "some CPU",
        "2.50 M parameters",
    ]
    wanted += [METRICS[key].protocol for key in ("psnr", "psnr_luma", "consistency", "diversity")]
    assert [words for words in wanted if words not in text] == []
    assert "1 image of photos:test" in results.markdown(evaluation([row()], images=1))


def test_metric_that_some_rows_lack_is_blank_there():
    rows = [row(), row("m", solver="ddim", steps=5)]
    for one in rows:
        one["summary"] = {"psnr": one["summary"]["psnr"]}
    rows[1]["summary"] |= {"fid": {"mean": 3.25}, "diversity": {"mean": 1.0, "low": 0.5, "high": 1.5}}
    rows[1]["detail"] = "spacing karras"
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in results.rows_table(rows).splitlines()
    ]
    assert lines[0][5:] == ["PSNR", "FID", "diversity"]
    assert lines[2][5:] == ["20.00", "", ""] and lines[3][2:] == [
        "ddim (spacing karras)", "5", "5", "20.00", "3.25", "1.00"
    ]  # fmt: skip
    text = results.rows_table(rows, intervals=True).splitlines()[3]
    assert "| 3.25 |" in " ".join(text.split()) and "0.50..1.50" in text
    read = list(csv.DictReader(io.StringIO(results.comma_separated(evaluation(rows)))))
    assert (read[0]["fid_mean"], read[1]["fid_mean"], read[1]["fid_low"]) == ("", "3.25", "")
    assert "ssim_mean" not in read[0]


def test_protocol_names_each_network_with_its_weights():
    networks = {
        "lpips": {"network": "lpips_alex", "sha256": "1" * 64},
        "classifier": {"network": "clothes", "sha256": "2" * 64, "classes": 10},
        "features": {
            "network": "alexnet", "sha256": "3" * 64, "distance": "frechet_alexnet", "preprocessing": "as is",
            "count": 3, "reference": "", "subset": 1000, "splits": 10, "resamples": 50,
        },
        "omitted": ["IS is omitted: no logits."],
        "batch": 16,
        "processes": 2,
    }  # fmt: skip
    rows = [row(), row("ground truth")]
    text = " ".join(results.protocol(evaluation(rows, **networks)))
    wanted = ["lpips_alex, weights sha256 1111", "clothes, weights sha256 2222222222222222, 10 classes"]
    wanted += ["alexnet, weights sha256 3333", "N = 3", "own ground truth", "IS is omitted"]
    wanted += ["batches of 16", "2 processes", "one random half of the images"]
    assert [words for words in wanted if words not in text] == []
    networks["features"]["reference"] = "real.npz (900 images)"
    text = " ".join(results.protocol(evaluation(rows, **networks)))
    assert "real.npz (900 images)" in text and "random half" not in text
