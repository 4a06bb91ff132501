"""Rows by what their captions say. Uses Arrow.

A caption holds a phrase if it does so in upper or lower case, of any width: both are brought to
Unicode's form NFKC first.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmalign.arrays import Bools
from mmalign.items import utf8_text
from mmalign.store.reader import Store


def with_phrases(store: Store, phrases: Sequence[str]) -> Bools:
    """Return which rows (N,), deleted ones too, have each of the phrases in a caption.

    A phrase may be a part of a word. Two phrases may be in different captions of a row.

    Raises:
        UsageError: A phrase is not UTF-8.
    """
    wanted = _comparable(pa.array([utf8_text(phrase) for phrase in phrases], pa.string()))
    found = [np.zeros(0, np.bool_)]
    for batch in store.batches(("captions",)):
        lists = batch.column(0)
        captions, rows = _comparable(lists.flatten()), pc.list_parent_indices(lists).to_numpy()
        has_all_N = np.ones(len(lists), np.bool_)
        for phrase in wanted.to_pylist():
            matches = pc.match_substring(captions, phrase).to_numpy(zero_copy_only=False)
            has_N = np.zeros(len(lists), np.bool_)
            has_N[rows[matches]] = True
            has_all_N &= has_N
        found.append(has_all_N)
    return np.concatenate(found)


def _comparable(texts: pa.Array) -> pa.Array:
    return pc.utf8_lower(pc.utf8_normalize(texts, form="NFKC"))
