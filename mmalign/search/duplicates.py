"""Near-duplicates: rows that are nearly the same picture, told apart by one threshold.

Two rows are near-duplicates if their distance, 1 - cosine, is at most `SHARE` of the usual distance
of each: that to its `NEAR`th nearest of `SAMPLE` random rows. So the threshold follows the model,
whether it places all images close to each other or not, and what a store holds: where many
pictures are alike, as jeans photographed one after the other, it is lower than among photos of
anything. Where near-duplicates of a row are more than `NEAR` of `SAMPLE` rows, its usual distance
is one of theirs, and too small. At least `LEAST` of the median distance of two rows is taken, so
that they are found if they are the same but for their encoding.

From vectors alone a model that cannot tell images apart is not told from a store of which most rows
are near-duplicates; there, fewer of them are found.

Shapes: S random rows, K rows in the order of their rank, E other rows, D dimensions.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mmalign.arrays import Bools, Floats, Ints

SHARE = 0.3
NEAR, SAMPLE = 10, 512
LEAST = 0.05
# At a shorter distance, equal rows could be missed by rounding.
SHORTEST = 1e-4
# A search for groups looks at this many of the nearest rows at most.
MOST = 65_536
BLOCK = 1_024


@dataclass(frozen=True)
class Usual:
    """What distances are usual among the rows that are searched."""

    sample_SD: Floats
    """Unit vectors of random rows; the first `SAMPLE` count."""

    @cached_property
    def median(self) -> float:
        """The median distance of two rows; 0 if there is one row at most."""
        sample_SD = self.sample_SD[:SAMPLE]
        places = np.triu_indices(len(sample_SD), 1)
        return float(np.median((1 - sample_SD @ sample_SD.T)[places])) if len(places[0]) else 0.0

    def reach(self, vectors_KD: Floats) -> Floats:
        """Return up to which distance another row can be a near-duplicate of each of some, (K,).

        Args:
            vectors_KD: Their unit vectors; zero for a row that is like no other.
        """
        sample_SD = self.sample_SD[:SAMPLE]
        # In a small store, half of all rows are no near-duplicates of one.
        place = min(NEAR, len(sample_SD) // 2)
        usual_K = np.full(len(vectors_KD), LEAST * self.median, np.float32)
        for start in range(0, len(vectors_KD) if place else 0, BLOCK):
            distances_BS = 1 - vectors_KD[start : start + BLOCK] @ sample_SD.T
            near_B = np.partition(distances_BS, place, axis=1)[:, place]
            np.maximum(usual_K[start : start + BLOCK], near_B, out=usual_K[start : start + BLOCK])
        reach_K: Floats = np.maximum(SHARE * usual_K, SHORTEST)
        return reach_K


def are_duplicates(
    vectors_KD: Floats, others_ED: Floats, reach_K: Floats, reach_E: Floats
) -> Bools:
    """Return which pairs of unit vectors are of near-duplicates, (K, E); see `Usual.reach`."""
    nearest_KE = np.minimum(reach_K[:, None], reach_E)
    duplicates_KE: Bools = 1 - vectors_KD @ others_ED.T <= nearest_KE
    return duplicates_KE


def groups(vectors_KD: Floats, reach_K: Floats) -> Ints:
    """Return for each row the place of the first of its group, its own if it is the first.

    A row joins the group of the first row that it is a near-duplicate of. So the groups of the
    first rows do not depend on those that follow.

    Args:
        vectors_KD: Unit vectors, the best row first; zero for a row that is like no other.
        reach_K: See `Usual.reach`.
    """
    first_K = np.full(len(vectors_KD), -1, np.int64)
    firsts = np.zeros(0, np.int64)
    for start in range(0, len(vectors_KD), BLOCK):
        block = slice(start, start + BLOCK)
        block_BD, reach_B, first_B = vectors_KD[block], reach_K[block], first_K[block]
        if len(firsts):
            known_BE = are_duplicates(block_BD, vectors_KD[firsts], reach_B, reach_K[firsts])
            first_B[:] = np.where(known_BE.any(1), firsts[known_BE.argmax(1)], -1)
        own_BB = are_duplicates(block_BD, block_BD, reach_B, reach_B)
        for place in range(len(block_BD)):
            if first_B[place] < 0:
                first_B[place:][own_BB[place, place:] & (first_B[place:] < 0)] = start + place
                first_B[place] = start + place
        firsts = np.flatnonzero(first_K == np.arange(len(first_K)))
    return first_K
