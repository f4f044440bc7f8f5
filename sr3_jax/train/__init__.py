"""Training: `loop.train` runs a job, given an `experiment.Experiment` and a workdir.

Modules: `experiment` (a checked config and what it describes), `step` (the objective and the jitted step), `examples`
(from uint8 crops to target and condition), `state`, `optim`, `held_out` (evaluation during training), `step_metrics`
and `metric_writer` (logging), `checkpoints` (Orbax) and `weights` (loading and exporting trained models).
"""
