"""Find validation samples that are also in the training data.

Shapes: N training samples, V validation samples.
"""

import numpy as np
from numpy.typing import NDArray

from mmalign.arrays import Ints
from mmalign.data import Pixels, Record

# Largest difference of two images that look the same: hash bits, and levels (of 255) of the blurs.
NEAR_BITS, NEAR_LEVELS = 4, 12.0
BLUR = 16
# Maximum number of pairs compared visually; beyond it, only part of the validation set is checked.
MOST_PAIRS = 1 << 30
AT_ONCE = 1 << 22
# Simple images have similar hashes; the blurs of at most this many candidates are compared.
MOST_LOOKED_AT = 64


def shared_samples(training: Pixels, validation: Pixels) -> dict[str, list[tuple[Record, Record]]]:
    """Find validation samples that are also in the training data, by the first check that matches.

    Returns:
        Pairs of a validation and a training record, keyed by the check: "the same sample" (same
        location or id), "the same file" (equal contents), "the same picture" (re-encoded or
        resized).
    """
    training_rows = {key: i for i, r in enumerate(training.records) for key in _location_and_id(r)}
    files: dict[int, int] = {}
    for i, content in enumerate(training.content_hashes_N.tolist()):
        files.setdefault(content, i)
    files.pop(0, None)  # not read
    leaks: dict[str, list[tuple[Record, Record]]] = {}
    unmatched: list[int] = []
    for v, (record, content) in enumerate(
        zip(validation.records, validation.content_hashes_N.tolist(), strict=True)
    ):
        training_row = next(
            (training_rows[key] for key in _location_and_id(record) if key in training_rows), None
        )
        if training_row is not None:
            leaks.setdefault("the same sample", []).append((record, training.records[training_row]))
        elif content in files:
            leaks.setdefault("the same file", []).append((record, training.records[files[content]]))
        else:
            unmatched.append(v)
    for v, t in _find_look_alikes(training, validation, np.array(unmatched, np.int64)):
        pair = (validation.records[v], training.records[t])
        leaks.setdefault("the same picture", []).append(pair)
    return leaks


def describe_leakage(training: Pixels, validation: Pixels) -> str | None:
    """Describe in one line what validation shares with training; None if nothing."""
    leaks = shared_samples(training, validation)
    if not leaks:
        return None
    count, total = sum(map(len, leaks.values())), len(validation.records)
    ways = ", ".join(f"{len(pairs)} {way}" for way, pairs in leaks.items())
    one, other = next(iter(leaks.values()))[0]
    which = f"all {total}" if count == total else f"{count} of {total}"
    return (
        f"warning: {which} validation samples are also in the training data ({ways}; the first: "
        f"{one.uri} is {other.uri}): recall on them measures memorization"
    )


def _location_and_id(record: Record) -> list[str]:
    """Return the names of a sample: its location, and its id if that is not just a file name."""
    return [f"uri {record.uri}", *([f"id {record.id}"] if record.id_from_source else [])]


def _find_look_alikes(
    training: Pixels, validation: Pixels, unmatched_V: Ints
) -> list[tuple[int, int]]:
    """Find pairs of validation and training rows whose images look the same."""
    if training.cache_NSS3 is None or validation.cache_NSS3 is None or not len(unmatched_V):
        return []
    max_checked = max(1, MOST_PAIRS // len(training.records))
    checked = unmatched_V[:: -(-len(unmatched_V) // max_checked)]
    step = max(1, AT_ONCE // len(checked))
    hashes_A = validation.perceptual_hashes_N[checked].view(np.uint64)
    candidates: dict[int, list[int]] = {}
    for start in range(0, len(training.records), step):
        hashes_T = training.perceptual_hashes_N[start : start + step].view(np.uint64)
        near_AT = np.bitwise_count(hashes_A[:, None] ^ hashes_T[None]) <= NEAR_BITS
        for a, t in zip(*np.nonzero(near_AT), strict=True):
            candidates.setdefault(int(checked[a]), []).append(start + int(t))
    pairs = []
    for v, rows in candidates.items():
        blur = _blur(validation.cache_NSS3[v])
        for t in rows[:MOST_LOOKED_AT]:
            if np.abs(blur - _blur(training.cache_NSS3[t])).max() <= NEAR_LEVELS:
                pairs.append((v, t))
                break
    return pairs


def _blur(pixels_SS3: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Compute the means over a 16 x 16 grid, which resizing or JPEG re-encoding hardly changes."""
    edges = np.linspace(0, len(pixels_SS3), BLUR + 1).astype(np.int64)
    sums = np.add.reduceat(pixels_SS3.astype(np.float32), edges[:-1], axis=0)
    sums = np.add.reduceat(sums, edges[:-1], axis=1)
    sizes = np.diff(edges).astype(np.float32)
    means: NDArray[np.float32] = sums / (sizes[:, None, None] * sizes[None, :, None])
    return means
