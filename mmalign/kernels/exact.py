"""Exact top-k in two steps: a screen bounds every score, and the candidates are scored exactly.

Shapes: M queries, N stored vectors, D dimensions, K neighbours, B vectors of a block, X groups of
neighbouring vectors, G vectors of a group, P (query, vector) pairs, H groups that hold candidates.

A screen is a fast low-precision product with a proven error bound. A vector whose upper bound lies
below the k-th best score so far cannot be among the k best, so it is dropped without exact scoring;
the remaining candidates, usually not many more than k, are scored in float64. The result equals
that of `reference.topk`, digit for digit, ties included, whichever screen was used.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mmalign.errors import VectorError
from mmalign.kernels import checks, codes, reference, screens
from mmalign.kernels.codes import GROUP
from mmalign.kernels.processor import has_amx, has_bfloat16, has_int8, sums_float16_in_float32
from mmalign.kernels.rescore import best_pairs, by_query, exact_scores
from mmalign.kernels.screens import Block, Corpus
from mmalign.kernels.timings import Timings, measure_screens

TopkImpl = Literal["auto", "reference", "single", "half", "bfloat16", "int8", "triton"]
_SCREENS: dict[str, screens.Screen] = {
    "single": screens.single,
    "half": screens.half,
    "bfloat16": screens.bfloat16,
    "int8": screens.int8,
}
_IMPLS = ("auto", "reference", "triton", *_SCREENS)
# Pairs are pruned when they are more than PENDING and more than WAITING * k per query. If more
# than CROWDED * k per query remain, the bounds are wide, and the best are scored exactly.
PENDING, WAITING, CROWDED = 1 << 17, 8, 5
# Pairs are also pruned whenever GROWTH times more rows have been seen. SPARE pairs beyond k are
# scored exactly first.
GROWTH, SPARE = 4, 6
QUERIES_AT_ONCE = 1024
# Up to HALF_QUERIES queries, reading float16 once per query beats widening it to float32, except on
# processors with tile multiplication. On processors with bfloat16, bfloat16 beats float32 from
# BFLOAT16_QUERIES on, or from AMX_QUERIES on with AMX.
HALF_QUERIES, BFLOAT16_QUERIES, AMX_QUERIES = 8, 128, 48
FEW_ALLOWED = 0.1
# For so few rows and scores, float64 for all is faster than the bookkeeping of a screen.
FEW_ROWS, FEW_SCORES = 2048, 1 << 14
WIDE_ROWS = 64
# With fewer elements a search takes some milliseconds: measuring the screens is not worth it.
MEASURED_NUMBERS = 1 << 26

_log = logging.getLogger("mmalign.kernels")


@torch.no_grad()
def topk(
    queries_MD: Tensor,
    vectors_ND: Tensor | Sequence[Tensor] | Corpus,
    k: int,
    *,
    allow: Tensor | None = None,
    impl: TopkImpl = "auto",
) -> tuple[Tensor, Tensor]:
    """Find the k rows with the largest inner product for every query, exactly.

    A score is the float32 nearest to the inner product in float64: it depends only on its two
    vectors, not on the implementation, batch or device.

    Args:
        queries_MD: Queries of unit norm, shape (M, D), any floating type; read as float32.
        vectors_ND: Vectors of unit norm, shape (N, D); or a sequence of such matrices (shards)
            with rows numbered consecutively across them, which may lie on disk (memory maps) or on
            several GPUs; or the result of `prepare`. The (M, N) scores are never materialized.
        k: Neighbours per query, between 1 and N.
        allow: Boolean (N,); rows that are False are excluded. With fewer than k allowed rows, the
            remaining places have a score of -inf and row -1.
        impl: "reference" compares in float64; the others screen first: "single" in float32 on any
            device; on a CPU "half" in float16, "bfloat16" in bfloat16 and "int8" with the codes of
            a prepared corpus; "triton" on a GPU. "auto" uses `choose_topk`.

    Returns:
        scores (M, K) float32, best first, and rows (M, K) int64. Equal scores come in row order.

    Raises:
        VectorError: A shape, type or value (NaN, a zero query) is wrong, or k does not fit.
    """
    checks.check_impl(impl, _IMPLS)
    corpus = vectors_ND if isinstance(vectors_ND, Corpus) else screens.as_corpus(vectors_ND)
    checks.check_queries(queries_MD, corpus.dim)
    checks.check_choice(k, allow, corpus.rows)
    queries_MD = queries_MD.detach().float()
    chosen = choose_topk(queries_MD, corpus, allow) if impl == "auto" else impl
    _log.debug("topk of %d queries in %d rows: %s", len(queries_MD), corpus.rows, chosen)
    if chosen == "reference":
        return reference.topk(queries_MD, corpus.shards, k, allow=allow)
    if chosen == "triton":
        kernels = checks.triton_module("triton_topk")
        checks.check_triton(kernels, kernels and kernels.unsupported_reason(queries_MD, corpus))
        return kernels.topk(queries_MD, corpus, k, allow=allow)  # type: ignore[no-any-return]
    screen = _get_screen(chosen, queries_MD, corpus)
    parts = []
    for part_MD in queries_MD.split(QUERIES_AT_ONCE):
        found = _TopCandidates(part_MD, corpus, k)
        for block in screens.merge_small_blocks(screen(part_MD, corpus, allow), len(part_MD)):
            found.add(block)
        parts.append(found.result())
    scores, rows = zip(*parts, strict=True)
    return torch.cat(scores), torch.cat(rows)


def choose_topk(queries_MD: Tensor, corpus: Corpus, allow: Tensor | None = None) -> TopkImpl:
    """Return the implementation that `impl="auto"` selects for these inputs."""
    if queries_MD.is_cuda:
        kernels = checks.triton_module("triton_topk")
        return (
            "triton" if kernels and not kernels.unsupported_reason(queries_MD, corpus) else "single"
        )
    if corpus.rows <= FEW_ROWS and len(queries_MD) * corpus.rows <= FEW_SCORES:
        return "reference"
    few_allowed = allow is not None and int(allow.count_nonzero()) < FEW_ALLOWED * corpus.rows
    default = _default_impl(queries_MD, corpus, few_allowed)
    if corpus.timings is None or few_allowed:
        return default
    return corpus.timings.fastest(default, _supported_screens(corpus), len(queries_MD))


def _default_impl(queries_MD: Tensor, corpus: Corpus, few_allowed: bool) -> TopkImpl:
    """Return the default choice, used if nothing was measured."""
    if corpus.codes is not None and not few_allowed:
        return "int8"
    if len(queries_MD) <= HALF_QUERIES and not has_amx() and not _why_not_half(corpus):
        return "half"
    min_queries = AMX_QUERIES if has_amx() else BFLOAT16_QUERIES
    return "bfloat16" if len(queries_MD) >= min_queries and has_bfloat16() else "single"


def _supported_screens(corpus: Corpus) -> list[TopkImpl]:
    """Return the CPU screens that a corpus supports."""
    names: list[tuple[TopkImpl, bool]] = [
        ("single", True),
        ("half", not _why_not_half(corpus)),
        ("bfloat16", has_bfloat16()),
        ("int8", corpus.codes is not None),
    ]
    return [name for name, possible in names if possible]


@torch.no_grad()
def prepare(vectors_ND: Tensor | Sequence[Tensor], *, with_codes: bool = False) -> Corpus:
    """Prepare vectors for repeated searches: check each, bound their norms, quantize on request.

    Args:
        vectors_ND: As in `topk`. The matrices are kept, not copied.
        with_codes: Whether to keep one extra byte per element in memory for "int8": on a CPU,
            several queries at a time are then faster.

    On a CPU, the first large corpus of a dtype and width also triggers timing of the screens, once
    per kind of processor: see `timings`.

    Raises:
        VectorError: A shape or type is wrong, or a vector is NaN, infinite or zero.
    """
    corpus = _with_max_norm(screens.as_corpus(vectors_ND))
    if corpus.rows * corpus.dim >= MEASURED_NUMBERS and not _on_gpu(corpus):
        corpus = replace(corpus, timings=_timings(corpus))
    return add_codes(corpus) if with_codes else corpus


def _with_max_norm(corpus: Corpus) -> Corpus:
    """Check each vector and bound all norms."""
    max_norm = 0.0
    for first, shard in corpus.with_first_rows():
        for start in range(0, len(shard), reference.BLOCK_ROWS):
            block = shard[start : start + reference.BLOCK_ROWS].float()
            checks.check_vectors("vectors_ND", block, first + start)
            max_norm = max(max_norm, float(torch.linalg.vector_norm(block, dim=1).max()))
    # The norm itself is a rounded sum.
    return replace(
        corpus, max_norm=max_norm * (1 + codes.sum_error(corpus.dim, screens.FLOAT32_ROUNDOFF))
    )


@torch.no_grad()
def add_codes(corpus: Corpus, tick: Callable[[], None] = lambda: None) -> Corpus:
    """Add codes to a prepared corpus; `tick` is called repeatedly and may raise to abort.

    Raises:
        VectorError: This torch has no int8 matrix products.
    """
    if not has_int8():
        raise VectorError("with_codes needs a torch that is built with oneDNN")
    return replace(corpus, codes=[codes.quantize(shard.cpu(), tick) for shard in corpus.shards])


def codes_are_faster(corpus: Corpus, queries: int) -> bool:
    """Return whether codes are likely to be faster for this many queries at a time."""
    if not has_int8():
        return False
    if corpus.timings is None or not corpus.timings.ms:
        return True
    without = corpus.timings.fastest(
        "single", _supported_screens(replace(corpus, codes=None)), queries
    )
    return corpus.timings.fastest(without, [without, "int8"], queries) == "int8"


def _timings(corpus: Corpus) -> Timings:
    names: list[str] = [*_supported_screens(corpus)]
    if has_int8():
        names.append("int8")

    def prepare_search(shards: list[Tensor]) -> Callable[[Tensor, str], object]:
        sample = _with_max_norm(Corpus(shards))
        if has_int8():  # all shards are equal, but each has its own memory
            first_codes = codes.quantize(shards[0])
            sample = replace(
                sample,
                codes=[replace(first_codes, codes_BD=first_codes.codes_BD.clone()) for _ in shards],
            )

        def search(queries_MD: Tensor, screen: str) -> object:
            return topk(queries_MD, sample, 10, impl=screen)  # type: ignore[arg-type]

        return search

    return measure_screens(corpus.shards[0].dtype, corpus.dim, names, prepare_search)


def _on_gpu(corpus: Corpus) -> bool:
    return any(shard.is_cuda for shard in corpus.shards)


def _get_screen(chosen: str, queries_MD: Tensor, corpus: Corpus) -> screens.Screen:
    problem = None
    if chosen == "half":
        problem = _why_not_half(corpus)
    elif chosen == "int8" and corpus.codes is None:
        problem = "vectors_ND has no codes: pass kernels.prepare(vectors_ND, with_codes=True)"
    if chosen != "single" and queries_MD.is_cuda:
        problem = f"queries_MD is on {queries_MD.device}, not on a CPU"
    if problem:
        raise VectorError(f"impl={chosen!r} does not work here: {problem}")
    return _SCREENS[chosen]


def _why_not_half(corpus: Corpus) -> str | None:
    if corpus.dtypes != {torch.float16}:
        return f"vectors_ND is {', '.join(sorted(map(str, corpus.dtypes)))}, not float16"
    if _on_gpu(corpus):
        return "vectors_ND is not on a CPU"
    if not sums_float16_in_float32():
        return "torch sums float16 products in float16, or does not say whether it does"
    return None


class _TopCandidates:
    """Candidates for the k best of some queries."""

    def __init__(self, queries_MD: Tensor, corpus: Corpus, k: int) -> None:
        self.queries_MD, self.corpus, self.k = queries_MD.double(), corpus, k
        shape, device = (len(queries_MD), k), queries_MD.device
        self.scores_MK = torch.full(shape, -torch.inf, device=device)
        self.rows_MK = torch.full(shape, -1, dtype=torch.int64, device=device)
        # A lower bound on the k-th best score so far.
        self.threshold_M = torch.full(shape[:1], -torch.inf, device=device)
        self.pending: list[_Pairs] = []
        self.count = self.seen = self.pruned = 0
        self.capacity = max(PENDING, WAITING * len(queries_MD) * k)

    def add(self, block: Block) -> None:
        """Keep the rows of a block whose upper bounds reach the threshold."""
        groups_XGM = _grouped(block.scores_BM)
        best_XM = _max_of_groups(groups_XGM).float()
        if best_XM[:, 0].isnan().any():
            first, last = int(block.rows_B[0]), int(block.rows_B[-1])
            raise VectorError(f"vectors_ND holds NaN in rows {first} to {last}")
        best_XM = torch.addcmul(block.offset_XM, block.unit_XM, best_XM)
        if not self.pruned and self.k <= len(best_XM):
            low_M = (best_XM - block.error_XM).topk(self.k, dim=0).values[-1]
            self.threshold_M = torch.maximum(self.threshold_M, low_M)
        candidate_XM = (best_XM + block.error_XM >= self.threshold_M) & (best_XM > -torch.inf)
        self.seen += len(block.rows_B)
        group_H, query_H = found = candidate_XM.nonzero(as_tuple=True)
        if not len(group_H):
            return
        unit_H, offset_H, error_H = (
            block.unit_XM[found],
            block.offset_XM[found],
            block.error_XM[found],
        )
        scores_HG = groups_XGM[group_H, :, query_H]
        upper_HG = unit_H[:, None] * scores_HG + (offset_H + error_H)[:, None]
        kept_HG = (upper_HG >= self.threshold_M[query_H, None]) & (scores_HG > -torch.inf)
        hot_P, row_in_group_P = kept_HG.nonzero(as_tuple=True)
        rows_P = block.rows_B[group_H[hot_P] * GROUP + row_in_group_P]
        upper_P = upper_HG[kept_HG]
        self.pending.append(_Pairs(query_H[hot_P], rows_P, upper_P, upper_P - 2 * error_H[hot_P]))
        self.count += len(rows_P)
        if self.count > self.capacity or self.seen >= GROWTH * self.pruned:
            self._prune()
            if self.count > CROWDED * len(self.threshold_M) * self.k:  # the bounds are wide
                self._score_best()
            if self.count > self.capacity:  # many vectors are nearly identical
                self._score(self._still_pending())

    def _still_pending(self) -> "_Pairs":
        """Return all pending pairs that still reach the threshold."""
        pairs = _Pairs(*(torch.cat(parts) for parts in zip(*self.pending, strict=True)))
        return pairs.select(pairs.upper_P >= self.threshold_M[pairs.query_P])

    def _prune(self) -> None:
        """Raise the threshold to the k-th best lower bound, and drop pairs below it."""
        self.pruned = self.seen
        pairs = self._still_pending()
        order, rank_P = pairs.rank_by_query(pairs.lower_P)
        last_P = order[rank_P == self.k - 1]
        query_P = pairs.query_P[last_P]
        self.threshold_M[query_P] = torch.maximum(self.threshold_M[query_P], pairs.lower_P[last_P])
        self._keep(pairs)

    def _keep(self, pairs: "_Pairs") -> None:
        """Set the pending pairs to those that reach the threshold."""
        self.pending = [pairs.select(pairs.upper_P >= self.threshold_M[pairs.query_P])]
        self.count = len(self.pending[0].rows_P)

    def _score(self, pairs: "_Pairs") -> None:
        """Score pairs exactly, and raise the threshold."""
        self.pending, self.count = [], 0
        scores_P = exact_scores(self.queries_MD, self.corpus, pairs.query_P, pairs.rows_P)
        old_P = torch.arange(len(self.rows_MK), device=scores_P.device).repeat_interleave(self.k)
        self.scores_MK, self.rows_MK = best_pairs(
            torch.cat([old_P, pairs.query_P]),
            torch.cat([self.rows_MK.flatten(), pairs.rows_P]),
            torch.cat([self.scores_MK.flatten(), scores_P]),
            (len(self.rows_MK), self.k),
        )
        # One float32 step below the k-th score, so that ties still pass.
        floor_M = torch.nextafter(self.scores_MK[:, -1], self.threshold_M.new_tensor(-torch.inf))
        self.threshold_M = torch.maximum(self.threshold_M, floor_M)

    def _score_best(self) -> None:
        """Score the best candidates of each query exactly.

        One exact score prunes more than many bounds, so most pending pairs are never scored.
        """
        pairs = self._still_pending()
        order, rank_P = pairs.rank_by_query(pairs.upper_P)
        first_P = rank_P < self.k + SPARE
        self._score(pairs.select(order[first_P]))
        self._keep(pairs.select(order[~first_P]))

    def result(self) -> tuple[Tensor, Tensor]:
        """Return the k best with exact scores."""
        if self.pending:
            self._score_best()
            self._score(self._still_pending())
        return self.scores_MK, self.rows_MK


class _Pairs(NamedTuple):
    """Candidate (query, row) pairs with bounds on their scores."""

    query_P: Tensor
    rows_P: Tensor
    upper_P: Tensor
    lower_P: Tensor

    def select(self, kept_P: Tensor) -> "_Pairs":
        return _Pairs(*(part[kept_P] for part in self))

    def rank_by_query(self, values_P: Tensor) -> tuple[Tensor, Tensor]:
        """Sort by query, largest values first; return the order and the rank within each query."""
        order = by_query(self.query_P, values_P)
        query_P = self.query_P[order]
        positions = torch.arange(len(order), device=order.device)
        return order, positions - torch.searchsorted(query_P, query_P)


def _grouped(scores_BM: Tensor) -> Tensor:
    """Split score columns into groups of neighbours, (X, G, M); -inf pads the last one."""
    short = -len(scores_BM) % GROUP
    if short:
        scores_BM = torch.nn.functional.pad(scores_BM, (0, 0, 0, short), value=-torch.inf)
    return scores_BM.view(-1, GROUP, scores_BM.shape[1])


def _max_of_groups(groups_XGM: Tensor) -> Tensor:
    """Take the maximum of each group; torch's own reduction is slow where rows are short."""
    if groups_XGM.shape[2] >= WIDE_ROWS:
        return groups_XGM.amax(dim=1)
    while groups_XGM.shape[1] > 1:
        one, other = groups_XGM.chunk(2, dim=1)
        groups_XGM = torch.maximum(one, other)
    return groups_XGM[:, 0]
