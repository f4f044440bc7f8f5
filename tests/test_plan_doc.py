"""The table of plans in docs/pods.md."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import tiny

from sr3_jax.planning import plan as planning
from sr3_jax.planning import topologies
from sr3_jax.train import experiment


def test_the_table_in_the_docs_is_written_between_its_markers(tmp_path):
    given = tiny.config(train={"batch_size": 16}, mesh={"fsdp": 4})
    estimated = planning.plan(experiment.read(given), topologies.parse("cpu:8"))
    path = Path(__file__).resolve().parent.parent / "launch" / "plan_doc.py"
    spec = importlib.util.spec_from_file_location("plan_doc", path)
    doc = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(doc)
    page = tmp_path / "pods.md"
    page.write_text(f"Before.\n{doc.BEGIN}\nold\n{doc.END}\nAfter.\n")

    calls = []

    def run(arguments):
        """Fits only with accumulation 2, which the first plan suggests."""
        calls.append(arguments)
        fits = "--config.train.accumulation=2" in arguments
        suggestion = {"overrides": ["--config.train.accumulation=2"], "bytes": 1, "enough": True}
        train = {**estimated["programs"]["train"], "fits": fits, "seconds_to_compile": 12.0}
        train |= planning.provenance() | ({} if fits else {"suggestion": suggestion})
        named = {"name": "faces_16_128", "command": "sr3 " + " ".join(arguments)}
        return {**estimated, **named, "topology": "v5e:16x16", "fits": fits, "programs": {"train": train}}

    doc.compute("faces_16_128", "v5e:16x16", "train", run=run, folder=tmp_path)
    assert len(calls) == 2
    doc.write(page, tmp_path)
    text = page.read_text()
    assert text.startswith("Before.\n") and text.endswith(f"{doc.END}\nAfter.\n") and "old" not in text
    assert text.count("| faces_16_128 | v5e:16x16 | 2 x 4 |") == 1 and "| FITS |" in text
    doc.write(page, tmp_path)
    assert page.read_text() == text
