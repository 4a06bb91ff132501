"""The training loop: runs all batches, measures recall and saves the run.

Shapes: N images, P captions, D dimensions.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmalign import kernels
from mmalign.data import Skip, read_ahead
from mmalign.errors import TrainingError, shell_command
from mmalign.evaluation.evaluate import retrieval, too_few
from mmalign.model import Encoder, drop_weights, save_model
from mmalign.progress import bar, say
from mmalign.training.interrupts import stop_requests
from mmalign.training.learner import Learner
from mmalign.training.pairs import ENCODED_AT_ONCE, Pairs, encode_pairs, write_skipped
from mmalign.training.resume import write_state
from mmalign.training.runlog import RunLog
from mmalign.training.settings import TrainConfig, epochs_of, limits_reached, refuse_complete

LOG_SECONDS = 10.0
SAVE_SECONDS = 300.0


@dataclass
class State:
    """The progress of a training; saved and resumed."""

    step: int = 0
    elapsed_s: float = 0.0
    best: float = -1.0
    """Best validation score so far, and the smallest loss among equal scores."""
    best_loss: float = math.inf
    best_step: int = 0
    validated: int = 0
    """Number of validations due so far."""


class Trainer:
    """One training: runs what `train` assembled, step by step to the end."""

    def __init__(
        self,
        config: TrainConfig,
        encoder: Encoder,
        *,
        pairs: Pairs,
        held_out: Pairs | None,
        run: Path,
    ) -> None:
        self.config, self.encoder, self.run = config, encoder, run
        self.pairs, self.held_out = pairs, held_out
        self.sampler = pairs.sampler(config.batch_size, config.captions_per_image, config.seed)
        self.learner = Learner(config, encoder, pairs)
        self.state = State()
        self.started = time.monotonic()
        self.skips_by_uri: dict[str, Skip] = {}
        self.reported_count = self.saved_step = 0
        self.saved: list[str] = []
        self.steps = epochs_of(config) * self.sampler.steps_per_epoch
        self.data_fingerprint: dict[str, Any] = {}
        """What `save` adds to the state: the fingerprint of the data."""

    @property
    def progress(self) -> float:
        """Return the share of the training that is done: by steps or time, whichever is larger."""
        by_clock = self.elapsed_s / (60 * self.config.minutes) if self.config.minutes else 0.0
        return min(1.0, max(self.state.step / self.steps, by_clock))

    @property
    def elapsed_s(self) -> float:
        """Return the seconds since the first step, including those before a resume."""
        return self.state.elapsed_s + time.monotonic() - self.started

    def run_all(self) -> dict[str, Any]:
        """Train to the end, or to Ctrl-C or SIGTERM; both leave a state to resume from."""
        reached = limits_reached(
            self.config, self.state.step, self.sampler.steps_per_epoch, self.state.elapsed_s
        )
        refuse_complete(self.run, self.config, reached)
        if not self.learner.arithmetic:
            self.learner.choose_arithmetic(self.pairs, next(self.sampler.draws(0)))
        self._announce()
        first_step = self.state.step
        log = RunLog(self.run, first_step)
        batches = read_ahead(self.pairs.batch, self.sampler.draws(first_step))
        bar_format = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}"
        try:
            with stop_requests() as stop, bar("train", 100, "%", bar_format) as progress_bar:
                result = self._loop(batches, log, progress_bar, stop)
        except KeyboardInterrupt:
            kept = (
                f"saved at step {self.saved_step}" if self.saved_step else "nothing was saved yet"
            )
            again = shell_command("train", "--out", self.run, "--resume")
            say(f"stopped ({kept}); continue with {again}")
            raise
        finally:
            batches.close()  # type: ignore[attr-defined]
            log.close()
        return result

    def _loop(
        self, batches: Any, log: RunLog, progress_bar: Any, stop: Callable[[], bool]
    ) -> dict[str, Any]:
        images_seen = waited_s = 0.0
        # Reading the data does not count as training time: it would use up the warm-up.
        self.started = logged = saved = time.monotonic()
        validations_due = math.floor(self.progress * self.config.validations)
        self.state.validated = min(self.state.validated, validations_due)
        row: dict[str, Any] = {}
        while True:
            wait_started = time.monotonic()
            batch = next(batches)
            waited_s += time.monotonic() - wait_started
            for skip in batch.skips:
                self.skips_by_uri[skip.uri] = skip
            loss = self.learner.step(batch, self.progress)
            self.state.step = batch.step + 1
            images_seen += len(batch.images_B3SS)
            now, progress = time.monotonic(), self.progress
            done = progress >= 1
            validations_due = math.floor(progress * self.config.validations)
            validation_due = done or validations_due > self.state.validated
            if validation_due or now - logged > LOG_SECONDS:
                row = self._log_row(float(loss), images_seen, waited_s, now - self.started)
                progress_bar.set_postfix_str(
                    f"epoch {row['epoch']:.1f}  loss {row['loss']:.3f}  "
                    f"{row['samples_per_s']:.0f} images/s  waiting for data {row['wait_share']:.1%}"
                )
                if validation_due:
                    row |= self.validate()
                    self.state.validated = validations_due
                log.write(row)
                logged = now
            progress_bar.update(100 * progress - progress_bar.n)
            # Saved together with new best weights, so that a kill never loses only one of them.
            if validation_due or now - saved > SAVE_SECONDS or stop():
                self.save()
                saved = time.monotonic()
            if done:
                self._drop_weights(keep=1)
                return row
            if stop():
                raise KeyboardInterrupt

    def _announce(self) -> None:
        learner = self.learner
        size = sum(p.numel() for p in learner.towers.parameters()) / 1e6
        vectors = torch.empty(self.config.batch_size, self.encoder.dim, device=learner.device)
        say(
            f"{self.encoder.name}: {size:.1f}M parameters; {len(self.pairs)} images, "
            f"{self.pairs.caption_count} captions; images in {learner.arithmetic['image']}, "
            f"texts in {learner.arithmetic['text']}, "
            f"loss kernel {kernels.choose_loss(vectors, vectors)}"
        )
        if self.held_out is not None and (warning := too_few(len(self.held_out))):
            say(warning)

    def validate(self) -> dict[str, Any]:
        """Validate the averaged weights; save them as the model unless earlier ones were better.

        Weights are better if their mean reciprocal rank over both directions is higher or, if that
        is equal, their validation loss is lower; if both are equal, later weights are better.
        Without validation pairs the last weights are the best.
        """
        state = self.state
        report: dict[str, Any] = {}
        with self.learner.average.applied(self.learner.towers):
            better = True
            if self.held_out is not None:
                report, score = self._measure(self.held_out)
                before, now = (state.best, -state.best_loss), (score, -report["validation_loss"])
                better = not now < before
            if better:
                if self.held_out is not None:
                    state.best, state.best_loss = score, report["validation_loss"]
                state.best_step = state.step
                self.saved.append(save_model(self.encoder, self.run, steps=state.step))
                self._drop_weights(keep=2)  # another process may be reading the previous ones
        return report | {"best_step": state.best_step}

    def _measure(self, pairs: Pairs) -> tuple[dict[str, Any], float]:
        at_once = min(ENCODED_AT_ONCE, self.config.part_size or ENCODED_AT_ONCE)
        images_ND, texts_PD, owners_P = encode_pairs(self.encoder, pairs, at_once)
        report = retrieval(images_ND, texts_PD, owners_P)
        firsts_N = np.unique(owners_P, return_index=True)[1]
        device = self.learner.device
        images = torch.from_numpy(images_ND).to(device)
        texts = torch.from_numpy(texts_PD[firsts_N]).to(device)
        with torch.no_grad():
            report["validation_loss"] = float(self.learner.objective.contrast(images, texts))
        score = (report["image_retrieval_mrr@10"] + report["text_retrieval_mrr@10"]) / 2
        note = "; recall cannot improve, so the validation loss decides" if score == 1 else ""
        say(
            f"validation at {self.progress:4.0%}: text->image recall@1/5/10 "
            f"{_percent(report, 'image')}, image->text {_percent(report, 'text')}, "
            f"loss {report['validation_loss']:.3f}{note}"
        )
        return report, score

    def _drop_weights(self, keep: int) -> None:
        """Delete weights saved by this process, except the last `keep` and any that stores need."""
        self.saved = list(dict.fromkeys(reversed(self.saved)))[::-1]
        for name in self.saved[:-keep]:
            drop_weights(self.run, name)
        del self.saved[:-keep]

    def save(self) -> None:
        """Write everything that resuming needs.

        Raises:
            OSError: It cannot be written; the previous state is intact.
        """
        progress = {**asdict(self.state), "elapsed_s": self.elapsed_s}
        write_state(self.run, self.data_fingerprint | progress | self.learner.state())
        self.saved_step = self.state.step
        if len(self.skips_by_uri) > self.reported_count:
            self.reported_count = len(self.skips_by_uri)
            found, skips = len(self.pairs), list(self.skips_by_uri.values())
            write_skipped(self.run, skips, found=found, used=found - len(skips))

    def load(self, state: dict[str, Any]) -> None:
        """Continue from what `save` wrote.

        Raises:
            TrainingError: It does not fit the run, or this machine lacks the arithmetic.
        """
        missing = [f.name for f in fields(State) if f.name not in state]
        if missing:
            raise TrainingError(
                f"{self.run}: state.pt does not match the run: it has no {missing[0]}"
            )
        self.learner.restore(state, str(self.run))
        self.state = State(**{f.name: state[f.name] for f in fields(State)})
        self.saved_step = self.state.step

    def _log_row(
        self, loss: float, images_seen: float, waited_s: float, seconds: float
    ) -> dict[str, Any]:
        return {
            "step": self.state.step,
            "epoch": self.state.step / self.sampler.steps_per_epoch,
            "elapsed_s": round(self.elapsed_s, 1),
            "loss": loss,
            "learning_rate": self.learner.learning_rate,
            "logit_scale": float(self.learner.towers.logit_scale.detach()),
            "samples_per_s": round(images_seen / seconds, 1),
            "wait_share": round(waited_s / seconds, 4),
        }


def _percent(recalls: dict[str, Any], kind: str) -> str:
    return " / ".join(f"{100 * recalls[f'{kind}_retrieval_recall@{k}']:.1f}" for k in (1, 5, 10))
