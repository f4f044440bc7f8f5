"""A plan as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sr3_jax.planning.programs import PROGRAMS

GIB = 2**30
NOTES = {
    True: "Estimated from shapes: the state is exact, temporaries may be off by a factor of 3.",
    False: "Compiled by libtpu for this topology; memory is as its compiler allocates it.",
}


def report(plan: Mapping[str, Any]) -> str:
    """The plan as `sr3 plan` prints it."""
    mesh = plan["mesh"]
    nodes = f" in {plan['slices']} nodes" if plan["slices"] > 1 else ""
    lines = [
        f"{plan['topology']}: {plan['chips']} chips{nodes} of {gib(plan['capacity'])}, "
        f"mesh data={mesh['data']} fsdp={mesh['fsdp']}",
        f"{plan['parameters'] / 1e6:.1f} M parameters, batch size {plan['batch_size']}. {NOTES[plan['estimate']]}",
    ]
    for name, program in plan["programs"].items():
        lines += ["", *_program(name, program, plan)]
    lines += ["", "FITS" if plan["fits"] else "DOES NOT FIT"]
    lines += [_suggestion(name, program) for name, program in plan["programs"].items() if not program["fits"]]
    return "\n".join(lines)


def _program(name: str, program: Mapping[str, Any], plan: Mapping[str, Any]) -> list[str]:
    memory, chips, capacity = program["memory"], plan["chips"], plan["capacity"]
    images = "" if name == "train" else f" on {plan['eval_images']} images"
    flops = f"{si(program['flops'])}FLOPs, {si(program['flops'] / chips)}FLOPs per chip"
    rows = [
        ("compute", flops),
        (
            "memory",
            f"{gib(program['peak'])} of {gib(capacity)} per chip ({program['peak'] / capacity:.0%})",
        ),
        ("  arguments", f"{gib(memory['arguments'])} (state and batch)"),
        ("  temporaries", gib(memory["temporaries"])),
    ]
    if "outputs" in memory:
        reused = f"{gib(memory['aliased'])} of them in the memory of the arguments"
        rows += [("  outputs", f"{gib(memory['outputs'])}, {reused}"), ("  code", gib(memory["code"]))]
    if program["other_state"]:
        rows.append(("  other state", f"{gib(program['other_state'])} (the rest of the training state)"))
    if "seconds_to_compile" in program:
        quick = ""
        if "exec_time_optimization_effort" in program["compiler_options"]:
            quick = ", with less effort: the job itself needs less memory"
        rows.append(("compile time", f"{program['seconds_to_compile']:.0f} s on {program['machine']}{quick}"))
    title = PROGRAMS[name].capitalize()
    return [f"{title}{images}", *(f"  {label:<14} {value}" for label, value in rows)]


def _suggestion(name: str, program: Mapping[str, Any]) -> str:
    suggestion, title = program["suggestion"], PROGRAMS[name]
    error = f" The compiler reports: {program['compiler_error']}" if program.get("compiler_error") else ""
    if not suggestion["overrides"]:
        return f"No setting makes the {title} fit: use more chips, or chips with more memory.{error}"
    more = "" if suggestion["enough"] else " and needs more chips as well"
    overrides = " ".join(suggestion["overrides"])
    return f"With {overrides} the {title} should need {gib(suggestion['bytes'])} per chip{more}.{error}"


def gib(size: float) -> str:
    """Bytes with a binary unit: 1.50 GiB."""
    for unit, factor in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size:.0f} B"


def si(number: float) -> str:
    """A number with an SI prefix: 3.20 P."""
    for letter, factor in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= factor:
            return f"{number / factor:.2f} {letter}"
    return f"{number:.0f} "
