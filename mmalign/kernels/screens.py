"""Fast scores with a bounded error, which decide which vectors need an exact score.

M queries, N stored vectors, D dimensions, B vectors of a block, X groups of neighbouring vectors.

Every bound follows from the Cauchy-Schwarz inequality. With q' and v' in place of q and v,
|q v - q' v'| <= |q| |v - v'| + |q - q'| |v'|, and summing D products in a type with unit roundoff u
in any order adds at most D u / (1 - D u) |q'| |v'|.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mmalign.kernels import checks
from mmalign.kernels.codes import GROUP, Codes, code_queries, sum_error
from mmalign.kernels.timings import Timings

# Blocks of vectors and of scores that fit into the cache of a CPU, or fill a GPU.
CPU_BYTES, GPU_BYTES = 8 << 20, 256 << 20
CACHED_BYTES = 1 << 20
# Blocks that are converted to float32 first: so small that the result is still in the cache of a
# core when it is read. With 8 MiB, bfloat16 took two to four times as long.
WIDENED_BYTES = 2 << 20
MIN_ROWS, MAX_ROWS = 256, 1 << 18
# If a smaller share of the rows is allowed, they are gathered instead of masked.
GATHERED = 0.25
BRIEF, HALF, SINGLE = 2.0**-8, 2.0**-11, 2.0**-24
HALF_RANGE = 60_000.0
ROUNDOFF = {"highest": SINGLE, "high": HALF, "medium": BRIEF}


@dataclass(frozen=True)
class Corpus:
    """Stored vectors in shards, and what is known about them; created by `prepare`."""

    shards: list[Tensor]
    longest: float | None = None
    """A bound on all norms."""
    codes: list[Codes] | None = None
    """One byte per element, by shard."""
    timings: Timings | None = None
    """Time of each screen on this processor, if measured."""

    @property
    def rows(self) -> int:
        """Number of vectors."""
        return sum(len(shard) for shard in self.shards)

    @property
    def width(self) -> int:
        """Number of dimensions."""
        return self.shards[0].shape[1]

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Types of the shards."""
        return {shard.dtype for shard in self.shards}

    @cached_property
    def lost(self) -> float:
        """A bound on the norms of the vectors' bfloat16 rounding errors; reads all of them once."""
        pieces = (p for shard in self.shards for p in shard.split(_widened_rows(self.width)))
        lost = max(_lost_in_bfloat16(piece.float()) for piece in pieces)
        return lost * (1 + sum_error(self.width, SINGLE))

    def numbered(self) -> Iterator[tuple[int, Tensor]]:
        """Yield each shard with the number of its first row."""
        first = 0
        for shard in self.shards:
            yield first, shard
            first += len(shard)


@dataclass(frozen=True)
class Block:
    """Scores of some rows: `unit * score + offset` is within `error` of the true score.

    Rows that are not allowed score -inf. `error`, `unit` and `offset` are per group and query.
    """

    rows_B: Tensor
    scores_BM: Tensor
    error_XM: Tensor
    unit_XM: Tensor
    offset_XM: Tensor


def _block(
    rows_B: Tensor,
    scores_BM: Tensor,
    error: Tensor,
    unit: Tensor | float = 1.0,
    offset: Tensor | float = 0.0,
) -> Block:
    """Expand values shared by many groups or queries."""
    shape = (-(-len(scores_BM) // GROUP), scores_BM.shape[1])
    spread = [
        torch.as_tensor(x, device=scores_BM.device).expand(shape) for x in (error, unit, offset)
    ]
    return Block(rows_B, scores_BM, *spread)


def joined(blocks: Iterator[Block], queries: int) -> Iterator[Block]:
    """Join short blocks: examining a block costs as much as scoring a thousand rows."""
    high = min(MAX_ROWS, CPU_BYTES // 4 // queries)
    waiting: list[Block] = []
    count = 0
    for block in blocks:
        waiting.append(block)
        count += len(block.rows_B)
        if 2 * count > high:
            yield _together(waiting)
            waiting, count = [], 0
    if waiting:
        yield _together(waiting)


def _together(blocks: list[Block]) -> Block:
    if len(blocks) == 1:
        return blocks[0]
    rows, scores = [], []
    for block in blocks:
        # No group may span two blocks: copies of the last row, not allowed, fill its group.
        short = -len(block.rows_B) % GROUP
        rows += [block.rows_B, block.rows_B[-1:].expand(short)]
        scores.append(torch.nn.functional.pad(block.scores_BM, (0, 0, 0, short), value=-torch.inf))
    parts = ((b.error_XM, b.unit_XM, b.offset_XM) for b in blocks)
    return Block(torch.cat(rows), torch.cat(scores), *map(torch.cat, zip(*parts, strict=True)))


Screen = Callable[[Tensor, Corpus, Tensor | None], Iterator[Block]]


def plain(vectors_ND: Tensor | Sequence[Tensor]) -> Corpus:
    """Wrap vectors as they are."""
    shards = [vectors_ND] if isinstance(vectors_ND, Tensor) else list(vectors_ND)
    checks.check_shards(shards)
    return Corpus([s for s in shards if len(s)])


def single(queries_MD: Tensor, corpus: Corpus, allow: Tensor | None) -> Iterator[Block]:
    """Scores in float32, on the device of the queries, wherever the vectors lie."""
    count, device = len(queries_MD), queries_MD.device
    if device.type == "cpu":
        high, piece = _scored_rows(count), _widened_rows(corpus.width)
    else:
        high = piece = max(MIN_ROWS, GPU_BYTES // 4 // max(count, corpus.width) // GROUP * GROUP)
    memory = queries_MD.new_empty(piece, corpus.width)
    norms_M = torch.linalg.vector_norm(queries_MD, dim=1)
    share = sum_error(corpus.width, SINGLE) + 2 * _rounded_inputs()
    for rows_B, block_BD, allowed_B in _blocks(corpus, allow, high):
        scores_BM = queries_MD.new_empty(len(block_BD), count)
        longest = corpus.longest or 0.0
        for part_PD, scores_PM in zip(block_BD.split(piece), scores_BM.split(piece), strict=True):
            here = part_PD.dtype == torch.float32 and part_PD.device == device
            wide_PD = part_PD if here else memory[: len(part_PD)].copy_(part_PD)
            torch.mm(wide_PD, queries_MD.T, out=scores_PM)
            if corpus.longest is None:
                longest = max(longest, _norm(wide_PD))
        yield _block(rows_B.to(device), _mask(scores_BM, allowed_B), norms_M * (longest * share))


def half(queries_MD: Tensor, corpus: Corpus, allow: Tensor | None) -> Iterator[Block]:
    """Scores of float16 vectors, read once per query and summed in float32; on a CPU."""
    norms_M = torch.linalg.vector_norm(queries_MD, dim=1)
    rounded_MD = queries_MD.half()
    lost_M = torch.linalg.vector_norm(queries_MD - rounded_MD.float(), dim=1)
    # Errors of the cast of the query, the sum, and its cast: 2^-25 below float16's range.
    share_M = lost_M + norms_M * (sum_error(corpus.width, SINGLE) + 1.01 * HALF)
    for rows_B, block_BD, allowed_B in _blocks(corpus, allow, _scored_rows(len(queries_MD))):
        longest = corpus.longest or _longest(block_BD)
        if longest * norms_M.max() < HALF_RANGE:
            scores_BM = torch.stack([block_BD @ query_D for query_D in rounded_MD], dim=1).float()
        else:
            scores_BM = block_BD.float() @ queries_MD.T
        yield _block(rows_B, _mask(scores_BM, allowed_B), longest * share_M + 2.0**-24)


def bfloat16(queries_MD: Tensor, corpus: Corpus, allow: Tensor | None) -> Iterator[Block]:
    """Scores in bfloat16, which some CPUs multiply far faster than float32; on a CPU."""
    count, piece = len(queries_MD), _widened_rows(corpus.width)
    norms_M = torch.linalg.vector_norm(queries_MD, dim=1)
    share = sum_error(corpus.width, SINGLE)
    rounded_MD = queries_MD.bfloat16()
    lost_M = torch.linalg.vector_norm(queries_MD - rounded_MD.float(), dim=1)
    wide = queries_MD.new_empty(piece, corpus.width)
    brief = queries_MD.new_empty(piece, corpus.width, dtype=torch.bfloat16)
    for rows_B, block_BD, allowed_B in _blocks(corpus, allow, _scored_rows(count)):
        scores_BM = brief.new_empty(len(block_BD), count)
        longest, lost = (corpus.longest, corpus.lost) if corpus.longest else (0.0, 0.0)
        for part_PD, scores_PM in zip(block_BD.split(piece), scores_BM.split(piece), strict=True):
            # Via float32: torch is slow from float16 to bfloat16.
            wide_PD = wide[: len(part_PD)].copy_(part_PD)
            brief_PD = brief[: len(part_PD)].copy_(wide_PD)
            torch.mm(brief_PD, rounded_MD.T, out=scores_PM)
            if corpus.longest is None:
                longest = max(longest, _norm(wide_PD))
                lost = max(lost, _lost_in_bfloat16(wide_PD))
        # Errors of the casts of a vector and of a query, the sum, and its cast.
        error_M = lost * norms_M + longest * (1 + BRIEF) * (lost_M + norms_M * share)
        error_M += BRIEF * torch.stack(scores_BM.aminmax()).abs().max()
        yield _block(rows_B, _mask(scores_BM, allowed_B), 1.01 * error_M)


def _lost_in_bfloat16(wide_BD: Tensor) -> float:
    """Return the largest norm of the rounding errors of vectors cast to bfloat16."""
    return _norm(wide_BD - wide_BD.bfloat16().float())


def _norm(wide_BD: Tensor) -> float:
    """Return the largest norm."""
    return float(torch.linalg.vector_norm(wide_BD, dim=1).max())


def _scored_rows(queries: int) -> int:
    """Return how many rows to score at once, so that their scores fit into the CPU cache."""
    return min(MAX_ROWS, max(MIN_ROWS, CPU_BYTES // 4 // queries // GROUP * GROUP))


def _widened_rows(width: int) -> int:
    """Return how many rows to convert to float32 at once, to fit into the cache of a core."""
    return max(GROUP, min(CPU_BYTES, WIDENED_BYTES) // 4 // width // GROUP * GROUP)


def _longest(block_BD: Tensor) -> float:
    """Return the largest norm; converts to float32 in pieces that fit into the cache."""
    pieces = block_BD.split(max(1, CACHED_BYTES // 4 // block_BD.shape[1]))
    wide = torch.empty(pieces[0].shape)
    norms = [torch.linalg.vector_norm(wide[: len(p)].copy_(p), dim=1).max() for p in pieces]
    return float(torch.stack(norms).max())


def int8(queries_MD: Tensor, corpus: Corpus, allow: Tensor | None) -> Iterator[Block]:
    """Scores of codes by integer products, exact except for quantization error; on a CPU."""
    assert corpus.codes is not None
    high = _scored_rows(len(queries_MD))
    queries = code_queries(queries_MD)
    first = 0
    for codes in corpus.codes:
        offset_M = (queries_MD.double() @ codes.centre_D.double()).float()
        for rows in _cuts(len(codes), high):
            part = codes[rows]
            rows_B = torch.arange(first + rows.start, first + rows.stop)
            allowed_B = None if allow is None else allow[rows_B]
            scores_BM, error_XM = part.scores(queries)
            unit_X1 = part.scale_X[:, None]
            yield _block(rows_B, _mask(scores_BM, allowed_B), error_XM, unit_X1, offset_M)
        first += len(codes)


def _rounded_inputs() -> float:
    """Return how far torch may round the factors of a float32 product, by the user's setting."""
    setting = torch.get_float32_matmul_precision()
    return 0.0 if setting == "highest" else 1.01 * ROUNDOFF[setting]


def _blocks(
    corpus: Corpus, allow: Tensor | None, high: int
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield blocks of row numbers and vectors, with a mask of allowed rows if not all are."""
    few = allow is not None and int(allow.count_nonzero()) < GATHERED * corpus.rows
    if allow is not None and few:
        gathered = min(high, max(MIN_ROWS, CPU_BYTES // (2 * corpus.width)))
        for first, shard in corpus.numbered():
            for places in allow[first : first + len(shard)].nonzero()[:, 0].split(gathered):
                if len(places):
                    at = places.to(shard.device)
                    yield first + places.cpu(), shard.index_select(0, at), None
        return
    for first, shard in corpus.numbered():
        for rows in _cuts(len(shard), high):
            block_BD, start = shard[rows], first + rows.start
            rows_B = torch.arange(start, start + len(block_BD))
            allowed_B = None if allow is None else allow[start : start + len(block_BD)].cpu()
            if allowed_B is None or allowed_B.all():
                yield rows_B, block_BD, None
            elif allowed_B.any():
                yield rows_B, block_BD, allowed_B


def _cuts(count: int, high: int) -> Iterator[slice]:
    """Split rows into blocks of nearly equal length, at most `high`."""
    length = -(-count // -(-count // high))
    length += -length % GROUP
    for start in range(0, count, length):
        yield slice(start, min(start + length, count))


def _mask(scores_BM: Tensor, allowed_B: Tensor | None) -> Tensor:
    if allowed_B is not None:
        scores_BM.masked_fill_(~allowed_B.to(scores_BM.device)[:, None], -torch.inf)
    return scores_BM
