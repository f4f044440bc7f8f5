"""A plan in words, and the table of plans in the docs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

GIB = 2**30
TITLES = {"train": "Training step", "sample": "Held-out evaluation"}
NOTES = {
    True: "An estimate from shapes alone: state and FLOPs are exact, temporaries and traffic rough (nothing is fused).",
    False: "Compiled by libtpu for that topology: memory is what its compiler lays out.",
}


def report(plan: Mapping[str, Any]) -> str:
    """The plan as `sr3 plan` prints it."""
    mesh = plan["mesh"]
    lines = [
        f"{plan['topology']}: {plan['chips']} chips of {gib(plan['capacity'])}, "
        f"mesh data={mesh['data']} fsdp={mesh['fsdp']}",
        f"{plan['parameters'] / 1e6:.1f}M parameters, batch {plan['batch_size']}. {NOTES[plan['estimate']]}",
    ]
    for name, program in plan["programs"].items():
        lines += ["", *_program(name, program, plan)]
    reached = ", ".join(f"{share:.0%} of {what}" for what, share in _reached(plan["assumed"]).items())
    if any(program["seconds"] for program in plan["programs"].values()):
        lines += [
            "",
            f"Times assume {reached}, as the chip's data sheet gives them: assumed, not measured. The lower is if all "
            "three go on at once, the higher if one waits for the other.",
        ]
    lines += ["", "FITS" if plan["fits"] else "DOES NOT FIT"]
    for name, program in plan["programs"].items():
        if not program["fits"]:
            lines.append(_way_out(name, program))
    return "\n".join(lines)


def _program(name: str, program: Mapping[str, Any], plan: Mapping[str, Any]) -> list[str]:
    memory, chips = program["memory"], plan["chips"]
    examples = "" if name == "train" else f" of {plan['eval_images']} images"
    rows = [
        ("FLOPs", f"{si(program['flops'])}, {si(program['flops'] / chips)} a chip"),
        (
            "memory",
            f"{gib(program['peak'])} of {gib(plan['capacity'])} a chip ({program['peak'] / plan['capacity']:.0%})",
        ),
        ("  arguments", f"{gib(memory['arguments'])} (state and batch)"),
        ("  temporaries", gib(memory["temporaries"])),
    ]
    if "outputs" in memory:
        rows.append(
            ("  outputs", f"{gib(memory['outputs'])}, {gib(memory['aliased'])} of it in the arguments' place")
        )
        rows.append(("  code", gib(memory["code"])))
    if program["beside"]:
        rows.append(("  beside", f"{gib(program['beside'])} (the rest of the training state)"))
    if program["traffic"] is not None:
        rows.append(("memory traffic", f"{gib(program['traffic'])} a chip"))
    for kind, (count, size) in sorted(program["collectives"].items()):
        rows.append((kind, f"{gib(size)} sent by each chip, {count:,.0f} calls"))
    if program.get("unknown_loops"):
        rows.append(("loops", f"{program['unknown_loops']} of unknown length, counted once"))
    seconds = program["seconds"]
    if seconds:
        parts = {"flops": "FLOPs", "memory": "memory", "interconnect": "interconnect"}
        detail = ", ".join(f"{title} {duration(seconds[part])}" for part, title in parts.items())
        rows.append(("time", f"{duration(seconds['low'])} to {duration(seconds['high'])} ({detail})"))
    if "seconds_to_compile" in program:
        effort = "exec_time_optimization_effort" in program["compiler_options"]
        quick = ", with less effort: memory is above what the job will need" if effort else ""
        rows.append(("compiled in", f"{program['seconds_to_compile']:.0f} s on {program['machine']}{quick}"))
    return [f"{TITLES[name]}{examples}", *(f"  {title:<16} {value}" for title, value in rows)]


def _way_out(name: str, program: Mapping[str, Any]) -> str:
    change, title = program["change"], TITLES[name].lower()
    said = f" The compiler says: {program['refused']}" if program.get("refused") else ""
    if not change["overrides"]:
        return f"The {title} has nothing left to change: take more chips, or chips with more memory.{said}"
    does = (
        "should then need about"
        if change["enough"]
        else "needs more chips besides, as it should then need about"
    )
    return f"For the {title} give {' '.join(change['overrides'])}: it {does} {gib(change['bytes'])} a chip.{said}"


def _reached(assumed: Mapping[str, float]) -> dict[str, float]:
    titles = {
        "flops": "the peak FLOP/s",
        "memory": "the memory's bandwidth",
        "interconnect": "the links' bandwidth",
    }
    return {titles[name]: share for name, share in assumed.items()}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Plans with a 'name' and a 'command' as a Markdown table, with the commands below."""
    head = (
        "preset",
        "topology",
        "mesh",
        "program",
        "TFLOPs",
        "HBM a chip",
        "",
        "collectives",
        "time",
        "compiled in",
    )
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        for name, program in row["programs"].items():
            sent = sum(size for _, size in program["collectives"].values())
            seconds = program["seconds"]
            cells = (
                row["name"],
                row["topology"],
                f"{row['mesh']['data']} x {row['mesh']['fsdp']}",
                TITLES[name].lower(),
                f"{program['flops'] / 1e12:,.0f}",
                f"{program['peak'] / GIB:.1f} of {row['capacity'] / GIB:.1f} GiB",
                "FITS" if program["fits"] else "DOES NOT FIT",
                f"{sent / GIB:.2f} GiB" if seconds else "",
                f"{duration(seconds['low'])} to {duration(seconds['high'])}" if seconds else "",
                f"{program['seconds_to_compile']:,.0f} s",
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gib(size: float) -> str:
    """Bytes as people read them."""
    for unit, factor in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size:.0f} B"


def si(number: float) -> str:
    """A count with its thousands as a letter: 3.2P."""
    for letter, factor in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= factor:
            return f"{number / factor:.2f} {letter}"
    return f"{number:.0f} "


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 120 else f"{seconds / 60:.3g} min"
