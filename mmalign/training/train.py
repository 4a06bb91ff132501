"""`mmalign train`: pairs in, an aligned dual encoder out.

    scan -> encoder -> decode once -> [draw, augment, two towers, loss, step]... -> best model

The part in brackets is in `trainer.py` (the loop) and `learner.py` (a step); this file assembles
what they need.
"""

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmalign import files
from mmalign.config import dump, read_toml
from mmalign.data import Record, Skip, Sources, as_sources, count_found, refuse_own_sources, scan
from mmalign.errors import ConfigError, UsageError
from mmalign.evaluation.evaluate import describe_overlap
from mmalign.locks import sole_user
from mmalign.model import (
    Encoder,
    blank_model,
    has_weights,
    new_model,
    require_preset,
    save_description,
)
from mmalign.progress import say
from mmalign.training.leakage import describe_leakage
from mmalign.training.pairs import Pairs, can_mirror, load_pairs, write_skipped
from mmalign.training.resume import (
    check_contents,
    check_listing,
    check_settings,
    fingerprint,
    listing_hash,
    read_state,
)
from mmalign.training.runlog import METRICS
from mmalign.training.settings import TrainConfig, configure, limits_reached, refuse_complete
from mmalign.training.trainer import Trainer

__all__ = ["TrainConfig", "configure", "train"]

# Images held out for validation if no validation pairs are given and there are enough images.
MIN_IMAGES, MIN_HELD_OUT, MAX_HELD_OUT = 200, 50, 1000
HELD_OUT_SHARE, MAX_HELD_OUT_SHARE = 0.05, 0.1
CONFIG = "config.toml"
SIGMOID_SCALE, SIGMOID_BIAS = 10.0, -10.0


def train(
    sources: Sources,
    out: str | Path,
    config: TrainConfig | None = None,
    *,
    val: Sources = (),
    resume: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Train an encoder and save it in a run folder.

    Args:
        sources: Training pairs, as `data.scan` takes them; by default those of the configuration,
            or those that the resumed run was trained on.
        out: The run folder: new, or with `resume` the one to continue.
        config: How to train; by default built from `settings`.
        val: Validation pairs, in the same form; by default a share of the training images is held
            out.
        resume: Continue from the last saved state, with the batches that would have come next. The
            result equals an uninterrupted run bit for bit, except with `minutes`, which uses the
            clock.
        settings: Fields of `TrainConfig`, instead of `config`: `epochs=20, model="ViT-B-32"`. A
            resumed run keeps its own values of those not given.

    Returns:
        The last line of metrics.jsonl: recall on the validation pairs, samples per second, the
        share of time spent waiting for data.

    Raises:
        TrainingError: The loss is NaN, a batch is larger than the data, or a run cannot be resumed
            as its data has changed or this machine lacks its arithmetic.
        ConfigError: A setting is unknown or invalid, or would make a resumed run a different one.
        DataError: A source is empty.
    """
    run = Path(out)
    if config is None:
        before = read_toml(run / CONFIG) if resume and (run / CONFIG).exists() else {}
        config = configure(before | settings, "train")
    elif settings:
        raise UsageError(f"give a config or settings, not both: {', '.join(settings)}")
    sources, val = as_sources(sources), as_sources(val)
    if resume and not (run / CONFIG).exists():
        raise UsageError(f"{run}: nothing to resume: there is no {CONFIG}")
    files.utf8_name(run)
    if not resume:
        _require_model(config)
    refuse_own_sources(run, (*(sources or config.data), *(val or config.val)))
    is_new = not run.exists()
    run.mkdir(parents=True, exist_ok=True)
    try:
        with sole_user(run) as alone:
            if not alone:
                raise UsageError(f"{run}: another process is training there")
            state = _open_run(run, config, resume)
            config = _with_sources(config, sources, val, run if resume else None)
            return _train(config, run, state)
    finally:
        if is_new:
            with suppress(OSError):  # not empty: something was written there
                run.rmdir()


def _train(config: TrainConfig, run: Path, state: dict[str, Any] | None) -> dict[str, Any]:
    if state is None:
        _require_model(config)
    records, val_records, skips = _list_records(config)
    if state is None:
        encoder = _new_encoder(config, records)
        save_description(encoder, run)
    else:
        check_listing(run, state, records, val_records)
        encoder = blank_model(run)
    # From here on a killed run can be resumed, as its configuration is saved.
    files.write_text(run / CONFIG, dump(config))
    if config.augment.flip is None:
        config = replace(config, augment=replace(config.augment, flip=can_mirror(records)))
    crops = config.augment.crop_min < 1 or bool(config.augment.flip)
    found = count_found(len(records) + len(val_records), skips)
    with _scratch(run / "cache") as cache:
        pairs, train_skips = load_pairs(
            encoder, records, cache / "train.npy", crops=crops, label="decode"
        )
        held_out, val_skips = (
            load_pairs(encoder, val_records, cache / "val.npy", crops=False, label="decode val")
            if val_records
            else (None, [])
        )
        used = len(pairs) + (len(held_out) if held_out else 0)
        write_skipped(run, [*skips, *train_skips, *val_skips], found=found, used=used)
        _warn_about_data(pairs, held_out)
        trainer = Trainer(config, encoder, pairs=pairs, held_out=held_out, run=run)
        if state is not None:
            check_contents(run, state, pairs.pixels, held_out.pixels if held_out else None)
            trainer.load(state)
        trainer.data_fingerprint = {
            "listed": listing_hash(records, val_records),
            "training": fingerprint(pairs.pixels),
            "validation": fingerprint(held_out.pixels) if held_out else {},
        }
        return trainer.run_all()


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder for decoded images; a resumed run decodes them again."""
    files.remove(folder)  # left by a process that was killed
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _open_run(run: Path, config: TrainConfig, resume: bool) -> dict[str, Any] | None:
    """Return the state to continue from; None if training starts from the beginning."""
    if config.model and config.preset != TrainConfig.preset:
        raise ConfigError(f"give preset={config.preset} or model={config.model}, not both")
    state = read_state(run) if resume else None
    if state is None:
        if (run / "state.pt").exists() or (not resume and has_weights(run)):
            raise UsageError(
                f"{run}: already holds a run: continue it with --resume, or give another --out"
            )
        if has_weights(run):
            raise UsageError(f"{run}: nothing to resume: there is no state.pt")
        if (run / CONFIG).exists():
            say(f"{run}: its training was stopped before anything was saved, so it starts over")
        for left in (METRICS, "events", "skipped.jsonl"):
            files.remove(run / left)
        return None
    check_settings(run, _recorded_config(run), config)
    steps_per_epoch = len(state["training"]["samples"]) // config.batch_size
    reached = limits_reached(config, state["step"], steps_per_epoch, state["elapsed_s"])
    refuse_complete(run, config, reached)
    return state


def _recorded_config(run: Path) -> TrainConfig:
    return configure(read_toml(run / CONFIG), str(run / CONFIG))


def _with_sources(
    config: TrainConfig, sources: Sequence[str], val: Sequence[str], resumed: Path | None
) -> TrainConfig:
    """Record the training sources in a configuration, with names valid from every folder."""
    before = _recorded_config(resumed) if resumed else config
    data = tuple(map(_absolute, sources)) or config.data or before.data
    if not data:
        raise UsageError("no training data: give --data SRC")
    return replace(config, data=data, val=tuple(map(_absolute, val)) or config.val or before.val)


def _absolute(source: str) -> str:
    return source if "://" in source else os.path.abspath(source)


def _list_records(config: TrainConfig) -> tuple[list[Record], list[Record], list[Skip]]:
    """List training and validation records, and everything that was left out."""
    columns: dict[str, Any] = {
        "caption_keys": config.caption_keys,
        "image_column": config.image_column,
    }
    catalog = scan(config.data, **columns, need_captions=True)
    if config.val:
        other = scan(config.val, **columns, need_captions=True)
        return catalog.records, other.records, [*catalog.skips, *other.skips]
    images = len(catalog.records)
    count = held_out_images(images, config.held_out)
    if not count:
        say(f"no --val given and none of {images} images held out: the last weights are kept")
        return catalog.records, [], catalog.skips
    say(f"no --val given: {count} of {images} images are held out for validation")
    chosen = set(np.random.default_rng(config.seed).permutation(images)[:count].tolist())
    held_out = [r for i, r in enumerate(catalog.records) if i in chosen]
    training = [r for i, r in enumerate(catalog.records) if i not in chosen]
    return training, held_out, catalog.skips


def held_out_images(images: int, share: float | None) -> int:
    """Return how many images are held out, see `TrainConfig.held_out`.

    Fewer than 50 measure little; more than a tenth would cost too much training data.

    >>> [held_out_images(n, None) for n in (1, 20, 199, 200, 600, 10_000, 1_000_000)]
    [0, 0, 0, 20, 50, 500, 1000]
    >>> held_out_images(20, 0.1)
    2
    """
    if share is not None:
        return min(MAX_HELD_OUT, round(share * images))
    if images < MIN_IMAGES:
        return 0
    at_least = min(MIN_HELD_OUT, math.floor(MAX_HELD_OUT_SHARE * images))
    return min(MAX_HELD_OUT, max(at_least, round(HELD_OUT_SHARE * images)))


def _warn_about_data(pairs: Pairs, held_out: Pairs | None) -> None:
    """Warn of what makes a training or its validation meaningless."""
    warnings = [describe_overlap(pairs.pixels.records, "images", "nothing is learned")]
    content_hashes_N = pairs.pixels.content_hashes_N
    if len(pairs) > 1 and content_hashes_N[0] and (content_hashes_N == content_hashes_N[0]).all():
        warnings.append(
            f"warning: all {len(pairs)} images are equal and cannot be told apart, "
            "so nothing is learned"
        )
    if held_out is not None:
        warnings.append(describe_leakage(pairs.pixels, held_out.pixels))
        consequence = "recall on them is meaningless"
        warnings.append(describe_overlap(held_out.pixels.records, "validation images", consequence))
    for warning in warnings:
        if warning:
            say(warning)


def _new_encoder(config: TrainConfig, records: Sequence[Record]) -> Encoder:
    # The caller's random number generator keeps its state.
    with torch.random.fork_rng([]):
        torch.manual_seed(config.seed)
        if config.model:
            from mmalign.model import openclip

            encoder = openclip.load(config.model, config.pretrained)
            encoder.towers.read("image", "text")
            if encoder.source:  # it has trained weights
                encoder.origin = encoder.described(encoder.towers.state_dict())
        else:
            encoder = new_model(config.preset, [c for r in records for c in r.captions])
    if config.loss == "siglip" and float(encoder.towers.logit_bias.detach()) == 0:
        _start_sigmoid(encoder)
    return encoder


def _require_model(config: TrainConfig) -> None:
    """Refuse an unknown model before reading the sources."""
    if config.model:
        from mmalign.model import openclip

        openclip.require(config.model, config.pretrained)
    elif config.pretrained:
        raise ConfigError("pretrained needs model, the architecture that the weights belong to")
    else:
        require_preset(config.preset)


def _start_sigmoid(encoder: Encoder) -> None:
    """Set scale and bias to the initial values of the sigmoid loss if a model has no bias.

    With CLIP's scale of 100 and no bias, nearly every negative is taken for a pair, and the first
    gradients destroy the model.

    Source: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training".
    """
    with torch.no_grad():
        encoder.towers.log_scale.fill_(math.log(SIGMOID_SCALE))
        encoder.towers.logit_bias.fill_(SIGMOID_BIAS)
    start = f"logit scale {SIGMOID_SCALE} and logit bias {SIGMOID_BIAS}"
    say(f"{encoder.name} has no logit bias: the siglip loss starts with {start}")
