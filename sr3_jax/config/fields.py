"""The fields of a config: default, type, range or choices, and help of each.

This table is the only place that defines a field: loading, checks, error messages, `sr3 train --help` and the reference
page of the documentation read it through `schema`. It imports neither jax nor the network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Field:
    """One field of a config.

    Attributes:
        default: the value where a config gives none; its type is the type of the field.
        help: one sentence, with the unit.
        choices: the only allowed values, or a function that returns them; empty for any value.
        or_function: whether 'MODULE:FUNCTION' is allowed besides the choices.
        least, most: inclusive bounds.
        above, below: exclusive bounds.
        longest: the maximum number of items of a tuple of ints.
        fixed: whether a run must be resumed with the value that it was started with.

    A tuple of floats is a range, (least, most): it must be ascending, and the bounds hold for both ends. For a tuple of
    ints they hold for each item. Upper bounds are far above any use: they keep a broken or hostile model file from
    exhausting time or memory.
    """

    default: Any
    help: str
    choices: tuple[Any, ...] | Callable[[], tuple[Any, ...]] = ()
    or_function: bool = False
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    longest: int | None = None
    fixed: bool = False

    @property
    def is_range(self) -> bool:
        """Whether a value is (least, most)."""
        return isinstance(self.default, tuple) and bool(self.default) and isinstance(self.default[0], float)

    @property
    def values(self) -> tuple[Any, ...]:
        """The choices; empty for any value."""
        return self.choices() if callable(self.choices) else self.choices

    def allowed(self) -> str:
        """The rule for a value as words that follow 'must be'; '' where any value of the type is allowed."""
        if self.values:
            return f"one of {', '.join(map(str, self.values))}" + " or MODULE:FUNCTION" * self.or_function
        if self.longest is not None:
            return f"at most {self.longest} whole numbers from {self.least} to {self.most}"
        if self.least is not None and self.most is not None:
            return "ascending and " * self.is_range + f"from {self.least:.10g} to {self.most:.10g}"
        bounds = (
            (self.least, f"{self.least} or more"),
            (self.above, f"above {self.above}"),
            (self.most, f"at most {self.most}"),
            (self.below, f"below {self.below}"),
        )
        return " and ".join(words for bound, words in bounds if bound is not None)

    def contains(self, value: Any) -> bool:
        """Whether a value of the right type is one of the choices or within the bounds."""
        if self.is_range:
            ends = replace(self, default=0.0)
            return value[0] <= value[1] and all(ends.contains(end) for end in value)
        if isinstance(value, tuple):
            item = replace(self, default=0)
            return len(value) <= (self.longest or len(value)) and all(map(item.contains, value))
        return (
            (not self.values or value in self.values or (self.or_function and ":" in value))
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )


@dataclass(frozen=True)
class Section:
    """A named group of fields.

    Attributes:
        help: the topic of the fields, in one sentence.
    """

    help: str
    fields: Mapping[str, Field]


def _solvers() -> tuple[str, ...]:
    from sr3_jax.diffusion.solvers import SOLVERS  # imports jax, which most uses of this module do not need

    return tuple(SOLVERS)


def _degradation_fields() -> dict[str, Field]:
    def probability(default: float, help: str) -> Field:
        return Field(default=default, least=0, most=1, fixed=True, help=help)

    return {
        "blur_prob": probability(0.0, "Fraction of the training examples whose image is blurred."),
        "blur_sigma": Field(
            default=(0.2, 3.0),
            least=0.1,
            most=5,
            fixed=True,
            help="Standard deviation of the blur, in pixels.",
        ),
        "blur_sinc_prob": probability(
            0.0, "Fraction of the blurs that are a sharp low-pass filter (sinc), which rings."
        ),
        "blur_anisotropic_prob": probability(
            0.0, "Fraction of the other blurs with two widths and a random direction."
        ),
        "blur_generalized_prob": probability(
            0.0, "Fraction of the blurs with a generalized Gaussian kernel."
        ),
        "blur_plateau_prob": probability(0.0, "Fraction of the blurs with a plateau-shaped kernel."),
        "resize": Field(
            default=(1.0, 1.0),
            least=0.1,
            most=2,
            fixed=True,
            help="Factor of the size after the first of two rounds.",
        ),
        "resize_random_kernel": Field(
            default=False,
            fixed=True,
            help="Resize by area, bilinear or bicubic at random, instead of by bicubic.",
        ),
        "noise_prob": probability(0.0, "Fraction of the examples with noise."),
        "noise_sigma": Field(
            default=(1.0, 30.0),
            least=0,
            most=255,
            fixed=True,
            help="Standard deviation of the Gaussian noise, in levels of 255.",
        ),
        "noise_gray_prob": probability(0.0, "Fraction of the noise that is equal in all channels."),
        "noise_poisson_prob": probability(0.0, "Fraction of the noise that is Poisson instead of Gaussian."),
        "noise_poisson_scale": Field(
            default=(0.05, 3.0),
            least=0,
            most=10,
            fixed=True,
            help="Factor on the Poisson noise of an image whose levels are counts of photons.",
        ),
        "jpeg_prob": probability(0.0, "Fraction of the examples that are compressed as JPEG (4:2:0)."),
        "jpeg_quality": Field(default=(30.0, 95.0), least=1, most=100, fixed=True, help="JPEG quality."),
        "sinc_prob": probability(
            0.0, "Fraction of the examples with a sinc filter before or after the JPEG."
        ),
    }


SECTIONS: Mapping[str, Section] = MappingProxyType(
    {
        "model": Section(
            "The U-Net.",
            {
                "network": Field(
                    default="unet",
                    choices=("unet", "adm", "sr3_port"),
                    fixed=True,
                    help="This package's U-Net, or one whose weights `sr3 convert` reads: the upsamplers of "
                    "guided-diffusion (adm), or the PyTorch port of SR3 by Janspiry (sr3_port).",
                ),
                "channels": Field(
                    default=128, least=4, most=4096, fixed=True, help="Channels of level 0; a multiple of 4."
                ),
                "multipliers": Field(
                    default=(1, 2, 4, 8, 8),
                    least=1,
                    most=64,
                    longest=10,
                    fixed=True,
                    help="Width of each level as a multiple of `channels`; each level halves the resolution.",
                ),
                "num_blocks": Field(
                    default=(3, 3, 3, 3, 3),
                    least=1,
                    most=32,
                    longest=10,
                    fixed=True,
                    help="Residual blocks per level on the downsampling path.",
                ),
                "attention_levels": Field(
                    default=(),
                    least=0,
                    most=9,
                    longest=10,
                    fixed=True,
                    help="Levels with self-attention after each residual block.",
                ),
                "mid_attention": Field(
                    default=True, fixed=True, help="Self-attention at the lowest resolution."
                ),
                "head_channels": Field(
                    default=0,
                    least=0,
                    most=4096,
                    fixed=True,
                    help="Channels of an attention head; 0 for a single head.",
                ),
                "heads": Field(
                    default=1,
                    least=1,
                    most=256,
                    fixed=True,
                    help="Attention heads of `adm`, if `head_channels` is 0.",
                ),
                "norm_groups": Field(
                    default=32,
                    least=1,
                    most=4096,
                    fixed=True,
                    help="Groups of the group normalization of `adm` and `sr3_port`.",
                ),
                "timesteps": Field(
                    default=1000,
                    least=100,
                    most=100_000,
                    fixed=True,
                    help="Steps T of the linear schedule by which `adm` knows a noise level: step t = 0..T-1.",
                ),
                "learned_variance": Field(
                    default=False,
                    fixed=True,
                    help="`adm` predicts its variance too, for solver ancestral_learned; it cannot be trained then.",
                ),
                "layout": Field(
                    default="biggan",
                    choices=("biggan", "efficient"),
                    fixed=True,
                    help="Residual blocks as in the paper (biggan), or a faster U-Net, as in Imagen (efficient).",
                ),
                "patch": Field(
                    default=1,
                    choices=(1, 2, 4),
                    fixed=True,
                    help="Space-to-depth factor of the input; level 0 works at 1/patch of the resolution.",
                ),
                "norm": Field(
                    default="group",
                    choices=("group", "pixel"),
                    fixed=True,
                    help="Normalization over groups of channels and all pixels, or over the channels of a pixel.",
                ),
                "film": Field(
                    default=False,
                    fixed=True,
                    help="The noise level scales and shifts the features instead of being added to them.",
                ),
                "dropout": Field(
                    default=0.0,
                    least=0,
                    below=1,
                    fixed=True,
                    help="Dropout rate in the residual blocks during training.",
                ),
                "num_classes": Field(
                    default=0, least=0, most=1_000_000, fixed=True, help="Number of class labels; 0 for none."
                ),
                "augment": Field(
                    default=False,
                    fixed=True,
                    help="The network takes the strength of the augmentation `data.augment` as an input.",
                ),
                "remat": Field(
                    default=False,
                    fixed=True,
                    help="Recompute activations in the backward pass: less memory, about a third more time.",
                ),
                "remat_keeps": Field(
                    default="nothing",
                    choices=("nothing", "convs"),
                    fixed=True,
                    help="With `remat`, the activations to store: nothing, or the outputs of convolutions.",
                ),
                "low_res": Field(
                    default=True,
                    fixed=True,
                    help="Condition on a low-res image; false for the unconditional base model of a cascade.",
                ),
                "regression": Field(
                    default=False,
                    fixed=True,
                    help="Train the paper's regression baseline instead of a diffusion model; sets related fields.",
                ),
                "stem_channels": Field(
                    default=0,
                    least=0,
                    most=4096,
                    fixed=True,
                    help="Width of the input convolution; 0 for `channels`.",
                ),
                "output_skip": Field(
                    default=0.0,
                    least=0,
                    fixed=True,
                    help="Initial strength of a learned skip connection from y_t to the output, for y0 prediction; "
                    "0 for none.",
                ),
                "dtype": Field(
                    default="float32",
                    choices=("float32", "bfloat16"),
                    fixed=True,
                    help="Type of the activations; parameters are always float32.",
                ),
            },
        ),
        "diffusion": Section(
            "The noise schedule and the loss.",
            {
                "space": Field(
                    default="image",
                    choices=("image", "residual"),
                    fixed=True,
                    help="Diffuse the image itself, or its difference from the upsampled low-res image.",
                ),
                "residual_scale": Field(
                    default=1.0,
                    above=0,
                    fixed=True,
                    help="Factor on the residual in residual space, so that it has about unit variance.",
                ),
                "prediction": Field(
                    default="eps",
                    choices=("eps", "v", "y0"),
                    fixed=True,
                    help="What the network predicts: the noise, the velocity v, or the image.",
                ),
                "norm": Field(
                    default="l1",
                    choices=("l1", "l2"),
                    fixed=True,
                    help="Absolute (p = 1 in the paper) or squared error.",
                ),
                "weighting": Field(
                    default="none",
                    choices=("none", "min_snr"),
                    fixed=True,
                    help="Weight of the loss at each noise level: equal, or Min-SNR with gamma 5.",
                ),
                "lpips": Field(
                    default=0.0,
                    least=0,
                    fixed=True,
                    help="Weight of LPIPS between the estimate of y0 and y0 in the loss, which the paper has not. "
                    "Needs the extra metrics and another prediction than eps.",
                ),
                "schedule": Field(
                    default="linear",
                    choices=("linear", "quadratic", "cosine"),
                    fixed=True,
                    help="Noise schedule in training.",
                ),
                "num_steps": Field(
                    default=2000,
                    least=2,
                    most=100_000,
                    fixed=True,
                    help="T, the number of noise levels in training.",
                ),
                "beta_start": Field(
                    default=1e-6,
                    above=0,
                    below=1,
                    fixed=True,
                    help="Variance of the noise that the first step adds (linear and quadratic schedules).",
                ),
                "beta_end": Field(
                    default=1e-2,
                    above=0,
                    below=1,
                    fixed=True,
                    help="Variance of the noise that the last step adds (linear and quadratic schedules).",
                ),
            },
        ),
        "sampling": Section(
            "How the model samples by default, in held-out evaluation too.",
            {
                "solver": Field(
                    default="dpmpp_2m",
                    choices=_solvers,
                    or_function=True,
                    help="Solver: ancestral, ddpm (the paper's: ancestral with more noise), ddim, dpmpp_2m "
                    "(DPM-Solver++(2M)), heun, ancestral_learned (with the variance that the network predicts), or "
                    "one of yours; unless given, it is ancestral if the network predicts eps.",
                ),
                "steps": Field(default=25, least=1, most=100_000, help="Number of sampling steps."),
                "back_projection": Field(
                    default=0,
                    least=0,
                    most=100,
                    help="Rounds that make the output consistent with the low-res image, for clean inputs; 0 for none.",
                ),
            },
        ),
        "data": Section(
            "Training and held-out images.",
            {
                "source": Field(
                    default="photos:train",
                    help="Training images: photos:SPLIT (bundled), folder:PATH, tfds:NAME/CONFIG:SPLIT, "
                    "pairs:LR_DIR:HR_DIR, which has low-res images too, or synthetic:COUNTxHEIGHTxWIDTH for "
                    "measurements.",
                ),
                "eval_source": Field(
                    default="photos:test", help="Held-out images, named in the same way as `source`."
                ),
                "framing": Field(
                    default="crop",
                    choices=("crop", "square"),
                    help="Random crops, or the central square of each image resized to `crop`.",
                ),
                "crop": Field(
                    default=128,
                    least=1,
                    most=16_384,
                    help="Side of the training crops, in pixels of the source image.",
                ),
                "mirror": Field(default=True, help="Flip half of the training crops left to right."),
                "shrink": Field(
                    default=1,
                    least=1,
                    most=64,
                    fixed=True,
                    help="Downsample each crop by this factor first, so that the stages of a cascade share data.",
                ),
                "scale": Field(
                    default=4,
                    least=1,
                    most=64,
                    fixed=True,
                    help="Super-resolution factor; 1 if `model.low_res` is false.",
                ),
                "upsampling": Field(
                    default="bicubic",
                    choices=("bicubic", "bilinear"),
                    fixed=True,
                    help="How the low-res image is enlarged for the network.",
                ),
                "label_dropout": Field(
                    default=0.0,
                    least=0,
                    below=1,
                    fixed=True,
                    help="Fraction of training examples without their label, for classifier-free guidance.",
                ),
                "degradation": Field(
                    default="clean",
                    choices=("clean", "photo", "wild"),
                    fixed=True,
                    help="How low-res images are made: by bicubic downsampling as in the paper (clean), or with the "
                    "blur, noise and JPEG of everyday photographs (photo) or of Real-ESRGAN (wild). It sets those "
                    "fields of `degradation` and `second_degradation` that are not given.",
                ),
                "augment": Field(
                    default="none",
                    choices=("none", "blur", "noise"),
                    fixed=True,
                    help="Augmentation of the low-res image in training, for the later stages of a cascade.",
                ),
                "augment_largest": Field(
                    default=1.0,
                    above=0,
                    most=100,
                    fixed=True,
                    help="Maximum strength: standard deviation of the blur in low-res pixels, or of the noise "
                    "for images in [-1, 1].",
                ),
                "augment_share": Field(
                    default=0.5, above=0, most=1, help="Fraction of training examples that are augmented."
                ),
                "threads": Field(default=4, least=1, help="Threads that decode and crop images."),
                "cache_mb": Field(default=1024, least=0, help="Memory for decoded images, in MB."),
            },
        ),
        "degradation": Section(
            "Random degradation of the low-res images in training; `data.degradation` sets these fields together.",
            _degradation_fields(),
        ),
        "second_degradation": Section(
            "The second round of the degradation, which ends at the low-res size.",
            {name: field for name, field in _degradation_fields().items() if name != "resize"},
        ),
        "optim": Section(
            "The optimizer and its learning rate.",
            {
                "optimizer": Field(
                    default="adam",
                    choices=("adam", "muon"),
                    fixed=True,
                    help="Adam as in the paper, or Muon, which learns faster at small batch sizes.",
                ),
                "learning_rate": Field(
                    default=1e-4, above=0, fixed=True, help="Peak learning rate, after the warm-up."
                ),
                "warmup_steps": Field(
                    default=10_000, least=0, fixed=True, help="Steps of linear warm-up of the learning rate."
                ),
                "decay": Field(
                    default="constant",
                    choices=("constant", "cosine"),
                    fixed=True,
                    help="Learning rate after the warm-up: constant, or a cosine that ends at 0.",
                ),
                "clip_norm": Field(
                    default=1.0,
                    least=0,
                    fixed=True,
                    help="Global gradient norm to clip at; 0 for no clipping.",
                ),
                "skip_nonfinite": Field(
                    default=0,
                    least=0,
                    help="Steps in a row that may be skipped because their loss or gradient is not finite, before "
                    "training stops.",
                ),
                "b1": Field(
                    default=0.9, least=0, below=1, fixed=True, help="Adam's beta_1, or Muon's momentum."
                ),
                "b2": Field(
                    default=0.999,
                    least=0,
                    below=1,
                    fixed=True,
                    help="Adam's beta_2; Muon uses Adam for biases and for the first and last layer.",
                ),
                "ema_decay": Field(
                    default=0.9999,
                    least=0,
                    below=1,
                    fixed=True,
                    help="Decay of the moving average of the parameters (EMA), which sampling uses.",
                ),
            },
        ),
        "train": Section(
            "The training run.",
            {
                "num_steps": Field(default=1_000_000, least=1, help="Training steps of the whole run."),
                "minutes": Field(
                    default=0.0, least=0, help="Stop after this many minutes; 0 for no time limit."
                ),
                "batch_size": Field(
                    default=256, least=1, help="Images in a step, over all devices and processes."
                ),
                "accumulation": Field(
                    default=1,
                    least=1,
                    help="Split each batch into this many parts and average their gradients: less memory.",
                ),
                "seed": Field(  # jax.random.key reads 32 bits: 2**32 would be 0 again
                    default=0, least=0, most=2**32 - 1, help="Seed of parameters, noise and data order."
                ),
                "log_every": Field(default=50, least=1, help="Steps between two lines of metrics."),
                "profile_steps": Field(
                    default="",
                    help="Profile these steps into WORKDIR/profile: FIRST:LAST, such as 100:110 for the ten steps "
                    "after the first 100; empty for none.",
                ),
                "writers": Field(
                    default="tensorboard",
                    choices=("tensorboard", "wandb", "tensorboard+wandb", "none"),
                    help="Where metrics and samples go besides metrics.jsonl and samples/; wandb is Weights & Biases.",
                ),
                "init_from": Field(
                    default="",
                    help="Model whose parameters to start from: a shipped name, a workdir or a .safetensors file.",
                ),
            },
        ),
        "eval": Section(
            "Held-out evaluation during training.",
            {
                "every": Field(default=5000, least=1, help="Steps between two evaluations."),
                "num_images": Field(default=8, least=1, help="Held-out images per evaluation."),
            },
        ),
        "checkpoint": Section(
            "Saving and resuming.",
            {
                "every": Field(default=5000, least=1, help="Steps between two checkpoints."),
                "minutes": Field(
                    default=0.0,
                    least=0,
                    help="Also save when this many minutes have passed since the last checkpoint; 0 for by steps only.",
                ),
                "keep": Field(default=3, least=1, help="How many of the newest checkpoints to keep."),
                "keep_period": Field(
                    default=0,
                    least=0,
                    help="Save and always keep the checkpoints whose step is a multiple of this; 0 for none.",
                ),
                "best": Field(
                    default=False,
                    help="Save the EMA parameters with the highest held-out PSNR as best.safetensors.",
                ),
                "allow_older": Field(
                    default=False, help="Resume from an older checkpoint if the newest is damaged."
                ),
            },
        ),
        "mesh": Section(
            "Devices: their number is data * fsdp; -1 in one of the two fields means all that remain.",
            {
                "data": Field(default=-1, help="Data-parallel groups of devices."),
                "fsdp": Field(
                    default=0,
                    help="Devices in a group, which share parameters and optimizer state; 0: chosen from the devices "
                    "(up to 8 of a slice or node for a state of 1 GiB or more, else 1).",
                ),
            },
        ),
        "stage": Section(
            "The model's place in a cascade.",
            {
                "name": Field(
                    default="", help="Name of the stage, and of its folder in the cascade's workdir."
                ),
                "size": Field(
                    default=0,
                    least=0,
                    most=16_384,
                    fixed=True,
                    help="Side of the output images, in pixels; 0 for any size.",
                ),
            },
        ),
    }
)

# Old name -> new name. Stored configs are migrated; a user's config or option with an old name is an error.
RENAMED = {
    ("diffusion", "kind"): ("diffusion", "prediction"),
    ("eval", "steps"): ("sampling", "steps"),
    ("eval", "solver"): ("sampling", "solver"),
}

# What `model.regression` sets: one pass without noise that predicts the image, trained with the squared error.
REGRESSION: Mapping[tuple[str, str], Any] = MappingProxyType(
    {
        ("model", "output_skip"): 0.0,
        ("diffusion", "prediction"): "y0",
        ("diffusion", "norm"): "l2",
        ("diffusion", "weighting"): "none",
        ("sampling", "steps"): 1,
        ("sampling", "solver"): "ddim",
    }
)
