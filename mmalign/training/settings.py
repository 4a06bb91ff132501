"""The training configuration of a run, and when it ends."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmalign.config import build, require
from mmalign.data import Augment
from mmalign.errors import UsageError

DEFAULT_EPOCHS = 30.0


@dataclass(frozen=True)
class TrainConfig:
    """How to train, and on what. Every field can be set in a TOML file or with `--set`."""

    data: tuple[str, ...] = ()
    """Sources of training pairs, instead of `--data`; recorded by every run."""
    val: tuple[str, ...] = ()
    """Sources of validation pairs, instead of `--val`."""
    preset: str = "tiny"
    """One of our own presets, trained from scratch."""
    model: str | None = None
    """An open_clip architecture, instead of a preset."""
    pretrained: str | None = None
    """Its weights: a tag, or a local file."""
    caption_keys: tuple[str, ...] = ("captions",)
    image_column: str | None = None
    loss: Literal["infonce", "siglip"] = "infonce"
    epochs: float | None = None
    """Passes over the images; 30 if neither this nor `minutes` is set."""
    minutes: float | None = None
    """Time from the first step to the last; the learning rate follows the clock."""
    batch_size: int = 128
    part_size: int | None = None
    """Images encoded at a time. A larger batch is encoded in parts, each of them twice, but in the
    memory of one part; the loss is that of the whole batch. Batch norms see one part at a time."""
    captions_per_image: int = 5
    """Captions drawn for each image of a batch; the image is encoded once for all of them."""
    learning_rate: float = 1e-3
    weight_decay: float = 0.5
    warmup: float = 0.05
    """Share of the training with a rising learning rate."""
    average: float = 0.99
    """Decay of the moving average of the weights; the average is validated and saved."""
    clip_norm: float = 1.0
    """Maximum norm of the gradient."""
    validations: int = 10
    """Number of validations during training."""
    held_out: float | None = None
    """Share of the training images held out for validation if no validation source is given. The
    default is none below 200 images; otherwise 5 %, or 50 images if that is more, but at most a
    tenth and at most 1,000."""
    seed: int = 0
    caption_loss: float = 0.2
    """Weight of a contrastive loss between two captions of an image, which teaches paraphrases."""
    word_loss: float = 0.3
    """Weight of predicting the tokens of an image's captions, see token_prediction.py."""
    start_size: float = 0.67
    """Side of the images in the first steps, as a share of the model's input; it grows to full size
    during training, if the model takes any size. The same time then allows more passes; the last
    ones are at full resolution."""
    arithmetic: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the towers in training; "auto" is the fastest, measured once at the start of a
    run and recorded: a resumed run continues in it."""
    augment: Augment = field(default_factory=Augment)

    def __post_init__(self) -> None:
        require(
            self.batch_size >= 2, "batch_size", self.batch_size, "at least 2, as pairs are compared"
        )
        for name in ("part_size", "captions_per_image", "validations"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")
        for name in ("learning_rate", "clip_norm", "epochs", "minutes"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "above 0")
        for name in ("warmup", "average", "held_out"):
            value = getattr(self, name)
            require(value is None or 0 <= value < 1, name, value, "in [0, 1)")
        require(0 < self.start_size <= 1, "start_size", self.start_size, "above 0 and at most 1")
        for name in ("weight_decay", "caption_loss", "word_loss", "seed"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")


FINE_TUNING: dict[str, Any] = {
    "captions_per_image": 1,
    "learning_rate": 1e-5,
    "weight_decay": 0.2,
    "caption_loss": 0.0,
    "word_loss": 0.0,
    "augment": {"crop_min": 0.9, "colour": 0.0, "erase": 0.0},
}
"""Defaults for fine-tuning: no auxiliary losses, weaker augmentation, smaller steps."""


def configure(values: dict[str, Any], where: str = "configuration") -> TrainConfig:
    """Build a configuration; with `model` among the values, `FINE_TUNING` gives the defaults."""
    if values.get("model") is None:
        return build(TrainConfig, values, where)
    augment = {**FINE_TUNING["augment"], **values.get("augment", {})}
    return build(TrainConfig, {**FINE_TUNING, **values, "augment": augment}, where)


def limits_reached(
    config: TrainConfig, step: int, steps_per_epoch: int, elapsed_s: float
) -> list[str]:
    """Name the fields whose limits a training has reached: `epochs`, `minutes`, both or none."""
    reached = []
    if step >= epochs_of(config) * steps_per_epoch:
        reached.append("epochs")
    if config.minutes and elapsed_s >= 60 * config.minutes:
        reached.append("minutes")
    return reached


def refuse_complete(run: Path, config: TrainConfig, reached: list[str]) -> None:
    """Refuse to continue a training that has ended, and name what would extend it.

    Raises:
        UsageError: A limit is reached.
    """
    if reached:
        values = {"epochs": epochs_of(config), "minutes": config.minutes}
        ends = " and ".join(f"{name}={values[name]:g}" for name in reached)
        longer = " ".join(f"--set {name}=N" for name in reached)
        raise UsageError(
            f"{run}: training is complete: it reached {ends}; "
            f"to continue, raise the limit with {longer}"
        )


def epochs_of(config: TrainConfig) -> float:
    """Return after how many passes a training ends; infinite if only time ends it."""
    return config.epochs or (math.inf if config.minutes else DEFAULT_EPOCHS)
