"""docs/models.md is written from measurements, and refuses those of other weights."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from sr3_jax.config.experiment import read
from sr3_jax.data.sources import open_source
from sr3_jax.evaluation import evaluate
from sr3_jax.evaluation import files as evaluation_files
from sr3_jax.inference.model import load
from sr3_jax.train.weights import export

ROOT = Path(__file__).resolve().parent.parent
FACTS = {
    "name": "tiny_4x",
    "summary": "A model that knows nothing.",
    "commands": ["sr3 train --config=configs/tiny.py --workdir=out/tiny", "sr3 export out/tiny -o tiny"],
    "hardware": "2 cores of a test machine",
    "hours": 1.5,
    "steps": 12345,
    "data": [{"name": "noise", "images": 1234, "licence": "CC0", "link": "https://example.org"}],
    "licence": "Apache-2.0",
    "notes": ["It was never trained."],
}


@pytest.fixture(scope="module")
def models_doc():
    spec = importlib.util.spec_from_file_location("models_doc", ROOT / "launch" / "models_doc.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def weights(path, seed=0):
    experiment = read(tiny.config())
    shapes = jax.eval_shape(experiment.init_params, jax.random.key(0))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    export(path, tiny.perturbed(zeros, seed=seed), experiment.config)
    return load(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Facts, the model's file and a real evaluation of it."""
    folder = tmp_path_factory.mktemp("models_doc")
    model = weights(folder / "tiny_4x.safetensors")
    (folder / "facts.json").write_text(json.dumps(FACTS | {"file": str(folder / "tiny_4x.safetensors")}))
    source = open_source(f"folder:{tiny.images(folder / 'in', count=3, side=40)}")
    methods = [evaluate.bicubic(4), *evaluate.sampled(model, "tiny_4x", steps=[1, 2])]
    done = evaluate.evaluate(methods, source, folder / "eval" / "outputs")
    about = {"source": source.name, "samples": 1, "seed": 0, "crop": None, "seconds": 1.0, "command": ["sr3"]}
    models = [evaluation_files.describe_model(model, "tiny_4x")]
    evaluation_files.write_tables(folder / "eval", evaluation_files.assemble(done, methods, models, **about))
    evaluation_files.write_grids(folder / "eval", done, methods, source, crop=None)
    return folder


def run(models_doc, made, *, facts="facts.json", sets=("Set of 3",), out="docs/models.md", evaluation=None):
    evaluation = evaluation or made / "eval" / "evaluation.json"
    (made / out).parent.mkdir(exist_ok=True)
    named = [part for title in sets for part in ("--set", title, str(evaluation))]
    return models_doc.main([str(made / facts), *named, "-o", str(made / out)])


def test_the_page_holds_the_facts_the_figures_and_the_images(models_doc, made):
    assert run(models_doc, made, sets=("Set of 3", "Again")) == 0
    text = (made / "docs" / "models.md").read_text()
    evaluation = json.loads((made / "eval" / "evaluation.json").read_text())
    for row in evaluation["rows"]:
        assert text.count(f"{row['summary']['psnr']['mean']:.2f} |") >= 2
    wanted = [
        FACTS["summary"],
        *FACTS["commands"],
        *FACTS["notes"],
        "12,345 steps in 1.5 hours",
        "1,234",
        "CC0",
    ]
    wanted += ["[noise](https://example.org)", evaluation["models"][0]["sha256"], "3 images of Again, "]
    assert [words for words in wanted if words not in text] == []
    assert str(made / "in") not in text and text.count("\n| bicubic ") == 4
    assert text.count("BT.601") == 1 and text.count("bootstrap") == 1  # the same for both sets
    linked = [part.split(")")[0] for part in text.split("](images/")[1:]]
    assert len(linked) == 2  # both grids of the first set, none of the second
    assert sorted(linked) == sorted(path.name for path in (made / "docs" / "images").iterdir())
    before = {path: path.read_bytes() for path in (made / "docs").rglob("*.*")}
    assert run(models_doc, made, sets=("Set of 3", "Again")) == 0
    assert before == {path: path.read_bytes() for path in (made / "docs").rglob("*.*")}


def test_figures_of_other_weights_are_refused(models_doc, made, capsys):
    weights(made / "other.safetensors", seed=1)
    facts = FACTS | {"file": str(made / "other.safetensors")}
    (made / "other.json").write_text(json.dumps(facts))
    assert run(models_doc, made, facts="other.json", out="other/models.md") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "is not of" in err and "other.safetensors" in err
    assert not (made / "other" / "models.md").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("{", "is not JSON"), ("[]", "has no name, summary"), ('{"name": "x"}', "has no summary, file")],
)
def test_facts_that_lack_something_are_one_sentence(models_doc, made, capsys, text, sentence):
    (made / "bad.json").write_text(text)
    assert run(models_doc, made, facts="bad.json") == 2
    assert sentence in capsys.readouterr().err
    assert run(models_doc, made, facts="none.json") == 2
    assert "cannot be read" in capsys.readouterr().err


def test_large_images_become_jpegs_of_bounded_size(models_doc, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (700, 900, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    suffix, data = models_doc.fitted(tmp_path / "noise.png")
    assert suffix == ".jpg" and 200_000 < len(data) <= models_doc.LARGEST
    Image.fromarray(noise // 255).save(tmp_path / "plain.png")
    suffix, data = models_doc.fitted(tmp_path / "plain.png")
    assert suffix == ".png" and len(data) <= models_doc.LARGEST
