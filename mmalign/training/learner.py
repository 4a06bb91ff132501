"""One training step: augment, encode, loss, gradients, optimizer, average.

Shapes: B images of a batch, C captions drawn for each, D dimensions, T tokens of a caption.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from mmalign import kernels
from mmalign.data import Augmentation, Draw
from mmalign.errors import TrainingError, VectorError
from mmalign.kernels.processor import has_bfloat16
from mmalign.model import Encoder, fastest_device
from mmalign.progress import say
from mmalign.training.objective import Objective
from mmalign.training.optimization import (
    Arithmetic,
    Average,
    adamw,
    fastest_arithmetic,
    learning_rate,
)
from mmalign.training.pairs import Batch, Pairs
from mmalign.training.settings import TrainConfig
from mmalign.training.token_prediction import TokenHead

# Share of the training after which images are at full size.
FULL_SIZE_AT = 0.7


def image_side(full: int, start: float, progress: float) -> int:
    """Return the image side to train at: a share of the full one, growing in steps of 16 pixels.

    Source: Tan and Le 2021, "EfficientNetV2: Smaller Models and Faster Training".

    >>> [image_side(96, 2 / 3, p) for p in (0.0, 0.3, 0.6, 0.7, 1.0)]
    [64, 80, 96, 96, 96]
    """
    if start >= 1 or progress >= FULL_SIZE_AT:
        return full
    share = start + (1 - start) * progress / FULL_SIZE_AT
    return min(full, max(16, round(full * share / 16) * 16))


class Learner:
    """The trained weights and their optimizer."""

    def __init__(self, config: TrainConfig, encoder: Encoder, pairs: Pairs) -> None:
        self.config, self.encoder = config, encoder
        self.device = fastest_device()
        self.towers = encoder.on(self.device).towers
        with _seeded(config.seed, self.device):
            head = TokenHead(encoder.dim, pairs.token_counts(), pairs.caption_count)
        self.head = head.to(self.device)
        self.towers.train()
        self.trained = torch.nn.ModuleList([self.towers, self.head])
        self.objective = Objective(config, self.towers, self.head)
        self.optimizer = adamw(self.trained, config.learning_rate, config.weight_decay)
        self.average = Average(self.towers, config.average)
        self.arithmetic: dict[str, Arithmetic] = {}
        """By tower: "image", "text"."""

    @property
    def learning_rate(self) -> float:
        """Return the learning rate of the last step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def step(self, batch: Batch, progress: float) -> Tensor:
        """Take one step and return its loss; the weights do not change if it is not finite.

        Args:
            batch: The batch to train on.
            progress: Share of the training that is done.

        Raises:
            TrainingError: The loss is not finite.
        """
        config = self.config
        rate = learning_rate(progress, config.learning_rate, config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        start = config.start_size if self.towers.any_size else 1.0
        side = image_side(self.encoder.preprocess.size, start, progress)
        # Dropout and crops depend only on seed and step, so that runs can be resumed bit for bit.
        seed = config.seed * 1_000_003 + batch.step
        generator = torch.Generator().manual_seed(seed)
        augmentation = config.augment.draw(len(batch.images_B3SS), generator)
        with _seeded(seed, self.device):
            loss = self._backward(batch, augmentation, side)
        torch.nn.utils.clip_grad_norm_(self.trained.parameters(), config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.towers.log_scale.clamp_(0, math.log(100))
        self.average.update(self.towers)
        return loss

    def _backward(self, batch: Batch, augmentation: Augmentation, side: int) -> Tensor:
        """Compute the gradients of a batch: at once, or in micro-batches that fit the memory."""
        images_B3SS, batch = batch.images_B3SS, batch.on(self.device)

        def encode(part: tuple[Tensor, Augmentation, Tensor]) -> tuple[Tensor, Tensor]:
            pixels, changes, tokens = part
            texts = self._text_vectors(tokens.flatten(0, 1))
            # Images stay on the host as bytes; the device holds one micro-batch of them at a time.
            images = self._image_vectors(changes.apply(pixels.to(self.device), side))
            return images, texts.unflatten(0, tokens.shape[:2])

        def objective(image_BD: Tensor, text_BCD: Tensor) -> Tensor:
            return self.objective(image_BD, text_BCD, batch)

        count = augmentation.count
        size = self.config.part_size or count
        try:
            if size < count:
                split = (t.split(size) for t in (images_B3SS, augmentation, batch.tokens_BCT))
                parts = list(zip(*split, strict=True))
                loss = kernels.backward_in_parts(self.towers, parts, encode, objective)
            else:
                loss = objective(*encode((images_B3SS, augmentation, batch.tokens_BCT)))
                loss.backward()
        except VectorError as problem:
            raise self._diverged(str(problem), batch.step) from problem
        if not torch.isfinite(loss):
            raise self._diverged(f"the loss is {loss.item()}", batch.step)
        return loss.detach()

    def _diverged(self, what: str, step: int) -> TrainingError:
        return TrainingError(
            f"{what} at step {step}: lower learning_rate (now {self.config.learning_rate}); "
            "the weights saved before are kept"
        )

    def _image_vectors(self, images: Tensor) -> Tensor:
        return self.arithmetic["image"].apply(
            self.towers, lambda: self.encoder.image_vectors(images), self.device
        )

    def _text_vectors(self, tokens: Tensor) -> Tensor:
        return self.arithmetic["text"].apply(
            self.towers, lambda: self.encoder.text_vectors(tokens), self.device
        )

    def choose_arithmetic(self, pairs: Pairs, draw: Draw) -> None:
        """Measure which arithmetic is fastest for each tower, on a batch or a micro-batch.

        Args:
            pairs: The training pairs.
            draw: The first batch.
        """
        if self.config.arithmetic != "auto":
            chosen = Arithmetic(bfloat16=self.config.arithmetic == "bfloat16")
            self.arithmetic = {"image": chosen, "text": chosen}
            return
        size = self.config.part_size or self.config.batch_size
        batch = pairs.batch(Draw(draw.step, draw.rows_B[:size], draw.captions_BC[:size]))
        generator = torch.Generator().manual_seed(0)
        side = self.encoder.preprocess.size
        augmentation = self.config.augment.draw(len(batch.images_B3SS), generator)
        images = augmentation.apply(batch.images_B3SS.to(self.device), side)
        tokens = batch.tokens_BCT.flatten(0, 1).to(self.device)
        with _seeded(self.config.seed, self.device):
            self.arithmetic = {
                "image": fastest_arithmetic(
                    self.towers,
                    lambda: self.encoder.image_vectors(images),
                    self.device,
                    is_image=True,
                ),
                "text": fastest_arithmetic(
                    self.towers,
                    lambda: self.encoder.text_vectors(tokens),
                    self.device,
                    is_image=False,
                ),
            }

    def state(self) -> dict[str, Any]:
        """Return everything that `restore` needs."""
        return {
            "towers": self.towers.state_dict(),
            "words": self.head.state_dict(),
            "average": self.average.weights,
            "average_steps": self.average.steps,
            "optimizer": self.optimizer.state_dict(),
            "arithmetic": {name: asdict(a) for name, a in self.arithmetic.items()},
            "asked_arithmetic": self.config.arithmetic,
            "machine": self._machine(),
        }

    def restore(self, state: dict[str, Any], run: str) -> None:
        """Continue from what `state` returned.

        Args:
            state: The saved state.
            run: The run folder, for messages.

        Raises:
            TrainingError: The weights do not fit, or this machine lacks the arithmetic.
        """
        try:
            self.towers.load_state_dict(state["towers"])
            self.head.load_state_dict(state["words"])
            self.average.weights = {k: v.to(self.device) for k, v in state["average"].items()}
            self.average.steps = state["average_steps"]
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise TrainingError(f"{run}: state.pt does not match the run: {reason}") from error
        # The optimizer's state contains its own settings; those of the configuration apply.
        decays = (self.config.weight_decay, 0.0)
        for group, decay in zip(self.optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        if self.config.arithmetic == state["asked_arithmetic"]:
            self._restore_arithmetic(state, run)

    def _restore_arithmetic(self, state: dict[str, Any], run: str) -> None:
        """Continue in the arithmetic that the run started with."""
        arithmetic = {name: Arithmetic(**a) for name, a in state["arithmetic"].items()}
        before, now = state["machine"], self._machine()
        lacking = any(a.bfloat16 for a in arithmetic.values()) and not has_bfloat16(self.device)
        if lacking or before["device"] != now["device"]:
            kind = "bfloat16" if lacking else before["device"]
            raise TrainingError(
                f"{run}: cannot be resumed bit for bit: it was trained with {kind}, which this "
                "machine does not have; to continue with other rounding, add --set "
                "arithmetic=float32"
            )
        other = [f"{k} {now[k]} (was {before[k]})" for k in now if now[k] != before[k]]
        if other:
            say(
                f"warning: resumed with {', '.join(other)}: the result equals that of an "
                "uninterrupted run only up to rounding"
            )
        self.arithmetic = arithmetic

    def _machine(self) -> dict[str, Any]:
        """Return what else affects the last digits of a result."""
        return {
            "device": self.device.type,
            "torch": str(torch.__version__),
            "threads": torch.get_num_threads(),
        }


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's random numbers within a block; the caller's generator state is restored."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
