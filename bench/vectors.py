"""Whether two stores hold the same vectors: of equal rows, by id and modality.

    python -m bench vectors before.store after.store

For a change of the code: embed the same sources with the same model before and after it.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from bench import measure
from mmalign.store import Store, open_store


def compared(before: Store, after: Store, modality: str) -> dict[str, Any]:
    """Compare the vectors of one modality of all rows."""
    equal = count = 0
    least = 1.0
    ids = before.column("id")
    pairs = zip(before.find(ids).tolist(), after.find(ids).tolist(), strict=True)
    for one, other in pairs:
        if other < 0:
            continue
        one_VD, other_VD = (s.vectors_of(modality, n) for s, n in ((before, one), (after, other)))
        if one_VD.shape != other_VD.shape:
            least = -1.0
            continue
        count += len(one_VD)
        equal += int((one_VD == other_VD).all(axis=1).sum())
        for a, b in zip(one_VD.astype(np.float64), other_VD.astype(np.float64), strict=True):
            least = min(least, float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))
    return {"vectors": count, "equal_bits": equal, "lowest_cosine": least}


def main(words: list[str]) -> None:
    """Compare two stores and write a row."""
    parser = argparse.ArgumentParser(prog="python -m bench vectors")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options = parser.parse_args(words)
    before, after = open_store(options.before), open_store(options.after)
    same = set(before.column("id")) == set(after.column("id"))
    row: dict[str, Any] = {
        "rows": len(before),
        "same_ids": same,
        "model": before.manifest.model.identity,
    }
    for modality in before.modalities:
        row |= {f"{modality}_{k}": v for k, v in compared(before, after, modality).items()}
    measure.append("vectors", row)
