"""The training loop: what one step is, when recall is measured, what is saved and resumed.

B images of a batch, C captions drawn for each, L captions an image has at most, D
dimensions, T tokens.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmalign import kernels
from mmalign.data import Draw, Skip, read_ahead
from mmalign.errors import TrainingError, VectorError, shell_command
from mmalign.evaluation.evaluate import retrieval, too_few
from mmalign.kernels.processor import has_bfloat16
from mmalign.model import Encoder, drop_weights, fastest_device, save_model
from mmalign.progress import bar, say
from mmalign.training.interrupts import stop_requests
from mmalign.training.optimization import Arithmetic, Average, adamw, fastest, learning_rate
from mmalign.training.pairs import ENCODED_AT_ONCE, Batch, Pairs, encode_pairs, report_losses
from mmalign.training.resume import write_state
from mmalign.training.runlog import RunLog
from mmalign.training.settings import TrainConfig, epochs_of, limits_reached, refuse_complete
from mmalign.training.words import WordHead

LOG_SECONDS = 10.0
# Share of the training after which images have their full size.
GROWN_AT = 0.7
SAVE_SECONDS = 300.0


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
    """Largest validation score so far, and where several were equal, the smallest loss."""
    best_loss: float = math.inf
    best_step: int = 0
    validated: int = 0
    """Validations that were due so far."""


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
        with _seeded(config.seed, self.device):
            head = WordHead(encoder.dim, pairs.token_counts(), pairs.captions)
        self.words = head.to(self.device)
        self.towers.train()  # `validate` alone leaves this mode, for its own time
        self.trained = torch.nn.ModuleList([self.towers, self.words])
        self.optimizer = adamw(self.trained, config.learning_rate, config.weight_decay)
        self.average = Average(self.towers, config.average)
        self.state = _State()
        self.started = time.monotonic()
        self.lost: dict[str, Skip] = {}
        self.reported = self.saved_step = 0
        self.saved: list[str] = []
        self.steps = epochs_of(config) * self.sampler.steps_per_epoch
        self.arithmetic: dict[str, Arithmetic] = {}
        self.recorded: dict[str, Any] = {}
        """What `save` adds to the state: the fingerprint of the data."""

    @property
    def progress(self) -> float:
        """Share of the training that is done: by steps or by the clock, whichever is further."""
        by_clock = self.elapsed_s / (60 * self.config.minutes) if self.config.minutes else 0.0
        return min(1.0, max(self.state.step / self.steps, by_clock))

    @property
    def elapsed_s(self) -> float:
        """Seconds since the first step, those before a resume included."""
        return self.state.elapsed_s + time.monotonic() - self.started

    def run_all(self) -> dict[str, Any]:
        """Train to the end, or to Ctrl-C or SIGTERM; both leave a state to resume from."""
        reached = limits_reached(
            self.config, self.state.step, self.sampler.steps_per_epoch, self.state.elapsed_s
        )
        refuse_complete(self.run, self.config, reached)
        if not self.arithmetic:
            self.arithmetic = self._choose_arithmetic()
        self._introduce()
        first_step = self.state.step
        log = RunLog(self.run, first_step)
        batches = read_ahead(self.pairs.batch, self.sampler.draws(first_step))
        form = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}"
        try:
            with stop_requests() as stop, bar("train", 100, "%", form) as shown:
                result = self._loop(batches, log, shown, stop)
        except KeyboardInterrupt:
            kept = (
                f"saved at step {self.saved_step}" if self.saved_step else "nothing was saved yet"
            )
            again = shell_command("train", "--out", self.run, "--resume")
            say(f"stopped ({kept}); go on with {again}")
            raise
        finally:
            batches.close()  # type: ignore[attr-defined]
            log.close()
        return result

    def _loop(
        self, batches: Any, log: RunLog, shown: Any, stop: Callable[[], bool]
    ) -> dict[str, Any]:
        seen = waited_s = 0.0
        # Reading the data is no training: counted as such, it would take the warm-up away.
        self.started = logged = saved = time.monotonic()
        due_so_far = math.floor(self.progress * self.config.validations)
        self.state.validated = min(self.state.validated, due_so_far)
        row: dict[str, Any] = {}
        while True:
            asked = time.monotonic()
            batch = next(batches)
            waited_s += time.monotonic() - asked
            loss = self.step(batch)
            seen += len(batch.images_B3SS)
            now, progress = time.monotonic(), self.progress
            done = progress >= 1
            due_so_far = math.floor(progress * self.config.validations)
            due = done or due_so_far > self.state.validated
            if due or now - logged > LOG_SECONDS:
                row = self._row(float(loss), seen, waited_s, now - self.started)
                shown.set_postfix_str(
                    f"epoch {row['epoch']:.1f}  loss {row['loss']:.3f}  "
                    f"{row['samples_per_s']:.0f} images/s  waiting for data {row['wait_share']:.1%}"
                )
                if due:
                    row |= self.validate()
                    self.state.validated = due_so_far
                log.write(row)
                logged = now
            shown.update(100 * progress - shown.n)
            # Beside new best weights at once: a kill then costs neither without the other.
            if due or now - saved > SAVE_SECONDS or stop():
                self.save()
                saved = time.monotonic()
            if done:
                self._drop_weights(keep=1)
                return row
            if stop():
                raise KeyboardInterrupt

    def step(self, batch: Batch) -> Tensor:
        """Take one step and return its loss; nothing moves where the loss is not finite."""
        config = self.config
        for skip in batch.lost:
            self.lost[skip.uri] = skip
        rate = learning_rate(self.progress, config.learning_rate, config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        start = config.start_size if self.towers.any_size else 1.0
        side = image_side(self.encoder.preprocess.size, start, self.progress)
        # Dropout and crops are functions of seed and step: a resumed run repeats an unbroken one.
        seed = config.seed * 1_000_003 + batch.step
        images = config.augment(batch.images_B3SS, side, torch.Generator().manual_seed(seed))
        with _seeded(seed, self.device):
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
        owned_BL = batch.owned_BL.to(self.device)

        def encode(part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            flat = self._text_vectors(part[1].flatten(0, 1))
            # Images wait on the host: a part of them is all that the device must hold.
            images = self._image_vectors(part[0].to(self.device))
            return images, flat.unflatten(0, part[1].shape[:2])

        def objective(image_BD: Tensor, text_BCD: Tensor) -> Tensor:
            return self._loss(image_BD, text_BCD, tokens_BCT, (groups_BC, owned_BL))

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
            "the weights of before are kept"
        )

    def _loss(
        self,
        image_BD: Tensor,
        text_BCD: Tensor,
        tokens_BCT: Tensor,
        numbers: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Images against captions; captions against captions; images against words."""
        groups_BC, owned_BL = numbers
        columns = range(tokens_BCT.shape[1])
        # No caption of an image is a negative of it, drawn in this column or not.
        losses = [
            self._align(image_BD, text_BCD[:, c], (owned_BL, groups_BC[:, c, None]))
            for c in columns
        ]
        loss = torch.stack(losses).mean()
        if self.config.caption_loss and len(columns) > 1:
            # Each column against the one before it: two captions of an image are a pair as well.
            losses = [
                self._align(
                    text_BCD[:, c - 1],
                    text_BCD[:, c],
                    _of_either(groups_BC[:, c - 1], groups_BC[:, c], owned_BL),
                )
                for c in columns
            ]
            loss = loss + self.config.caption_loss * torch.stack(losses).mean()
        if self.config.word_loss:
            loss = loss + self.config.word_loss * self.words(image_BD, tokens_BCT)
        return loss

    def _align(
        self, one_BD: Tensor, other_BD: Tensor, groups: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        scale, bias = self.towers.logit_scale, self.towers.logit_bias
        if self.config.loss == "infonce":
            return kernels.contrastive_loss(one_BD, other_BD, scale, groups=groups)
        return kernels.sigmoid_loss(one_BD, other_BD, scale, bias, groups=groups)

    def _image_vectors(self, images: Tensor) -> Tensor:
        return self.arithmetic["image"].apply(
            self.towers, lambda: self.encoder.image_vectors(images), self.device
        )

    def _text_vectors(self, tokens: Tensor) -> Tensor:
        return self.arithmetic["text"].apply(
            self.towers, lambda: self.encoder.text_vectors(tokens), self.device
        )

    def _choose_arithmetic(self) -> dict[str, Arithmetic]:
        """Return the arithmetic of both towers, measured on as many samples as are encoded once."""
        if self.config.arithmetic != "auto":
            chosen = Arithmetic(bfloat16=self.config.arithmetic == "bfloat16")
            return {"image": chosen, "text": chosen}
        draw = next(self.sampler.draws(0))
        size = self.config.part_size or self.config.batch_size
        batch = self.pairs.batch(Draw(draw.step, draw.rows_B[:size], draw.captions_BC[:size]))
        generator = torch.Generator().manual_seed(0)
        side = self.encoder.preprocess.size
        images = self.config.augment(batch.images_B3SS, side, generator).to(self.device)
        tokens = batch.tokens_BCT.flatten(0, 1).to(self.device)
        with _seeded(self.config.seed, self.device):
            return {
                "image": fastest(
                    self.towers,
                    lambda: self.encoder.image_vectors(images),
                    self.device,
                    is_image=True,
                ),
                "text": fastest(
                    self.towers,
                    lambda: self.encoder.text_vectors(tokens),
                    self.device,
                    is_image=False,
                ),
            }

    def _introduce(self) -> None:
        size = sum(p.numel() for p in self.towers.parameters()) / 1e6
        vectors = torch.empty(self.config.batch_size, self.encoder.dim, device=self.device)
        say(
            f"{self.encoder.name}: {size:.1f}M parameters; {len(self.pairs)} images, "
            f"{self.pairs.captions} captions; images in {self.arithmetic['image']}, "
            f"texts in {self.arithmetic['text']}, loss {kernels.choose_loss(vectors, vectors)}"
        )
        if self.held is not None and (warning := too_few(len(self.held))):
            say(warning)

    def validate(self) -> dict[str, Any]:
        """Measure the averaged weights; save them as the model if none before were better.

        Better is a higher mean reciprocal rank, of both directions together, and where that is
        equal a lower validation loss; of equals the later wins. Without validation pairs the last
        weights are the best.
        """
        state = self.state
        report: dict[str, Any] = {}
        with self.average.applied(self.towers):
            better = True
            if self.held is not None:
                report, score = self._measure(self.held)
                before, now = (state.best, -state.best_loss), (score, -report["validation_loss"])
                better = not now < before
            if better:
                if self.held is not None:
                    state.best, state.best_loss = score, report["validation_loss"]
                state.best_step = state.step
                self.saved.append(save_model(self.encoder, self.run, steps=state.step))
                self._drop_weights(keep=2)  # somebody may just be reading the one before
        return report | {"best_step": state.best_step}

    def _measure(self, held: Pairs) -> tuple[dict[str, Any], float]:
        at_once = min(ENCODED_AT_ONCE, self.config.part_size or ENCODED_AT_ONCE)
        images_ND, texts_PD, owners_P = encode_pairs(self.encoder, held, at_once)
        report = retrieval(images_ND, texts_PD, owners_P)
        firsts_N = np.unique(owners_P, return_index=True)[1]
        images = torch.from_numpy(images_ND).to(self.device)
        texts = torch.from_numpy(texts_PD[firsts_N]).to(self.device)
        with torch.no_grad():
            report["validation_loss"] = float(self._align(images, texts))
        score = (report["image_retrieval_mrr@10"] + report["text_retrieval_mrr@10"]) / 2
        note = "; saturated: the validation loss decides" if score == 1 else ""
        say(
            f"validation at {self.progress:4.0%}: text->image recall@1/5/10 "
            f"{_percent(report, 'image')}, image->text {_percent(report, 'text')}, "
            f"loss {report['validation_loss']:.3f}{note}"
        )
        return report, score

    def _drop_weights(self, keep: int) -> None:
        """Of the weights that this session saved, keep the last, and those that stores need."""
        self.saved = list(dict.fromkeys(reversed(self.saved)))[::-1]
        for name in self.saved[:-keep]:
            drop_weights(self.run, name)
        del self.saved[:-keep]

    def save(self) -> None:
        """Write everything that resuming needs.

        Raises:
            OSError: It cannot be written; what was saved before is whole.
        """
        state = self.recorded | {
            **asdict(self.state),
            "elapsed_s": self.elapsed_s,
            "towers": self.towers.state_dict(),
            "words": self.words.state_dict(),
            "average": self.average.weights,
            "average_steps": self.average.steps,
            "optimizer": self.optimizer.state_dict(),
            "arithmetic": {name: asdict(a) for name, a in self.arithmetic.items()},
            "asked_arithmetic": self.config.arithmetic,
            "machine": self._machine(),
        }
        write_state(self.run, state)
        self.saved_step = self.state.step
        if len(self.lost) > self.reported:
            self.reported = len(self.lost)
            found, lost = len(self.pairs), list(self.lost.values())
            report_losses(self.run, lost, found=found, used=found - len(lost))

    def load(self, state: dict[str, Any]) -> None:
        """Continue from what `save` wrote.

        Raises:
            TrainingError: The weights do not fit, or this machine lacks the arithmetic.
        """
        try:
            self.state = _State(**{f.name: state[f.name] for f in fields(_State)})
            self.towers.load_state_dict(state["towers"])
            self.words.load_state_dict(state["words"])
            self.average.weights = {k: v.to(self.device) for k, v in state["average"].items()}
            self.average.steps = state["average_steps"]
            self.optimizer.load_state_dict(state["optimizer"])
            self.saved_step = self.state.step
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise TrainingError(f"{self.run}: state.pt does not fit the run: {reason}") from error
        # The optimizer's state brings its settings along; what --resume was told counts.
        for group, decay in zip(
            self.optimizer.param_groups, (self.config.weight_decay, 0.0), strict=True
        ):
            group["weight_decay"] = decay
        if self.config.arithmetic == state["asked_arithmetic"]:
            self._take_arithmetic(state)

    def _take_arithmetic(self, state: dict[str, Any]) -> None:
        """Go on in the arithmetic that a run began in."""
        arithmetic = {name: Arithmetic(**a) for name, a in state["arithmetic"].items()}
        before, now = state["machine"], self._machine()
        lacking = any(a.bfloat16 for a in arithmetic.values()) and not has_bfloat16(self.device)
        if lacking or before["device"] != now["device"]:
            kind = "bfloat16" if lacking else before["device"]
            raise TrainingError(
                f"{self.run}: cannot be resumed here bit for bit: it is trained in {kind}, which "
                "this machine does not have; --set arithmetic=float32 goes on all the same"
            )
        other = [f"{k} {now[k]} (was {before[k]})" for k in now if now[k] != before[k]]
        if other:
            say(
                f"warning: resumed with {', '.join(other)}: equal to an unbroken run up to "
                "rounding only"
            )
        self.arithmetic = arithmetic

    def _machine(self) -> dict[str, Any]:
        """What else decides the last digits."""
        return {
            "device": self.device.type,
            "torch": str(torch.__version__),
            "threads": torch.get_num_threads(),
        }

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


def _of_either(one_B: Tensor, other_B: Tensor, owned_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Ids that two captions share where either is a caption of the other's image as well.

    Even ids compare the second caption with the first one's image, odd ids the other way round.
    """
    even_BL, odd_BL = (torch.where(owned_BL < 0, -1, 2 * owned_BL + odd) for odd in (0, 1))
    rows = torch.cat([even_BL, 2 * one_B[:, None] + 1], dim=1)
    return rows, torch.cat([2 * other_B[:, None], odd_BL], dim=1)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw torch's own random numbers from a seed; those of the caller go on as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _percent(recalls: dict[str, Any], kind: str) -> str:
    return " / ".join(f"{100 * recalls[f'{kind}_retrieval_recall@{k}']:.1f}" for k in (1, 5, 10))
