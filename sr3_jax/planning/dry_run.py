"""Everything that a training run checks before its first step, without the step: `sr3 train --dry-run`."""

from __future__ import annotations

from pathlib import Path

import jax

from sr3_jax.data.batches import center_crops
from sr3_jax.distributed.sharding import process_max
from sr3_jax.planning.plan import plan
from sr3_jax.planning.report import report
from sr3_jax.planning.topologies import of_this_job
from sr3_jax.train import checkpoints
from sr3_jax.train.experiment import Experiment
from sr3_jax.train.loop import check_labels, check_same_run, check_start, starting_weights
from sr3_jax.train.workdir import locked_workdir


def dry_run(experiment: Experiment, workdir: Path) -> tuple[str, bool]:
    """Check the config, the devices, the data, the workdir and the memory of a run. All processes must call it.

    It reads the held-out images and one training image, creates the workdir if it does not exist, and compiles nothing:
    memory is estimated from shapes, as by `sr3 plan --estimate`.

    Returns:
        What it found, and whether the memory is enough by the estimate.

    Raises:
        UserError: as `train.loop.train` would before its first step.
    """
    config = experiment.config
    mesh, source, held_out = check_start(experiment, workdir)
    check_labels(center_crops(source, crop=config["data"]["crop"], count=1), config, source.name)
    with locked_workdir(workdir, mesh):
        step = checkpoints.newest_step(workdir)
        if step is None:
            starting_weights(experiment, jax.random.key(0))
            start = "starts at step 0"
        else:
            check_same_run(checkpoints.read_config(workdir), config, workdir)
            start = f"resumes at step {step}"
    found = plan(experiment, of_this_job(), estimate=True)
    lines = [
        f"data     {source.name}: {len(source)} images; {len(held_out['image'])} held-out images of "
        f"{config['data']['eval_source']}",
        f"workdir  {workdir}: {start} of {config['train']['num_steps']}; checked that it can hold checkpoints",
        f"devices  {mesh.size} in {jax.process_count()} process(es)",
        "",
        report(found),
    ]
    return "\n".join(lines), not process_max(int(not found["fits"]), mesh)
