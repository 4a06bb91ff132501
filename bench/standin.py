"""A stand-in for CLIP vectors: images, and texts that look for them from outside.

    python -m bench standin [--rows 1000000] [--queries 1000] [--sample 64] [--codes]

An index that is measured with queries like its rows looks better than it is: a text lies apart from
all images (the modality gap), and its nearest images are spread over many clusters. This draws
vectors of which the published statistics of laion-clip-512 hold (VIBE, arXiv 2505.17810; rows
1,000,448, k = 100): for queries by image and by text, the local dimension and the relative contrast
of cosine distances (VIBE takes `1 - cosine`, not the Euclidean distance), and how many of the true
neighbours an inverted file finds. VIBE counts what is found within 0.001 of the hundredth distance;
"exact" counts the hundred rows themselves, as the rest of this repository does.

How a vector comes about: `Recipe`. The command prints what is published beside what was drawn.

N rows, M queries, D dimensions, K neighbours.
"""

import argparse
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmalign import kernels
from mmalign.arrays import Floats, Halves, Ints

K = 100
BLOCK = 8192
WORLD, ROWS, HELD_OUT, WORDS, CHOICE = range(5)
PUBLISHED = {"image": (11.8, 2.35), "text": (66.3, 1.22)}
"""Medians of local dimension and relative contrast."""
PROBES = (16, 32, 64, 128)
PUBLISHED_RECALL = {"image": (0.899, 0.952, 0.982, 0.995), "text": (0.747, 0.840, 0.910, 0.959)}
"""Of faiss IVF4096,Flat."""
PUBLISHED_CODES = {(32, 8): 0.90, (64, 4): 0.95}
"""Of faiss IVF1024,PQ256x4fsr with refinement, by text: nprobe and k_factor."""


@dataclass(frozen=True)
class Recipe:
    """How images and texts are drawn. An image is the sum of

    - the direction of all images,
    - the centre of its cluster: clusters within clusters, of unequal sizes, three levels,
    - its own deviation, of a strength that differs from image to image.

    Centres and deviations have variances that fall off along the same axes, which lie at random. A
    text is the sum of the direction of all texts, what it says of its image (the rarer axes more
    than their share) and what it says that the image does not show.

    The numbers were fitted by Gauss-Newton steps on 200,000 of a million rows (20 neighbours there
    are 100 in the million), to the eight recalls of `PUBLISHED_RECALL`, the four medians of
    `PUBLISHED` and a mean cosine of about a third between a text and its image, and checked with
    all rows: see the command. `mean`, `branches` and `aligned` were set by hand.
    """

    mean: float = 0.5
    """Energy along the direction of all images."""
    branches: tuple[int, ...] = (16, 16, 16)
    centres: tuple[float, ...] = (0.0535, 0.06, 0.0775)
    """Energy of each level's centres."""
    centre_fall: float = 0.553
    """Variances fall off as (axis + 3) to this power."""
    evenness: float = 0.523
    """Of the sizes of clusters, as the parameter of a Dirichlet distribution."""
    own: float = 0.304
    """Energy of the deviations."""
    own_fall: float = 1.31
    own_spread: float = 0.227
    """Standard deviation of the logarithm of a deviation's strength."""
    aligned: float = 0.2
    """What a text has of the direction of all images."""
    told: float = 0.2
    """The share of an image that its text tells, along the first axis."""
    told_rise: float = 0.242
    """The share grows along the axes by this power."""
    untold: float = 0.469
    """Length of what a text says that its image does not show."""
    untold_fall: float = 0.563


class StandIn:
    """Rows and queries of one world; equal arguments give equal vectors."""

    def __init__(self, rows: int, dim: int = 512, seed: int = 0, recipe: Recipe | None = None):
        self.rows, self.dim, self.seed = rows, dim, seed
        self.recipe = recipe or Recipe()
        random = self._random(WORLD)
        self.axes = dim - 2
        self.basis = _basis(random, dim)
        self.centres, self.ends = self._clusters(random)

    def images(self, out: Halves | None = None) -> Halves:
        """All rows, (N, D) float16 of unit norm; written into `out` (a memory map, say)."""
        made = np.empty((self.rows, self.dim), dtype=np.float16) if out is None else out

        def fill(block: int) -> None:
            first = block * BLOCK
            count = min(BLOCK, self.rows - first)
            # Of a whole block always: a product of another height may differ in its last digits.
            made[first : first + count] = self._vectors(self._latents(ROWS, 0, block))[:count]

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(fill, range(-(-self.rows // BLOCK))))
        return made

    def held_out(self, count: int, seed: int = 0) -> Floats:
        """Queries by image: drawn like the rows, and not among them."""
        blocks = range(-(-count // BLOCK))
        parts = [self._vectors(self._latents(HELD_OUT, seed, block)) for block in blocks]
        return np.concatenate(parts)[:count]

    def texts(self, count: int, seed: int = 0) -> tuple[Floats, Ints]:
        """Queries by text, and the rows that they tell of: a run of rows, which lie at random."""
        first = int(self._random(CHOICE, seed).integers(0, max(1, self.rows - count + 1)))
        numbers = np.arange(first, min(first + count, self.rows), dtype=np.int64)
        return self.captions(numbers, seed + 1), numbers

    def captions(self, numbers: Sequence[int] | Ints, seed: int = 0) -> Floats:
        """A text for each of some rows; with another seed, another text.

        Costs as much as drawing every block of 8,192 rows that holds one of them.
        """
        asked = np.asarray(numbers, dtype=np.int64)
        made = np.empty((len(asked), self.dim), dtype=np.float32)
        for block in np.unique(asked // BLOCK):
            here = np.flatnonzero(asked // BLOCK == block)
            inside = asked[here] % BLOCK
            said = self._random(WORDS, seed, int(block)).standard_normal(
                (BLOCK, self.axes), dtype=np.float32
            )
            latents = self._latents(ROWS, 0, int(block))
            made[here] = self._texts(latents[inside], said[inside])
        return made

    def _random(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key])

    def _fall(self, power: float) -> Floats:
        return np.asarray((np.arange(3, self.axes + 3) / 3) ** power, dtype=np.float32)

    def _deviation(self, energy: float, fall: float) -> Floats:
        variances = self._fall(-fall)
        return np.asarray(np.sqrt(energy * variances / variances.sum()), dtype=np.float32)

    def _clusters(self, random: np.random.Generator) -> tuple[Floats, NDArray[np.float64]]:
        """Centres of the last level, and the cumulative sizes of their clusters."""
        recipe = self.recipe
        centres, sizes = np.zeros((1, self.axes), dtype=np.float32), np.ones(1)
        for branches, energy in zip(recipe.branches, recipe.centres, strict=True):
            parts = random.gamma(recipe.evenness, size=(len(sizes), branches))
            sizes = (sizes[:, None] * parts / parts.sum(1, keepdims=True)).reshape(-1)
            away = random.standard_normal((len(sizes), self.axes), dtype=np.float32)
            away *= self._deviation(energy, recipe.centre_fall)
            centres = np.repeat(centres, branches, axis=0) + away
        return centres, sizes.cumsum() / sizes.sum()

    def _latents(self, *key: int) -> Floats:
        """A block of images, without the direction that they share."""
        random, recipe = self._random(*key), self.recipe
        cluster = np.searchsorted(self.ends, random.random(BLOCK), side="right")
        strength = np.exp(recipe.own_spread * random.standard_normal((BLOCK, 1), dtype=np.float32))
        latents = random.standard_normal((BLOCK, self.axes), dtype=np.float32)
        latents *= self._deviation(recipe.own, recipe.own_fall)
        latents *= strength
        latents += self.centres[np.minimum(cluster, len(self.centres) - 1)]
        return latents

    def _vectors(self, latents: Floats) -> Floats:
        vectors = latents @ self.basis[2:]
        vectors += np.sqrt(np.float32(self.recipe.mean)) * self.basis[0]
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors

    def _texts(self, latents: Floats, said: Floats) -> Floats:
        recipe = self.recipe
        untold = self._fall(-recipe.untold_fall)
        untold *= recipe.untold / np.linalg.norm(untold)
        seen = recipe.told * self._fall(recipe.told_rise) * latents + untold * said
        # What is left of the length is the direction of all texts, which no image has.
        apart = 1 - recipe.aligned**2 - np.square(seen).sum(1, keepdims=True)
        texts = seen @ self.basis[2:] + np.float32(recipe.aligned) * self.basis[0]
        texts += np.sqrt(np.maximum(apart, 0)) * self.basis[1]
        texts /= np.linalg.norm(texts, axis=1, keepdims=True)
        return np.asarray(texts, dtype=np.float32)


def _basis(random: np.random.Generator, dim: int) -> Floats:
    """Orthonormal rows: the directions of all images and of all texts, then the axes.

    The first two have a few large numbers, as those of CLIP do.
    """
    start = random.standard_normal((dim, dim))
    start[:2] *= np.abs(start[:2])
    # The first rows span what they span before.
    return np.linalg.qr(start.T)[0].T.astype(np.float32).copy()


# --- the statistics -------------------------------------------------------------------------------


def neighbours(images: Halves, queries: Floats, k: int) -> tuple[Floats, Ints, Floats]:
    """Cosine distances and rows of the nearest, each (M, K), and mean distances to all rows."""
    scores, rows = kernels.topk(torch.from_numpy(queries), torch.from_numpy(images), k)
    centre = np.zeros(images.shape[1])
    for first in range(0, len(images), BLOCK):
        centre += images[first : first + BLOCK].sum(axis=0, dtype=np.float64)
    means = 1 - queries @ (centre / len(images))
    return 1 - scores.numpy(), rows.numpy(), means.astype(np.float32)


def local_dimension(distances_MK: Floats) -> Floats:
    """For every query, how fast rows become more with the distance: the estimate of Levina and
    Bickel over K distances, in order, as VIBE computes it.
    """
    near = np.where(distances_MK > 1e-5, distances_MK, np.nan)
    logs = np.log(near / near[:, -1:])
    return np.asarray(-np.sum(~np.isnan(logs), axis=1) / np.nansum(logs, axis=1), dtype=np.float32)


def relative_contrast(distances_MK: Floats, means_M: Floats) -> Floats:
    """For every query, how much farther all rows are in the mean than its K-th neighbour."""
    return means_M / distances_MK[:, -1]


def recalls(found_MK: Ints, scores_MK: Floats, distances_MK: Floats, rows_MK: Ints) -> list[float]:
    """The share found: within 0.001 of the K-th distance, as VIBE counts, and of the rows."""
    near = 1 - scores_MK <= distances_MK[:, -1:] + 1e-3
    exact = [np.isin(rows, found).mean() for rows, found in zip(rows_MK, found_MK, strict=True)]
    return [round(float(near.mean()), 3), round(float(np.mean(exact)), 3)]


def filled(images: Halves, factory: str, sample: int) -> Any:
    """A faiss index of inner products, trained on so many rows."""
    import faiss

    index = faiss.index_factory(images.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    # The rows lie at random.
    index.train(images[:sample].astype(np.float32))
    for first in range(0, len(images), 8 * BLOCK):
        index.add(images[first : first + 8 * BLOCK].astype(np.float32))
    return index


def main(words: list[str]) -> None:
    """Print what was drawn beside what is published."""
    parser = argparse.ArgumentParser(prog="python -m bench standin")
    parser.add_argument("--rows", type=int, default=1_000_000, help="published: 1,000,448")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--sample", type=int, default=64, help="rows that train each of 4096 lists")
    parser.add_argument("--codes", action="store_true", help="IVF1024,PQ256x4fsr, refined, as well")
    options = parser.parse_args(words)
    torch.set_num_threads(2)
    started = time.perf_counter()
    world = StandIn(options.rows)
    images = world.images()
    print(f"{options.rows} rows in {time.perf_counter() - started:.1f} s", flush=True)
    asked = {"image": world.held_out(options.queries), "text": world.texts(options.queries)[0]}
    truth: dict[str, tuple[Floats, Ints]] = {}
    for kind, queries in asked.items():
        distances, rows, means = neighbours(images, queries, K)
        truth[kind] = distances, rows
        dimension = np.median(local_dimension(distances))
        contrast = np.median(relative_contrast(distances, means))
        print(
            f"{kind:5}  local dimension {dimension:.1f} (published {PUBLISHED[kind][0]})"
            f"  relative contrast {contrast:.3f} ({PUBLISHED[kind][1]})",
            flush=True,
        )
    index = filled(images, "IVF4096,SQfp16", 4096 * options.sample)
    for (kind, queries), place in product(asked.items(), range(len(PROBES))):
        index.nprobe = PROBES[place]
        scores, found = index.search(queries, K)
        near, exact = recalls(found, scores, *truth[kind])
        published = PUBLISHED_RECALL[kind][place]
        print(f"{kind:5}  nprobe {PROBES[place]:3}  recall {near} ({published})  exact {exact}")
    if options.codes:
        del index
        _codes(images, asked, truth, options.sample)


def _codes(images: Halves, asked: dict[str, Floats], truth: dict[str, Any], sample: int) -> None:
    """Four bits for two numbers, and the best again in float16."""
    index = filled(images, "IVF1024,PQ256x4fsr,Refine(SQfp16)", 4 * 1024 * sample)
    import faiss

    lists = faiss.extract_index_ivf(faiss.downcast_index(index.base_index))
    for kind, (probes, factor) in product(asked, PUBLISHED_CODES):
        lists.nprobe, index.k_factor = probes, factor
        scores, found = index.search(asked[kind], K)
        near, exact = recalls(found, scores, *truth[kind])
        published = f" ({PUBLISHED_CODES[probes, factor]})" if kind == "text" else ""
        print(
            f"{kind:5}  nprobe {probes} k_factor {factor}  recall {near}{published}  exact {exact}"
        )
