"""Near-duplicates: rows that are nearly the same picture, told apart by one threshold.

Two rows are near-duplicates if their cosine is at least `LEAST` and their distance, 1 - cosine, at
most `SHARE` of the usual distance of two rows. So the threshold follows the model: one that places
all images close to each other needs a higher one. From vectors alone such a model cannot be told
from a store of which most rows are near-duplicates; there, fewer of them are found.

Shapes: R random rows, K rows in the order of their rank, E other rows, D dimensions.
"""

import numpy as np

from mmalign.arrays import Bools, Floats, Ints

LEAST, SHARE = 0.96, 0.08
# Above this, equal rows could be missed by rounding.
HIGHEST = 0.9999
# Random rows whose distances are the usual ones.
SAMPLE = 512
# A search for groups looks at this many of the nearest rows at most.
MOST = 65_536
BLOCK = 1_024


def threshold(vectors_RD: Floats) -> float:
    """Return the cosine from which rows are near-duplicates, from unit vectors of random rows."""
    places = np.triu_indices(min(len(vectors_RD), SAMPLE), 1)
    if not len(places[0]):
        return LEAST
    usual = float(np.median((vectors_RD[:SAMPLE] @ vectors_RD[:SAMPLE].T)[places]))
    return min(max(LEAST, 1 - SHARE * (1 - usual)), HIGHEST)


def are_duplicates(vectors_KD: Floats, others_ED: Floats, least: float) -> Bools:
    """Return which pairs of unit vectors are of near-duplicates, (K, E); see `threshold`."""
    duplicates_KE: Bools = vectors_KD @ others_ED.T >= least
    return duplicates_KE


def groups(vectors_KD: Floats, least: float) -> Ints:
    """Return for each row the place of the first of its group, its own if it is the first.

    A row joins the group of the first row that it is a near-duplicate of. So the groups of the
    first rows do not depend on those that follow.

    Args:
        vectors_KD: Unit vectors, the best row first; zero for a row that is like no other.
        least: See `threshold`.
    """
    first_K = np.full(len(vectors_KD), -1, np.int64)
    firsts = np.zeros(0, np.int64)
    for start in range(0, len(vectors_KD), BLOCK):
        block_BD = vectors_KD[start : start + BLOCK]
        first_B = first_K[start : start + BLOCK]
        if len(firsts):
            known_BE = are_duplicates(block_BD, vectors_KD[firsts], least)
            first_B[:] = np.where(known_BE.any(1), firsts[known_BE.argmax(1)], -1)
        own_BB = are_duplicates(block_BD, block_BD, least)
        for place in range(len(block_BD)):
            if first_B[place] < 0:
                first_B[place:][own_BB[place, place:] & (first_B[place:] < 0)] = start + place
                first_B[place] = start + place
        firsts = np.flatnonzero(first_K == np.arange(len(first_K)))
    return first_K
