"""Writes the pages results, models, cascade, pods/plans, reliability, large_images and speed of docs/ from JSON files.

    python -m experiments.pages                  # all of them
    python -m experiments.pages results models   # some of them

The text is in experiments/templates/ and experiments/experiments.toml. Measurements are never typed by hand.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from experiments import figures, findings, plans, solver_by_prediction, tables
from experiments.collect import catalog
from experiments.tables import DOCS, ROOT, read_json
from sr3_jax.errors import UserError
from sr3_jax.files import write_text
from sr3_jax.metrics import METRICS

RESULT_METRICS = ("psnr", "ssim", "lpips", "consistency", "frechet_alexnet", "kid_alexnet", "top1")
JOINED = {  # columns from other runs of an experiment: {run: (metric, heading)}
    "recognition": ("top1", f"{METRICS['top1'].heading}, AlexNet probe"),
    "patches": ("frechet_alexnet", f"{METRICS['frechet_alexnet'].heading}, patches"),
}
MODEL_METRICS = ("psnr", "ssim", "psnr_luma", "ssim_luma", "lpips", "consistency", "seconds")
ORIGINS = {"generated": "generated 8x8", "real": "real 8x8"}
GIB = 2**30


_PEERS_COLUMNS = (
    ("psnr", "PSNR", ".2f"),
    ("ssim", "SSIM", ".3f"),
    ("lpips", "LPIPS", ".3f"),
    ("consistency", "consist.", ".2f"),
    ("seconds", "CPU s/image", ".2f"),
)


def render(template: str, **values: Any) -> str:
    """A page from a template of experiments/templates/; an undefined name in it is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROOT / "experiments" / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(values)


# --- docs/results.md


def write_results(docs: Path) -> None:
    """docs/results.md with a CSV file of all rows and one of all differences, and a figure, for each experiment."""
    results = {}
    for path in sorted({docs / "results" / f"{entry['result']}.json" for entry in catalog().values()}):
        if path.is_file():
            results[path.stem] = read_json(path)
    if not results:
        raise UserError(f"{docs / 'results'} has no results: run experiments/run.sh first")
    entries = [_experiment(key, entry, results, docs) for key, entry in catalog().items()]
    experiments = [entry for entry in entries if entry is not None]
    for name, result in results.items():
        runs = [tables.rows_frame(run["rows"]).assign(run=key) for key, run in result["runs"].items()]
        _write_csv(pd.concat(runs), docs / "results" / f"{name}.csv", first="run")
        shown = [
            one["differences"].assign(experiment=one["key"]) for one in experiments if one["result"] == name
        ]
        _write_csv(pd.concat(shown), docs / "results" / f"{name}_differences.csv", first="experiment")
    path = docs / "results" / "solver_by_prediction.json"
    by_prediction = read_json(path) if path.is_file() else {}
    if by_prediction:
        by_prediction["table"] = solver_by_prediction.table(by_prediction)
    page = render(
        "results.md",
        experiments=experiments,
        verdicts=_verdict_table(experiments),
        by_prediction=by_prediction,
    )
    write_text(docs / "results.md", page)


def _write_csv(frame: pd.DataFrame, path: Path, *, first: str) -> None:
    columns = [first, *(column for column in frame.columns if column != first)]
    frame[columns].to_csv(path, index=False, float_format="%.6g", lineterminator="\n")


def _experiment(
    key: str, entry: Mapping[str, Any], results: Mapping[str, Any], docs: Path
) -> dict[str, Any] | None:
    """The template's values for one experiment; None if its main evaluation is missing."""
    result, prefix = results.get(entry["result"]), entry["prefix"]
    if result is None or f"{prefix}evaluation" not in result["runs"]:
        return None

    def own(of: Mapping[str, Any]) -> dict[str, Any]:
        return {name.removeprefix(prefix): value for name, value in of.items() if name.startswith(prefix)}

    runs, training = own(result["runs"]), own(result["training"])
    images = docs / "images"
    figure = figures.curves(
        runs.get("sweep", runs["evaluation"])["rows"], images / f"results_{key}_curve.png"
    )
    grids = sorted(images.glob(f"results_{key}.*"))
    found = findings.differences(runs)
    return {
        **entry,
        "key": key,
        "table": results_table(runs),
        "differences": found,
        "verdicts": findings.verdicts(found),
        "claims": {finding.key: finding.claim for finding in findings.FINDINGS},
        "curve": f"images/results_{key}_curve.png" if figure else "",
        "grid": f"images/{grids[0].name}" if grids else "",
        "credits": result["credits"] if prefix == "" else [],
        "provenance": provenance(training, runs, own(result["searches"])),
        "command": f"bash experiments/run.sh {entry['result']} OUT{' PHOTOS' * (entry['result'] == 'photos')}",
        "minutes": sum(one["seconds"] for one in training.values()) / 60,
        "hardware": ", ".join(dict.fromkeys(run["hardware"] for run in runs.values())),
        "versions": runs["evaluation"]["versions"],
    }


def results_table(runs: Mapping[str, Any]) -> str:
    """The main evaluation's means, with columns from the runs of `JOINED` where they have the same sampler."""
    frame = tables.rows_frame(runs["evaluation"]["rows"])
    shown = pd.DataFrame(
        {"method": frame["method"], "sampler": [tables.sampler(row) for _, row in frame.iterrows()]}
    )
    for key in tables.present(frame, RESULT_METRICS):
        shown[METRICS[key].heading] = [tables.number(key, value) for value in frame[key]]
    for run, (metric, heading) in JOINED.items():
        other = tables.rows_frame(runs[run]["rows"]) if run in runs else pd.DataFrame()
        if metric in other:
            merged = frame[tables.SAMPLER].merge(
                other[[*tables.SAMPLER, metric]], on=tables.SAMPLER, how="left"
            )
            shown[heading] = [tables.number(metric, value) for value in merged[metric]]
    return tables.markdown(shown)


def _verdict_table(experiments: Sequence[Mapping[str, Any]]) -> str:
    """Rows: findings; columns: experiments; cells: the verdict and the differences that decide it."""
    lines = [
        {"finding": f"{finding.claim}<br>*{finding.shown}*"}
        | {
            one["title"]: _verdict_cell(one["differences"], finding.key, one["verdicts"])
            for one in experiments
        }
        for finding in findings.FINDINGS
    ]
    return tables.markdown(pd.DataFrame(lines), left=len(experiments) + 1)


def _verdict_cell(frame: pd.DataFrame, key: str, verdicts: Mapping[str, str]) -> str:
    lines = frame[(frame["finding"] == key) & frame["decides"]]
    if lines.empty:
        return ""
    cells = [f"**{verdicts[key]}**"]
    for method, of in lines.groupby("method", sort=False):
        label = f"{method}: " if lines["method"].nunique() > 1 else ""
        for _, line in of.iterrows():
            metric = line["metric"]
            mean, low, high = (
                tables.number(metric, line[end], signed=True) for end in ("mean", "low", "high")
            )
            cells.append(f"{label}{METRICS[metric].heading} {mean} [{low}, {high}]")
    return "<br>".join(cells)


def provenance(
    training: Mapping[str, Any], runs: Mapping[str, Any], searches: Mapping[str, Any]
) -> list[dict[str, str]]:
    """One line per training run, search and evaluation: command, time, hardware, code and outcome."""
    lines = []
    for one in training.values():
        facts = [
            f"{one['steps']:,} steps",
            f"batch {one['batch']}",
            f"seed {one['seed']}",
            f"{one['seconds'] / 60:.0f} min on {one.get('hardware', 'unknown hardware')}",
            f"commit {one.get('commit', '')[:10] or 'unknown'}",
        ]
        if one["peak"]:
            facts.append(f"best held-out PSNR {one['peak']['psnr']:.2f} dB at step {one['peak']['step']:,}")
        lines.append({"command": one["command"], "facts": ", ".join(facts)})
    for one in searches.values():
        found = f"{one['tried']} candidates in {one['seconds']:.0f} s"
        lines.append({"command": " ".join(one["command"]), "facts": found})
    for one in runs.values():
        cached = f" ({one['outputs_reused']:,} outputs from the cache)" if one["outputs_reused"] else ""
        lines.append(
            {
                "command": " ".join(one["command"]),
                "facts": f"{one['protocol']['images']:,} images, {one['seconds']:.0f} s{cached} on "
                f"{one['hardware']}, {one['date'][:10]}",
            }
        )
    return lines


# --- docs/models.md


def write_models(docs: Path) -> None:
    """docs/models.md: a card for each docs/models/NAME.json, with NAME_evaluations.json; fails on other weights."""
    from sr3_jax.inference.loading import load
    from sr3_jax.inference.sampling_file import params_fingerprint

    path = docs / "models" / "peers.json"
    peers = read_json(path) if path.exists() else {}
    cards = []
    for path in sorted((docs / "models").glob("*_evaluations.json")):
        facts = read_json(path.with_name(f"{path.stem.removesuffix('_evaluations')}.json"))
        evaluations = read_json(path)
        model = load(ROOT / facts["file"])
        sha256 = params_fingerprint(model.params)
        for title, evaluation in evaluations.items():
            if sha256 not in [one["sha256"] for one in evaluation["models"]]:
                raise UserError(
                    f"the evaluation '{title}' used other weights than {facts['file']}: run sr3 evaluate with that "
                    "file as --model, then python -m experiments.collect model"
                )
        cards.append(_card(facts, evaluations, model, docs) | {"sha256": sha256})
    write_text(
        docs / "models.md",
        render("models.md", cards=cards, peers=peers | {"tables": _peers_tables(peers.get("rows", []))}),
    )


def _card(facts: Mapping[str, Any], evaluations: Mapping[str, Any], model: Any, docs: Path) -> dict[str, Any]:
    name = facts["name"]
    frames = {title: tables.rows_frame(one["rows"]) for title, one in evaluations.items()}
    all_rows = pd.concat([frame.assign(set=title) for title, frame in frames.items()])
    _write_csv(all_rows, docs / "models" / f"{name}.csv", first="set")
    data = pd.DataFrame(facts["data"])[["name", "license", "images"]]
    some = next(iter(evaluations.values()))
    recipes = (
        tables.markdown(pd.DataFrame(facts["recipes"]["rows"]).astype(str)) if "recipes" in facts else ""
    )
    return {
        **facts,
        "recipes_table": recipes,
        "megabytes": (ROOT / facts["file"]).stat().st_size / 1e6,
        "scale": model.scale,
        "parameters": next(one["parameters"] for one in some["models"]),
        "diffusion": model.config["diffusion"],
        "sampler": model.sampling.words,
        "data_table": tables.markdown(data.astype(str)),
        "sets": [
            {"title": title, "table": tables.metrics_table(frames[title], MODEL_METRICS), **one}
            for title, one in evaluations.items()
        ],
        "images": [f"images/{path.name}" for path in sorted((docs / "images").glob(f"{name}_bundled*"))],
    }


def _peers_tables(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """{data set and degradation: its table} of benchmarks/peers.py."""
    found: dict[str, str] = {}
    for data, degradation in dict.fromkeys((row["data"], row["degradation"]) for row in rows):
        lines = [row for row in rows if (row["data"], row["degradation"]) == (data, degradation)]
        frame = pd.DataFrame(
            {
                "method": [row["method"] for row in lines],
                "sampler": [row["sampler"] for row in lines],
                **{
                    heading: [format(row[metric]["mean"], digits) for row in lines]
                    for metric, heading, digits in _PEERS_COLUMNS
                },
            }
        )
        found[f"{data}, {lines[0]['images']} images, {degradation}"] = tables.markdown(frame)
    return found


# --- docs/cascade.md


def write_cascade(docs: Path) -> None:
    """docs/cascade.md from docs/cascade/measured.json."""
    measured = read_json(docs / "cascade" / "measured.json")
    frame = pd.json_normalize(measured["rows"]).rename(columns=lambda name: name.removeprefix("accuracy."))
    chains = frame[(frame["group"] == "chain") & (frame["origin"] != "real") & (frame["size"] == 32)]
    augmented = chains[chains["augmented"].astype(bool)].set_index("strength")["frechet"]
    plain = chains.loc[~chains["augmented"].astype(bool), "frechet"].iloc[0]
    # The pages show the ends of the chain; the JSON file has the 16x16 stage too.
    guidance = frame[frame["guidance"].notna()]
    best = guidance[guidance["guidance"] == measured["guidance"]]
    page = render(
        "cascade.md",
        measured=measured,
        options=tables.cascade_options(measured),
        plain=plain,
        clean=augmented[0.0],
        chosen=augmented[measured["strength"]],
        quality=_cascade_table(pd.concat([frame[frame["group"] == "real"], best]), ["images", "size"]),
        ablation=_cascade_table(
            frame[(frame["group"] == "chain") & (frame["size"] == 32)].sort_values(
                ["origin", "augmented", "strength"]
            ),
            ["input", "trained with", "strength"],
        ),
        guidance=_cascade_table(
            guidance[guidance["size"] != 16].sort_values(["size", "guidance"]), ["size", "guidance"]
        ),
    )
    write_text(docs / "cascade.md", page)


def _cascade_table(frame: pd.DataFrame, columns: Sequence[str]) -> str:
    """The named columns, then accuracy with its interval and the Fréchet distance."""
    texts: dict[str, Callable[[pd.Series], str]] = {
        "images": lambda row: (
            "real" if row["group"] == "real" else f"generated, guidance {row['guidance']:g}"
        ),
        "size": lambda row: f"{row['size']}x{row['size']}",
        "input": lambda row: ORIGINS[row["origin"]],
        "trained with": lambda row: "noisy conditions" if row["augmented"] else "clean conditions",
        "strength": lambda row: f"{row['strength']:g}",
        "guidance": lambda row: f"{row['guidance']:g}",
        "accuracy, %": lambda row: (
            f"{100 * row['mean']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
        ),
        "Fréchet distance": lambda row: f"{row['frechet']:.3f}",
    }
    shown = [*columns, "accuracy, %", "Fréchet distance"]
    lines = [{column: texts[column](row) for column in shown} for _, row in frame.iterrows()]
    return tables.markdown(pd.DataFrame(lines))


# --- docs/pods/plans.md


def write_pods(docs: Path) -> None:
    """docs/pods/plans.md from the plans docs/pods/*.json; see experiments/plans.py."""
    files = [
        plans.file_of(docs / "pods", row)
        for row in sorted(plans.wanted(), key=lambda row: _plan_order(*row[:2]))
    ]
    found = [read_json(path) for path in files if path.is_file()]
    if not found:
        raise UserError(f"{docs / 'pods'} has no plans: run python -m experiments.plans")
    programs = [program for plan in found for program in plan["programs"].values()]
    page = render(
        "plans.md",
        table=plans_table(found),
        commands=list(dict.fromkeys(plan["command"] for plan in found)),
        machines=sorted({program["machine"] for program in programs}),
        versions=sorted({", ".join(f"{k} {v}" for k, v in one["versions"].items()) for one in programs}),
        missing=plans.missing(docs / "pods"),
    )
    write_text(docs / "pods" / "plans.md", page)


def _plan_order(preset: str, topology: str) -> tuple[int, int]:
    """The presets in order, and the topologies of each."""
    return plans.PRESETS.index(preset), (*plans.TOPOLOGIES, plans.ONE_CHIP).index(topology)


def plans_table(found: Sequence[Mapping[str, Any]]) -> str:
    """One line per compiled program: FLOPs, peak memory per chip against its capacity, and the verdict."""
    names = {"train": "training step", "sample": "held-out evaluation"}
    lines = [
        {
            "preset": plan["name"],
            "topology": plan["topology"],
            "mesh (data x fsdp)": " x ".join(str(plan["mesh"][axis]) for axis in ("data", "fsdp")),
            "batch": str(plan["batch_size"]),
            "program": names[kind],
            "TFLOP": f"{program['flops'] / 1e12:,.0f}",
            "memory per chip": f"{program['peak'] / GIB:.1f} of {plan['capacity'] / GIB:.1f} GiB",
            "verdict": "FITS" if program["fits"] else "DOES NOT FIT",
            "compiled in": f"{program['seconds_to_compile']:.0f} s",
        }
        for plan in found
        for kind, program in plan["programs"].items()
    ]
    return tables.markdown(pd.DataFrame(lines))


# --- docs/reliability.md


def write_reliability(docs: Path) -> None:
    """docs/reliability.md from the figures of benchmarks/soak.py in docs/reliability/soak.json."""
    path = docs / "reliability" / "soak.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist: run python benchmarks/soak.py -o {path}")
    found = read_json(path)
    parts = {**{f"sr3 {name}": part for name, part in found["kills"].items()}}
    parts |= {"hostile images": found["images"], "hostile model files": found["models"]}
    page = render(
        "reliability.md",
        command=" ".join(found["command"]),
        date=found["date"],
        minutes=f"{found['seconds'] / 60:.0f}",
        hardware=found["hardware"],
        versions=", ".join(f"{name} {version}" for name, version in found["versions"].items()),
        kills=_kills_table(found["kills"]),
        hostile=_hostile_table(found["images"], found["models"]),
        silence=f"{found['limits']['silence']:g}",
        memory=f"{found['limits']['memory_gb']:g}",
        failures=[f"{name}: {failure}" for name, part in parts.items() for failure in part["failures"]],
    )
    write_text(docs / "reliability.md", page)


def _kills_table(kills: Mapping[str, Any]) -> str:
    lines = [
        {
            "command": f"`sr3 {name}`",
            "compared with an uninterrupted run": part["compared"],
            "SIGKILL": str(part["sigkill"]),
            "SIGTERM": str(part["sigterm"]),
            "lost or changed": str(len(part["failures"]) or "nothing"),
        }
        for name, part in kills.items()
    ]
    total = {key: str(sum(part[key.lower()] for part in kills.values())) for key in ("SIGKILL", "SIGTERM")}
    lost = sum(len(part["failures"]) for part in kills.values())
    lines.append(
        dict.fromkeys(lines[0], "") | {"command": "all", "lost or changed": str(lost or "nothing")} | total
    )
    return tables.markdown(pd.DataFrame(lines))


def _hostile_table(images: Mapping[str, Any], models: Mapping[str, Any]) -> str:
    def line(what: str, count: int, outcome: str, one: Mapping[str, Any], failures: int) -> dict[str, str]:
        return {
            "input": f"{count} {what}",
            "outcome": outcome,
            "peak memory": f"{one['peak_gb']:.2f} GB",
            "longest silence": f"{one['silence']:.1f} s",
            "failures": str(failures),
        }

    def failures(part: Mapping[str, Any], command: str) -> int:
        return sum(failure.startswith(command) for failure in part["failures"])

    upscaled = f"{images['upscaled']} upscaled, {images['reported']} named as failed"
    prepared = f"{images['prepared']} stored, the others named as failed"
    refused = f"{models['refused']} fail with one sentence, {models['loaded']} load"
    lines = [
        line("images, `sr3 upscale`", images["count"], upscaled, images["upscale"], failures(images, "sr3 upscale")),
        line("images, `sr3 prepare`", images["count"], prepared, images["prepare"], failures(images, "sr3 prepare")),
        line("model files, `sr3 upscale`", models["count"], refused, models, len(models["failures"])),
    ]  # fmt: skip
    return tables.markdown(pd.DataFrame(lines))


# --- docs/large_images.md


def write_large_images(docs: Path) -> None:
    """docs/large_images.md from the figures of benchmarks/large_images.py in docs/large_images.json."""
    path = docs / "large_images.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist: run python benchmarks/large_images.py -o {path}")
    found = read_json(path)
    memory = [row for part in ("memory", "limited", "whole") for row in found.get(part, ())]
    every = [*memory, *found.get("throughput", ())]
    throughput = [_throughput_line(row) for row in found.get("throughput", ())]
    facts = "{command}: {date}, {hardware}, {software}"
    lines = [
        facts.format(
            **row | {"command": f"`{row['command']}`"},
            software=", ".join(f"{name} {version}" for name, version in row["versions"].items()),
        )
        for row in every
    ]
    page = render(
        "large_images.md",
        memory=tables.markdown(pd.DataFrame([_memory_line(row) for row in memory]), left=4),
        throughput=tables.markdown(pd.DataFrame(throughput)) if throughput else "",
        provenance="\n".join(f"- {line}" for line in dict.fromkeys(lines)),
    )
    write_text(docs / "large_images.md", page)


def _memory_line(row: Mapping[str, Any]) -> dict[str, str]:
    is_whole = "tiles" not in row
    each = row["seconds"] / 60 if is_whole else row["seconds_per_tile"]
    return {
        "input": row["input"],
        "output": row["format"].upper().replace("TIF", "TIFF").replace("JPG", "JPEG")
        + (f", outscale {row['outscale']:g}" if row.get("outscale", 4) != 4 else ""),
        "model": "tiny" if is_whole else row["model"],
        "limit": "4 GB of address space" if row.get("address_space_gb") else "",
        "tiles": "all" if is_whole else f"{row['tiles']} of {row['of']}",
        "peak memory": f"{row['peak_gb']:.2f} of {row['limit_gb']:g} GB",
        "growth": "" if is_whole else f"{row['growth_gb'] * 1000:.0f} MB",
        "time": f"{each:.1f} min" if is_whole else f"{each:.1f} s per tile",
    }


def _throughput_line(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "folder": row["mix"],
        "devices": str(row["devices"]),
        "images": str(row["images"]),
        "pieces": str(row["pieces"]),
        "slots": str(row["slots"]),
        "images per second": f"{row['images'] / row['seconds']:.1f}",
    }


# --- docs/speed.md


def write_speed(docs: Path) -> None:
    """docs/speed.md from the figures of benchmarks/speed.py and benchmarks/data_speed.py in docs/speed.json."""
    path = docs / "speed.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist: run python benchmarks/speed.py -o {path}")
    found = read_json(path)
    rows, data = found["rows"], found.get("data")
    by_platform = {
        name: [_speed_line(row) for row in rows if (row["platform"] == "cpu") == (name == "cpu")]
        for name in ("cpu", "gpu")
    }
    shown = {
        name: tables.markdown(pd.DataFrame(lines), left=3) if lines else ""
        for name, lines in by_platform.items()
    }
    shared = any(row["clock"] == "cpu" for row in rows)
    lines = [
        f"`{row['command']}`: {row['date']}, {row['device']}, {row['cores']} core{'s' * (row['cores'] > 1)}, "
        + ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        for row in [*rows, *([data] if data else [])]
    ]
    page = render(
        "speed.md",
        **shown,
        sampling_steps=4,
        clock="Times are those of the process on one core, since the machine was shared." if shared else "",
        data=data,
        data_table=tables.markdown(pd.DataFrame(map(_data_line, data["rows"])), left=1) if data else "",
        provenance="\n".join(f"- {line}" for line in dict.fromkeys(lines)),
    )
    write_text(docs / "speed.md", page)


def _speed_line(row: Mapping[str, Any]) -> dict[str, str]:
    line = {
        "preset": f"`{row['preset']}`" + ", with remat" * row["remat"],
        "dtype": row["dtype"],
        "batch": f"{row['batch_size']} x {row['side']}x{row['side']}",
        "parameters": f"{row['parameters'] / 1e6:.1f} M",
    }
    for part, calls in (("step", 1), ("sampling", 4)):
        one = row[part]
        low, high = one["quartiles"]
        line |= {
            f"{part}: sr3_jax": f"{one['jax_ms'] / calls:.0f} ms",
            f"{part}: PyTorch": f"{one['torch_ms'] / calls:.0f} ms",
            f"{part}: ratio": f"**{one['ratio']:.2f}** [{low:.2f}, {high:.2f}]",
        }
    return line


def _data_line(row: Mapping[str, Any]) -> dict[str, str]:
    counts = row["images_per_second"].items()
    return {"source": row["source"]} | {f"threads: {count}": f"{value:.0f}" for count, value in counts}


PAGES: Mapping[str, Callable[[Path], None]] = {
    "results": write_results,
    "models": write_models,
    "cascade": write_cascade,
    "pods": write_pods,
    "reliability": write_reliability,
    "large_images": write_large_images,
    "speed": write_speed,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="*", metavar="PAGE", help=f"of {', '.join(PAGES)} (default: all)")
    parser.add_argument("--docs", type=Path, default=DOCS, help="default: %(default)s")
    args = parser.parse_args(argv)
    if unknown := [page for page in args.pages if page not in PAGES]:
        parser.error(f"no page '{unknown[0]}': choose from {', '.join(PAGES)}")
    try:
        for page in args.pages or PAGES:
            PAGES[page](args.docs)
    except UserError as error:
        print(f"pages: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
