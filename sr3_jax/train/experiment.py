"""A checked config with the objective and the optimizer that it describes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax
from ml_collections import ConfigDict, FrozenConfigDict

from sr3_jax.config import build
from sr3_jax.config.load import complete
from sr3_jax.diffusion.loss import min_snr
from sr3_jax.errors import UserError
from sr3_jax.features.lpips import load_lpips, perceptual_loss
from sr3_jax.train import optim
from sr3_jax.train.examples import Task
from sr3_jax.train.state import init_state
from sr3_jax.train.step import Objective
from sr3_jax.types import Key, Params


@dataclass(frozen=True, eq=False)
class Experiment:
    """Everything that a training run needs.

    Attributes:
        config: the complete config as nested plain dicts, as workdirs and exports store it.
    """

    config: Mapping[str, Any]
    objective: Objective

    def section(self, name: str) -> Mapping[str, Any]:
        """The fields of one section."""
        return self.config[name]

    def init_params(self, key: Key) -> Params:
        """New parameters."""
        return build.init_params(self.objective.network, key)

    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer with its learning-rate schedule."""
        section = self.config["optim"]
        return optim.make_optimizer(
            section["optimizer"],
            self.lr_schedule(),
            b1=section["b1"],
            b2=section["b2"],
            clip_norm=section["clip_norm"],
        )

    def state_bytes(self) -> int:
        """Bytes of the whole training state, from shapes."""
        optimizer = self.optimizer()
        state = jax.eval_shape(lambda key: init_state(self.init_params(key), optimizer), jax.random.key(0))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))

    def lr_schedule(self) -> optax.Schedule:
        """step -> learning rate."""
        section = self.config["optim"]
        return optim.lr_schedule(
            section["learning_rate"],
            warmup_steps=section["warmup_steps"],
            decay=section["decay"],
            num_steps=self.config["train"]["num_steps"],
        )


def read(given: ConfigDict | FrozenConfigDict | Mapping[str, Any]) -> Experiment:
    """Complete and check a config, and build the experiment that it describes.

    Raises:
        UserError: the first field that cannot work, with its value and the rule.
    """
    config = complete(given)
    build.check_config(config)
    model, diffusion, data = config["model"], config["diffusion"], config["data"]
    objective = Objective(
        network=build.build_network(model),
        schedule=build.build_schedule(diffusion),
        space=build.build_space(diffusion),
        prediction=diffusion["prediction"],
        norm=diffusion["norm"],
        weighting=min_snr() if diffusion["weighting"] == "min_snr" else None,
        perceptual=perceptual_loss(load_lpips(), diffusion["lpips"]) if diffusion["lpips"] else None,
        task=Task(
            scale=data["scale"] if model["low_res"] else None,
            shrink=data["shrink"],
            degradation=build.build_degradation(config),
            augmentation=build.build_augmentation(data),
            num_classes=model["num_classes"],
            label_dropout=data["label_dropout"],
            upsampling=data["upsampling"],
        ),
    )
    return Experiment(config, objective)


def check_batch(config: Mapping[str, Any], *, devices: int, processes: int) -> None:
    """Check that the batch divides over devices, processes and accumulation.

    Raises:
        UserError: it does not; the message gives the nearest batch size that does.
    """
    train = config["train"]
    multiple = math.lcm(devices * train["accumulation"], processes)
    if train["batch_size"] % multiple:
        nearest = max(1, round(train["batch_size"] / multiple)) * multiple
        raise UserError(
            f"config.train.batch_size={train['batch_size']} does not divide over {devices} devices with "
            f"config.train.accumulation={train['accumulation']}: use a multiple of {multiple}, such as {nearest}"
        )
