"""`mmalign train`: pairs in, an aligned dual encoder out.

    scan -> encoder -> decode once -> [draw, augment, two towers, loss, step]... -> best model

The part in brackets is `trainer.py`; what it needs is put together here.
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmalign import files
from mmalign.config import dump
from mmalign.data import Record, Skip, scan
from mmalign.errors import ConfigError, UsageError
from mmalign.model import Encoder, blank_model, new_model, save_description
from mmalign.pairs import can_mirror, load_pairs, report_losses
from mmalign.progress import say
from mmalign.trainer import TrainConfig, Trainer, configure

__all__ = ["TrainConfig", "configure", "train"]

MIN_HELD_OUT = 200


def train(
    config: TrainConfig,
    sources: Sequence[str],
    out: str | Path,
    *,
    val: Sequence[str] = (),
    resume: bool = False,
) -> dict[str, Any]:
    """Train an encoder and leave it in a run folder.

    Args:
        config: How.
        sources: Training pairs, as `data.scan` takes them.
        out: The run folder: new, or with `resume` the one to go on with.
        val: Validation pairs; by default a share of the training images is held out.
        resume: Go on from the last saved state, with the batches that would have come.

    Returns:
        The last line of metrics.jsonl: recall on the validation pairs, samples per second, the
        share of time spent waiting for data.

    Raises:
        TrainingError: The loss is NaN, or a batch is larger than the data.
        DataError: A source is empty.
    """
    started = time.monotonic()
    run = _open_run(Path(out), config, resume)
    records, val_records, skips = _read(config, sources, val)
    encoder = blank_model(run) if resume else _new_encoder(config, records)
    if config.augment.flip is None:
        config = replace(config, augment=replace(config.augment, flip=can_mirror(records)))
    crops = config.augment.crop_min < 1 or bool(config.augment.flip)
    total = len(records) + len(val_records) + len([s for s in skips if not s.kept])
    with _scratch(run / "cache") as cache:
        pairs, lost = load_pairs(encoder, records, cache / "train.npy", crops=crops, label="decode")
        held, lost_held = (
            load_pairs(encoder, val_records, cache / "val.npy", crops=False, label="decode val")
            if val_records
            else (None, [])
        )
        report_losses(run, [*skips, *lost, *lost_held], total)
        trainer = Trainer(config, encoder, pairs=pairs, held=held, run=run, started=started)
        if resume:
            trainer.load()
        else:
            files.write_text(run / "config.toml", dump(config))
            save_description(encoder, run)
        return trainer.run_all()


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Lend a folder for decoded images; a resumed run decodes them again."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _open_run(run: Path, config: TrainConfig, resume: bool) -> Path:
    if resume:
        if not (run / "state.pt").exists():
            raise UsageError(f"{run}: nothing to resume: there is no state.pt")
        return run
    if config.model and config.preset != TrainConfig.preset:
        raise ConfigError(f"give preset={config.preset} or model={config.model}, not both")
    if (run / "config.toml").exists():
        raise UsageError(f"{run}: holds a run already: go on with --resume, or name another --out")
    run.mkdir(parents=True, exist_ok=True)
    return run


def _read(
    config: TrainConfig, sources: Sequence[str], val: Sequence[str]
) -> tuple[list[Record], list[Record], list[Skip]]:
    """List training and validation records, and all that was left out."""
    columns: dict[str, Any] = {
        "caption_keys": config.caption_keys,
        "image_column": config.image_column,
    }
    catalog = scan(sources, **columns, need_captions=True)
    if val:
        other = scan(val, **columns, need_captions=True)
        return catalog.records, other.records, [*catalog.skips, *other.skips]
    count = min(1000, round(config.held_out * len(catalog.records)))
    if len(catalog.records) < MIN_HELD_OUT or not count:
        return catalog.records, [], catalog.skips
    say(f"no --val given: {count} of {len(catalog.records)} images are held out to validate on")
    order = np.random.default_rng(config.seed).permutation(len(catalog.records))
    chosen = set(order[:count].tolist())
    held = [r for i, r in enumerate(catalog.records) if i in chosen]
    rest = [r for i, r in enumerate(catalog.records) if i not in chosen]
    return rest, held, catalog.skips


def _new_encoder(config: TrainConfig, records: Sequence[Record]) -> Encoder:
    torch.manual_seed(config.seed)
    if config.model:
        from mmalign.model import openclip

        return openclip.load(config.model, config.pretrained)
    if config.pretrained:
        raise ConfigError("pretrained needs model: say which architecture the weights belong to")
    return new_model(config.preset, [c for r in records for c in r.captions])
