"""Near-duplicates: rows that are nearly the same picture, told apart by one threshold.

Shapes: K rows in the order of their rank, E other rows, L first rows of a group, D dimensions.
"""

import numpy as np

from mmalign.arrays import Bools, Floats, Ints

# Cosine of two rows from which they are near-duplicates, for every model.
THRESHOLD = 0.96
# A search for groups looks at this many of the nearest rows at most.
MOST = 65_536
BLOCK = 1_024


def are_duplicates(vectors_KD: Floats, others_ED: Floats) -> Bools:
    """Return which pairs of unit vectors are of near-duplicates, (K, E)."""
    duplicates_KE: Bools = vectors_KD @ others_ED.T >= THRESHOLD
    return duplicates_KE


def groups(vectors_KD: Floats) -> Ints:
    """Return for each row the place of the first of its group, its own if it is the first.

    A row joins the group of the first row that it is a near-duplicate of. So the groups of the
    first rows do not depend on those that follow.

    Args:
        vectors_KD: Unit vectors, the best row first; zero for a row that is like no other.
    """
    first_K = np.full(len(vectors_KD), -1, np.int64)
    firsts = np.zeros(0, np.int64)
    for start in range(0, len(vectors_KD), BLOCK):
        block_BD = vectors_KD[start : start + BLOCK]
        first_B = first_K[start : start + BLOCK]
        if len(firsts):
            known_BL = are_duplicates(block_BD, vectors_KD[firsts])
            first_B[:] = np.where(known_BL.any(1), firsts[known_BL.argmax(1)], -1)
        own_BB = are_duplicates(block_BD, block_BD)
        for place in range(len(block_BD)):
            if first_B[place] < 0:
                first_B[place:][own_BB[place, place:] & (first_B[place:] < 0)] = start + place
                first_B[place] = start + place
        firsts = np.flatnonzero(first_K == np.arange(len(first_K)))
    return first_K
