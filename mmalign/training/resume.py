"""The saved state of a training, and whether it may be resumed.

A resumed training equals an uninterrupted one bit for bit, or is refused with the reason. So the
state records not only weights and optimizer, but also the training data and the arithmetic.

Shapes: N samples.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmalign import files
from mmalign.arrays import Ints
from mmalign.data import Pixels, Record
from mmalign.errors import ConfigError, TrainingError
from mmalign.progress import say

STATE = "state.pt"
# Fields that decide the network, the samples and their order; they cannot change on resume.
FIXED_FIELDS = (
    "preset", "model", "pretrained", "caption_keys", "image_column", "held_out", "seed",
    "batch_size", "captions_per_image",
)  # fmt: skip


def read_state(run: Path) -> dict[str, Any] | None:
    """Read what `write_state` wrote; None if nothing was saved yet.

    Raises:
        TrainingError: The file is damaged, or from an earlier version.
    """
    file = run / STATE
    if not file.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        state["listed"], state["training"], state["validation"], state["arithmetic"]
    except KeyError:
        raise TrainingError(
            f"{file}: from an earlier version, which did not record the training data, so it "
            "cannot be resumed; train into another --out"
        ) from None
    except Exception as error:  # torch raises many kinds, with no common base of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrainingError(f"{file}: damaged: {reason}; train into another --out") from error
    return state


def write_state(run: Path, state: dict[str, Any]) -> None:
    """Write a state; the previous one is kept until this one is complete.

    Raises:
        OSError: It cannot be written.
    """

    def write(path: str) -> None:
        # Given a path, torch loses the system's reason for a failed write.
        with open(path, "wb") as file:
            torch.save(state, file)

    files.write_through(run / STATE, write)


def check_settings(run: Path, before: Any, now: Any) -> None:
    """Refuse a configuration that would make a run a different training.

    Raises:
        ConfigError: A field that is fixed when a run begins has another value.
    """
    for name in FIXED_FIELDS:
        old, new = getattr(before, name), getattr(now, name)
        if old != new:
            raise ConfigError(
                f"{run}: {name} cannot be changed when a run is resumed: it is {old}, not {new}; "
                "leave it out, or train into another --out"
            )


def sample_hashes(records: Sequence[Record]) -> Ints:
    """Hash the id and captions of each sample, in order."""
    return np.array([_hash((r.id, r.captions)) for r in records], np.int64)


def listing_hash(training: Sequence[Record], validation: Sequence[Record]) -> int:
    """Hash ids and captions of all listed samples, including those that cannot be read."""
    hashes = [sample_hashes(records).tobytes() for records in (training, validation)]
    return _hash(hashes)


def fingerprint(pixels: Pixels) -> dict[str, torch.Tensor]:
    """Return what identifies the samples of a training: ids, captions, contents."""
    return {
        "samples": torch.from_numpy(sample_hashes(pixels.records)),
        "contents": torch.from_numpy(pixels.content_hashes_N),
    }


def check_listing(
    run: Path, state: dict[str, Any], training: Sequence[Record], validation: Sequence[Record]
) -> None:
    """Refuse samples with other ids or captions than a run began with, before decoding any.

    Raises:
        TrainingError: They differ; the message names how many, and the first.
    """
    if listing_hash(training, validation) == state["listed"]:
        return
    recorded_hashes = {
        h for part in _data_fingerprints(state) if part for h in part["samples"].tolist()
    }
    records = [*training, *validation]
    hashes = sample_hashes(records).tolist()
    new = [r.uri for r, h in zip(records, hashes, strict=True) if h not in recorded_hashes]
    gone = len(recorded_hashes.difference(hashes))
    if new or gone:
        first = f" (the first: {new[0]})" if new else ""
        _changed(run, f"{len(new)} samples are new or have other captions{first}, {gone} are gone")
    _changed(run, "the samples are in another order")


def check_contents(run: Path, state: dict[str, Any], training: Pixels, validation: Any) -> None:
    """Refuse images with other contents than a run began with.

    Raises:
        TrainingError: They differ; the message names how many, and the first.
    """
    for before, pixels in zip(_data_fingerprints(state), (training, validation), strict=True):
        if pixels is None or not before:
            if pixels is None and not before:
                continue
            _changed(run, "validation samples were added or removed")
        now = fingerprint(pixels)
        if not torch.equal(before["samples"], now["samples"]):
            _changed(run, "the samples that can be decoded are not the same as before")
        # A hash of 0: the image did not fit on the disk, so it has not been read yet.
        read = (before["contents"] != 0) & (now["contents"] != 0)
        if not read.all():
            say(
                f"warning: {int((~read).sum())} images are not checked for changes, as there is "
                "too little disk space to decode them"
            )
        other = (read & (before["contents"] != now["contents"])).nonzero()[:, 0].tolist()
        if other:
            first = pixels.records[other[0]].uri
            _changed(run, f"{len(other)} images have changed (the first: {first})")


def _data_fingerprints(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return state["training"], state["validation"]


def _changed(run: Path, what: str) -> None:
    raise TrainingError(
        f"{run}: cannot be resumed, as its data has changed: {what}; "
        "restore the original data, or train into another --out"
    )


def _hash(value: object) -> int:
    digest = hashlib.blake2b(repr(value).encode("utf-8", "backslashreplace"), digest_size=8)
    return int.from_bytes(digest.digest(), "little", signed=True)
