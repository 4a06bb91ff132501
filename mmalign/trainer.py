"""The training loop: what one step is, when recall is measured, what is saved and resumed.

B images of a batch, C captions drawn for each, D dimensions, T tokens.
"""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmalign import files, kernels
from mmalign.config import build, require
from mmalign.data import Augment, Skip, read_ahead
from mmalign.errors import TrainingError, UsageError, VectorError
from mmalign.evaluate import retrieval
from mmalign.model import Encoder, drop_weights, fastest_device, save_model
from mmalign.optimization import Arithmetic, Average, adamw, fastest, learning_rate
from mmalign.pairs import Batch, Pairs, encode_pairs, report_losses
from mmalign.progress import bar, say
from mmalign.runlog import RunLog
from mmalign.words import WordHead

DEFAULT_EPOCHS = 30.0
LOG_SECONDS = 10.0
# Share of the training after which images have their full size.
GROWN_AT = 0.7
SAVE_SECONDS = 300.0


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Every field can stand in a TOML file or behind `--set`."""

    preset: str = "tiny"
    """One of our own presets, trained from scratch."""
    model: str | None = None
    """An open_clip architecture, in place of a preset."""
    pretrained: str | None = None
    """Its weights: a tag, or a local file."""
    caption_keys: tuple[str, ...] = ("captions",)
    image_column: str | None = None
    loss: Literal["infonce", "siglip"] = "infonce"
    epochs: float | None = None
    """Passes over the images; 30 where neither this nor `minutes` is set."""
    minutes: float | None = None
    """Time from the call to the last step; the learning rate follows the clock."""
    batch_size: int = 128
    part_size: int | None = None
    """Images encoded at a time. A larger batch is encoded in parts, twice, in the memory of one
    part, and its loss evaluated once; batch norms then see a part, not the batch."""
    captions_per_image: int = 5
    """Captions drawn for each image of a batch; the image is encoded once for all of them."""
    learning_rate: float = 1e-3
    weight_decay: float = 0.5
    warmup: float = 0.05
    """Share of the training with a rising learning rate."""
    average: float = 0.99
    """Decay of the moving average of the weights, which is what is validated and saved."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    validations: int = 10
    """Times that recall is measured on the way."""
    held_out: float = 0.05
    """Share of the training images to validate on where no validation source is given."""
    seed: int = 0
    caption_loss: float = 0.2
    """Weight of a contrast between two captions of each image, which teaches paraphrases."""
    word_loss: float = 0.3
    """Weight of predicting an image's words; see words.py."""
    start_size: float = 0.67
    """Side of the images in the first steps, as a share of the model's own; they grow to it on the
    way, where the model takes any size. The same minutes then hold more passes, and the last of
    them are sharp."""
    augment: Augment = field(default_factory=Augment)

    def __post_init__(self) -> None:
        for name in ("batch_size", "part_size", "captions_per_image", "validations"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")
        for name in ("learning_rate", "clip_norm", "epochs", "minutes"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "above 0")
        for name in ("warmup", "average", "held_out"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
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
"""What differs where good weights are only to be adapted: less help, smaller steps."""


def configure(values: dict[str, Any], where: str = "configuration") -> TrainConfig:
    """Build a configuration; with `model` among the values, what is not said is `FINE_TUNING`."""
    if values.get("model") is None:
        return build(TrainConfig, values, where)
    augment = {**FINE_TUNING["augment"], **values.get("augment", {})}
    return build(TrainConfig, {**FINE_TUNING, **values, "augment": augment}, where)


def image_side(full: int, start: float, progress: float) -> int:
    """Side to train at: a share of the full one at first, then growing in steps of 16 pixels.

    Source: Tan and Le 2021, "EfficientNetV2: Smaller Models and Faster Training".

    >>> [image_side(96, 2 / 3, p) for p in (0.0, 0.3, 0.6, 0.7, 1.0)]
    [64, 80, 96, 96, 96]
    """
    if start >= 1 or progress >= GROWN_AT:
        return full
    share = start + (1 - start) * progress / GROWN_AT
    return min(full, max(16, round(full * share / 16) * 16))


@dataclass
class _State:
    """Where training stands; saved and resumed."""

    step: int = 0
    elapsed_s: float = 0.0
    best: float = -1.0
    best_step: int = 0


class Trainer:
    """One training: what `train` put together, step by step to the end; final."""

    def __init__(
        self,
        config: TrainConfig,
        encoder: Encoder,
        *,
        pairs: Pairs,
        held: Pairs | None,
        run: Path,
        started: float,
    ) -> None:
        self.config, self.encoder, self.pairs, self.held, self.run = (
            config,
            encoder,
            pairs,
            held,
            run,
        )
        self.device = fastest_device()
        self.towers = encoder.on(self.device).towers
        self.sampler = pairs.sampler(config.batch_size, config.captions_per_image, config.seed)
        self.words = WordHead(encoder.dim, pairs.tokens_PT).to(self.device)
        self.towers.train()  # `validate` alone leaves this mode, for its own time
        self.trained = torch.nn.ModuleList([self.towers, self.words])
        self.optimizer = adamw(self.trained, config.learning_rate, config.weight_decay)
        self.average = Average(self.towers, config.average)
        self.state = _State()
        self.started = started
        self.lost: dict[str, Skip] = {}
        self.saved: list[str] = []
        epochs = config.epochs or (math.inf if config.minutes else DEFAULT_EPOCHS)
        self.steps = epochs * self.sampler.steps_per_epoch
        self.image_arithmetic = self.text_arithmetic = Arithmetic()

    @property
    def progress(self) -> float:
        """Share of the training that is done: by steps or by the clock, whichever is further."""
        by_clock = self.elapsed_s / (60 * self.config.minutes) if self.config.minutes else 0.0
        return min(1.0, max(self.state.step / self.steps, by_clock))

    @property
    def elapsed_s(self) -> float:
        """Seconds of training, those before a resume included."""
        return self.state.elapsed_s + time.monotonic() - self.started

    def run_all(self) -> dict[str, Any]:
        """Train to the end, or to Ctrl-C; both leave a state to resume from."""
        if self.progress >= 1:
            raise UsageError(f"{self.run}: training is complete; --set epochs=N makes it longer")
        self._choose_arithmetic()
        batches = read_ahead(self.pairs.batch, self.sampler.draws(self.state.step))
        log = RunLog(self.run)
        form = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}"
        try:
            with bar("train", 100, "%", form) as shown:
                result = self._loop(batches, log, shown)
        except KeyboardInterrupt:
            self.save()
            say(f"stopped at step {self.state.step}; go on with --resume")
            raise
        finally:
            batches.close()  # type: ignore[attr-defined]
            log.close()
        return result

    def _loop(self, batches: Any, log: RunLog, shown: Any) -> dict[str, Any]:
        seen = waited_s = 0.0
        loop_started = logged = saved = time.monotonic()
        validated = math.floor(self.progress * self.config.validations)
        row: dict[str, Any] = {}
        while True:
            asked = time.monotonic()
            batch = next(batches)
            waited_s += time.monotonic() - asked
            loss = self.step(batch)
            seen += len(batch.images_B3SS)
            now, progress = time.monotonic(), self.progress
            done = progress >= 1
            due = done or math.floor(progress * self.config.validations) > validated
            if due or now - logged > LOG_SECONDS:
                row = self._row(float(loss), seen, waited_s, now - loop_started)
                shown.set_postfix_str(
                    f"epoch {row['epoch']:.1f}  loss {row['loss']:.3f}  "
                    f"{row['samples_per_s']:.0f} images/s  waiting for data {row['wait_share']:.1%}"
                )
                if due:
                    row |= self.validate()
                    validated = math.floor(progress * self.config.validations)
                log.write(row)
                logged = now
            shown.update(100 * progress - shown.n)
            if now - saved > SAVE_SECONDS or done:
                self.save()
                saved = now
            if done:
                return row

    def step(self, batch: Batch) -> Tensor:
        """Take one step and return its loss; nothing moves where the loss is not finite."""
        config = self.config
        # Dropout and crops are functions of seed and step: a resumed run repeats an unbroken one.
        torch.manual_seed(config.seed * 1_000_003 + batch.step)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + batch.step)
        for skip in batch.lost:
            self.lost[skip.uri] = skip
        rate = learning_rate(self.progress, config.learning_rate, config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        start = config.start_size if self.towers.any_size else 1.0
        side = image_side(self.encoder.preprocess.size, start, self.progress)
        images = config.augment(batch.images_B3SS, side, generator).to(self.device)
        loss = self._backward(images, batch)
        torch.nn.utils.clip_grad_norm_(self.trained.parameters(), config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.towers.log_scale.clamp_(0, math.log(100))
        self.average.update(self.towers)
        self.state.step = batch.step + 1
        return loss

    def _backward(self, images: Tensor, batch: Batch) -> Tensor:
        """Add the gradients of a batch; whole, or in parts that fit the memory."""
        tokens_BCT, groups_BC = batch.tokens_BCT.to(self.device), batch.groups_BC.to(self.device)

        def encode(part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            flat = self._text_vectors(part[1].flatten(0, 1))
            return self._image_vectors(part[0]), flat.unflatten(0, part[1].shape[:2])

        def objective(image_BD: Tensor, text_BCD: Tensor) -> Tensor:
            return self._loss(image_BD, text_BCD, tokens_BCT, groups_BC)

        size = self.config.part_size or len(images)
        try:
            if size < len(images):
                parts = list(zip(images.split(size), tokens_BCT.split(size), strict=True))
                loss = kernels.backward_in_parts(self.towers, parts, encode, objective)
            else:
                loss = objective(*encode((images, tokens_BCT)))
                loss.backward()
        except VectorError as problem:
            raise self._diverged(str(problem), batch.step) from problem
        if not torch.isfinite(loss):
            raise self._diverged(f"the loss is {loss.item()}", batch.step)
        return loss.detach()

    def _diverged(self, what: str, step: int) -> TrainingError:
        return TrainingError(
            f"{what} at step {step}: lower learning_rate (now {self.config.learning_rate}); "
            f"{self.run} holds the last good weights"
        )

    def _loss(
        self, image_BD: Tensor, text_BCD: Tensor, tokens_BCT: Tensor, groups_BC: Tensor
    ) -> Tensor:
        """Images against captions; captions against captions; images against words."""
        columns = range(tokens_BCT.shape[1])
        losses = [self._align(image_BD, text_BCD[:, c], groups_BC[:, c]) for c in columns]
        loss = torch.stack(losses).mean()
        if self.config.caption_loss and len(columns) > 1:
            # Each column against the one before it: two captions of an image are a pair as well.
            losses = [
                self._align(text_BCD[:, c - 1], text_BCD[:, c], groups_BC[:, c]) for c in columns
            ]
            loss = loss + self.config.caption_loss * torch.stack(losses).mean()
        if self.config.word_loss:
            loss = loss + self.config.word_loss * self.words(image_BD, tokens_BCT)
        return loss

    def _align(self, one_BD: Tensor, other_BD: Tensor, groups_B: Tensor) -> Tensor:
        scale, bias = self.towers.logit_scale, self.towers.logit_bias
        if self.config.loss == "infonce":
            return kernels.contrastive_loss(one_BD, other_BD, scale, groups=groups_B)
        return kernels.sigmoid_loss(one_BD, other_BD, scale, bias, groups=groups_B)

    def _image_vectors(self, images: Tensor) -> Tensor:
        return self.image_arithmetic.apply(
            self.towers, lambda: self.encoder.image_vectors(images), self.device
        )

    def _text_vectors(self, tokens: Tensor) -> Tensor:
        return self.text_arithmetic.apply(
            self.towers, lambda: self.encoder.text_vectors(tokens), self.device
        )

    def _choose_arithmetic(self) -> None:
        batch = self.pairs.batch(next(self.sampler.draws(0)))
        generator = torch.Generator().manual_seed(0)
        side = self.encoder.preprocess.size
        images = self.config.augment(batch.images_B3SS, side, generator).to(self.device)
        tokens = batch.tokens_BCT.flatten(0, 1).to(self.device)
        self.image_arithmetic = fastest(
            self.towers, lambda: self.encoder.image_vectors(images), self.device, is_image=True
        )
        self.text_arithmetic = fastest(
            self.towers, lambda: self.encoder.text_vectors(tokens), self.device, is_image=False
        )
        size = sum(p.numel() for p in self.towers.parameters()) / 1e6
        vectors = torch.empty(self.config.batch_size, self.encoder.dim, device=self.device)
        say(
            f"{self.encoder.name}: {size:.1f}M parameters; {len(self.pairs)} images, "
            f"{len(self.pairs.tokens_PT)} captions; images in {self.image_arithmetic}, "
            f"texts in {self.text_arithmetic}, loss {kernels.choose_loss(vectors, vectors)}"
        )

    def validate(self) -> dict[str, Any]:
        """Measure the averaged weights; save them as the model if they are the best so far."""
        score, recalls = 0.0, {}
        with self.average.applied(self.towers):
            if self.held is not None:
                recalls = retrieval(*encode_pairs(self.encoder, self.held))
                both = (recalls[f"{kind}_retrieval_recall@10"] for kind in ("image", "text"))
                score = sum(both) / 2
                say(
                    f"validation at {self.progress:4.0%}: text->image recall@1/5/10 "
                    f"{_percent(recalls, 'image')}, image->text {_percent(recalls, 'text')}"
                )
            if self.held is None or score > self.state.best:
                self.state.best, self.state.best_step = score, self.state.step
                self._save_best()
        return recalls | {"best_step": self.state.best_step}

    def _save_best(self) -> None:
        """Save the weights at hand as the model; of those this session saved, the last two stay.

        The one before may just be read by somebody.
        """
        name = save_model(self.encoder, self.run, steps=self.state.step)
        self.saved = [*(n for n in self.saved if n != name), name]
        for old in self.saved[:-2]:
            drop_weights(self.run, old)
        del self.saved[:-2]

    def save(self) -> None:
        """Write everything that resuming needs."""
        state = {
            "step": self.state.step,
            "elapsed_s": self.elapsed_s,
            "best": self.state.best,
            "best_step": self.state.best_step,
            "towers": self.towers.state_dict(),
            "words": self.words.state_dict(),
            "average": self.average.weights,
            "average_steps": self.average.steps,
            "optimizer": self.optimizer.state_dict(),
        }
        files.write_through(self.run / "state.pt", lambda path: _write_state(state, path))
        if self.lost:
            report_losses(self.run, list(self.lost.values()), len(self.pairs))

    def load(self) -> None:
        """Continue from what `save` wrote."""
        state = torch.load(self.run / "state.pt", map_location=self.device, weights_only=True)
        self.state = _State(state["step"], state["elapsed_s"], state["best"], state["best_step"])
        self.towers.load_state_dict(state["towers"])
        self.words.load_state_dict(state["words"])
        self.average.weights = state["average"]
        self.average.steps = state["average_steps"]
        self.optimizer.load_state_dict(state["optimizer"])

    def _row(self, loss: float, seen: float, waited_s: float, seconds: float) -> dict[str, Any]:
        return {
            "step": self.state.step,
            "epoch": self.state.step / self.sampler.steps_per_epoch,
            "elapsed_s": round(self.elapsed_s, 1),
            "loss": loss,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "logit_scale": float(self.towers.logit_scale.detach()),
            "samples_per_s": round(seen / seconds, 1),
            "wait_share": round(waited_s / seconds, 4),
        }


def _write_state(state: dict[str, Any], path: str) -> None:
    # Given a name, torch forgets why the system did not take its bytes.
    with open(path, "wb") as file:
        torch.save(state, file)


def _percent(recalls: dict[str, Any], kind: str) -> str:
    return " / ".join(f"{100 * recalls[f'{kind}_retrieval_recall@{k}']:.1f}" for k in (1, 5, 10))
