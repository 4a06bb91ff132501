"""Fast scores with a bounded error, which decide which vectors need an exact score.

Shapes: M queries, N stored vectors, D dimensions, B vectors of a block, X groups of neighbouring
vectors.

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
from mmalign.kernels.codes import GROUP, Codes, quantize_queries, sum_error
from mmalign.kernels.timings import Timings

# Blocks of vectors and of scores that fit into the cache of a CPU, or fill a GPU.
CPU_BYTES, GPU_BYTES = 8 << 20, 256 << 20
CACHED_BYTES = 1 << 20
# Blocks that are converted to float32 first: so small that the result is still in the cache of a
# core when it is read. With 8 MiB, bfloat16 took two to four times as long.
WIDENED_BYTES = 2 << 20
MIN_ROWS, MAX_ROWS = 256, 1 << 18
# If a smaller share of the rows is allowed, they are gathered instead of masked.
GATHER_BELOW = 0.25
BFLOAT16_ROUNDOFF, FLOAT16_ROUNDOFF, FLOAT32_ROUNDOFF = 2.0**-8, 2.0**-11, 2.0**-24
FLOAT16_RANGE = 60_000.0
MATMUL_ROUNDOFF = {
    "highest": FLOAT32_ROUNDOFF,
    "high": FLOAT16_ROUNDOFF,
    "medium": BFLOAT16_ROUNDOFF,
}


@dataclass(frozen=True)
class Corpus:
    """Stored vectors in shards, and what is known about them; created by `prepare`."""

    shards: list[Tensor]
    max_norm: float | None = None
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
    def dim(self) -> int:
        """Number of dimensions."""
        return self.shards[0].shape[1]

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Types of the shards."""
        return {shard.dtype for shard in self.shards}

    @cached_property
    def bfloat16_error(self) -> float:
        """A bound on the norms of the vectors' bfloat16 rounding errors; reads all of them once."""
        chunks = (p for shard in self.shards for p in shard.split(_widened_rows(self.dim)))
        bfloat16_error = max(_max_bfloat16_error(chunk.float()) for chunk in chunks)
        return bfloat16_error * (1 + sum_error(self.dim, FLOAT32_ROUNDOFF))

    def with_first_rows(self) -> Iterator[tuple[int, Tensor]]:
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
    expanded = [
        torch.as_tensor(x, device=scores_BM.device).expand(shape) for x in (error, unit, offset)
    ]
    return Block(rows_B, scores_BM, *expanded)


def merge_small_blocks(blocks: Iterator[Block], queries: int) -> Iterator[Block]:
    """Join short blocks: examining a block costs as much as scoring a thousand rows."""
    max_rows = min(MAX_ROWS, CPU_BYTES // 4 // queries)
    pending: list[Block] = []
    count = 0
    for block in blocks:
        pending.append(block)
        count += len(block.rows_B)
        if 2 * count > max_rows:
            yield _concatenate(pending)
            pending, count = [], 0
    if pending:
        yield _concatenate(pending)


def _concatenate(blocks: list[Block]) -> Block:
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


def as_corpus(vectors_ND: Tensor | Sequence[Tensor]) -> Corpus:
    """Wrap vectors as they are."""
    shards = [vectors_ND] if isinstance(vectors_ND, Tensor) else list(vectors_ND)
    checks.check_shards(shards)
    return Corpus([s for s in shards if len(s)])


def single(queries_MD: Tensor, corpus: Corpus, allow: Tensor | None) -> Iterator[Block]:
    """Scores in float32, on the device of the queries, wherever the vectors lie."""
    count, device = len(queries_MD), queries_MD.device
    if device.type == "cpu":
        max_rows, chunk_rows = _scored_rows(count), _widened_rows(corpus.dim)
    else:
        max_rows = chunk_rows = max(
            MIN_ROWS, GPU_BYTES // 4 // max(count, corpus.dim) // GROUP * GROUP
        )
    buffer = queries_MD.new_empty(chunk_rows, corpus.dim)
    norms_M = torch.linalg.vector_norm(queries_MD, dim=1)
    relative_error = sum_error(corpus.dim, FLOAT32_ROUNDOFF) + 2 * _input_rounding()
    for rows_B, block_BD, allowed_B in _blocks(corpus, allow, max_rows):
        scores_BM = queries_MD.new_empty(len(block_BD), count)
        max_norm = corpus.max_norm or 0.0
        for part_PD, scores_PM in zip(
            block_BD.split(chunk_rows), scores_BM.split(chunk_rows), strict=True
        ):
            is_ready = part_PD.dtype == torch.float32 and part_PD.device == device
            float32_PD = part_PD if is_ready else buffer[: len(part_PD)].copy_(part_PD)
            torch.mm(float32_PD, queries_MD.T, out=scores_PM)
            if corpus.max_norm is None:
                max_norm = max(max_norm, _max_norm(float32_PD))
        yield _block(
            rows_B.to(device), _mask(scores_BM, allowed_B), norms_M * (max_norm * relative_error)
        )


def half(queries_MD: Tensor, corpus: Corpus, allow: Tensor | None) -> Iterator[Block]:
    """Scores of float16 vectors, read once per query and summed in float32; on a CPU."""
    norms_M = torch.linalg.vector_norm(queries_MD, dim=1)
    rounded_MD = queries_MD.half()
    query_error_M = torch.linalg.vector_norm(queries_MD - rounded_MD.float(), dim=1)
    # Errors of the cast of the query, the sum, and its cast: 2^-25 below float16's range.
    error_per_norm_M = query_error_M + norms_M * (
        sum_error(corpus.dim, FLOAT32_ROUNDOFF) + 1.01 * FLOAT16_ROUNDOFF
    )
    for rows_B, block_BD, allowed_B in _blocks(corpus, allow, _scored_rows(len(queries_MD))):
        max_norm = corpus.max_norm or _max_norm_of_block(block_BD)
        if max_norm * norms_M.max() < FLOAT16_RANGE:
            scores_BM = torch.stack([block_BD @ query_D for query_D in rounded_MD], dim=1).float()
        else:
            scores_BM = block_BD.float() @ queries_MD.T
        yield _block(rows_B, _mask(scores_BM, allowed_B), max_norm * error_per_norm_M + 2.0**-24)


def bfloat16(queries_MD: Tensor, corpus: Corpus, allow: Tensor | None) -> Iterator[Block]:
    """Scores in bfloat16, which some CPUs multiply far faster than float32; on a CPU."""
    count, chunk_rows = len(queries_MD), _widened_rows(corpus.dim)
    norms_M = torch.linalg.vector_norm(queries_MD, dim=1)
    relative_error = sum_error(corpus.dim, FLOAT32_ROUNDOFF)
    rounded_MD = queries_MD.bfloat16()
    query_error_M = torch.linalg.vector_norm(queries_MD - rounded_MD.float(), dim=1)
    float32_buffer = queries_MD.new_empty(chunk_rows, corpus.dim)
    bfloat16_buffer = queries_MD.new_empty(chunk_rows, corpus.dim, dtype=torch.bfloat16)
    for rows_B, block_BD, allowed_B in _blocks(corpus, allow, _scored_rows(count)):
        scores_BM = bfloat16_buffer.new_empty(len(block_BD), count)
        max_norm, bfloat16_error = (
            (corpus.max_norm, corpus.bfloat16_error) if corpus.max_norm else (0.0, 0.0)
        )
        for part_PD, scores_PM in zip(
            block_BD.split(chunk_rows), scores_BM.split(chunk_rows), strict=True
        ):
            # Via float32: torch is slow from float16 to bfloat16.
            float32_PD = float32_buffer[: len(part_PD)].copy_(part_PD)
            bfloat16_PD = bfloat16_buffer[: len(part_PD)].copy_(float32_PD)
            torch.mm(bfloat16_PD, rounded_MD.T, out=scores_PM)
            if corpus.max_norm is None:
                max_norm = max(max_norm, _max_norm(float32_PD))
                bfloat16_error = max(bfloat16_error, _max_bfloat16_error(float32_PD))
        # Errors of the casts of a vector and of a query, the sum, and its cast.
        error_M = bfloat16_error * norms_M + max_norm * (1 + BFLOAT16_ROUNDOFF) * (
            query_error_M + norms_M * relative_error
        )
        error_M += BFLOAT16_ROUNDOFF * torch.stack(scores_BM.aminmax()).abs().max()
        yield _block(rows_B, _mask(scores_BM, allowed_B), 1.01 * error_M)


def _max_bfloat16_error(float32_BD: Tensor) -> float:
    """Return the largest norm of the rounding errors of vectors cast to bfloat16."""
    return _max_norm(float32_BD - float32_BD.bfloat16().float())


def _max_norm(float32_BD: Tensor) -> float:
    """Return the largest norm."""
    return float(torch.linalg.vector_norm(float32_BD, dim=1).max())


def _scored_rows(queries: int) -> int:
    """Return how many rows to score at once, so that their scores fit into the CPU cache."""
    return min(MAX_ROWS, max(MIN_ROWS, CPU_BYTES // 4 // queries // GROUP * GROUP))


def _widened_rows(dim: int) -> int:
    """Return how many rows to convert to float32 at once, to fit into the cache of a core."""
    return max(GROUP, min(CPU_BYTES, WIDENED_BYTES) // 4 // dim // GROUP * GROUP)


def _max_norm_of_block(block_BD: Tensor) -> float:
    """Return the largest norm; converts to float32 in pieces that fit into the cache."""
    chunks = block_BD.split(max(1, CACHED_BYTES // 4 // block_BD.shape[1]))
    float32_buffer = torch.empty(chunks[0].shape)
    norms = [
        torch.linalg.vector_norm(float32_buffer[: len(p)].copy_(p), dim=1).max() for p in chunks
    ]
    return float(torch.stack(norms).max())


def int8(queries_MD: Tensor, corpus: Corpus, allow: Tensor | None) -> Iterator[Block]:
    """Scores of codes by integer products, exact except for quantization error; on a CPU."""
    assert corpus.codes is not None
    max_rows = _scored_rows(len(queries_MD))
    queries = quantize_queries(queries_MD)
    first = 0
    for codes in corpus.codes:
        offset_M = (queries_MD.double() @ codes.centre_D.double()).float()
        for rows in _row_slices(len(codes), max_rows):
            part = codes[rows]
            rows_B = torch.arange(first + rows.start, first + rows.stop)
            allowed_B = None if allow is None else allow[rows_B]
            scores_BM, error_XM = part.scores(queries)
            unit_X1 = part.scale_X[:, None]
            yield _block(rows_B, _mask(scores_BM, allowed_B), error_XM, unit_X1, offset_M)
        first += len(codes)


def _input_rounding() -> float:
    """Return how far torch may round the factors of a float32 product, by the user's setting."""
    setting = torch.get_float32_matmul_precision()
    return 0.0 if setting == "highest" else 1.01 * MATMUL_ROUNDOFF[setting]


def _blocks(
    corpus: Corpus, allow: Tensor | None, max_rows: int
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield blocks of row numbers and vectors, with a mask of allowed rows if not all are."""
    few = allow is not None and int(allow.count_nonzero()) < GATHER_BELOW * corpus.rows
    if allow is not None and few:
        gathered = min(max_rows, max(MIN_ROWS, CPU_BYTES // (2 * corpus.dim)))
        for first, shard in corpus.with_first_rows():
            for positions in allow[first : first + len(shard)].nonzero()[:, 0].split(gathered):
                if len(positions):
                    at = positions.to(shard.device)
                    yield first + positions.cpu(), shard.index_select(0, at), None
        return
    for first, shard in corpus.with_first_rows():
        for rows in _row_slices(len(shard), max_rows):
            block_BD, start = shard[rows], first + rows.start
            rows_B = torch.arange(start, start + len(block_BD))
            allowed_B = None if allow is None else allow[start : start + len(block_BD)].cpu()
            if allowed_B is None or allowed_B.all():
                yield rows_B, block_BD, None
            elif allowed_B.any():
                yield rows_B, block_BD, allowed_B


def _row_slices(count: int, max_rows: int) -> Iterator[slice]:
    """Split rows into blocks of nearly equal length, at most `max_rows`."""
    length = -(-count // -(-count // max_rows))
    length += -length % GROUP
    for start in range(0, count, length):
        yield slice(start, min(start + length, count))


def _mask(scores_BM: Tensor, allowed_B: Tensor | None) -> Tensor:
    if allowed_B is not None:
        scores_BM.masked_fill_(~allowed_B.to(scores_BM.device)[:, None], -torch.inf)
    return scores_BM
