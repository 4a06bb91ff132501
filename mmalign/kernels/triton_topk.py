"""Exact top-k on a GPU: one fused product that keeps the best score of each group of rows.

Shapes: M queries, N stored vectors, D dimensions, K neighbours, X groups of neighbouring rows.

The kernel reads each vector once and writes one number per 64 of them. The k best rows lie within
the groups whose best scores reach the k-th best (minus the error of the screen), so only these are
rescored, in float64. Vectors may lie on several GPUs, each of which screens its own, or in host
memory, from which they are streamed.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmalign.errors import VectorError
from mmalign.kernels.codes import sum_error
from mmalign.kernels.rescore import best_pairs, exact_scores
from mmalign.kernels.screens import Corpus
from mmalign.kernels.triton_loss import INTERPRETED

GROUP = 64
# Tensor cores may truncate where float32 would round: two extra bits of error are allowed.
ROUNDOFF = 2.0**-22
# The best scores of groups take at most this much memory; more queries are split.
BEST_BYTES = 1 << 30
STREAMED_BYTES = 256 << 20


def _configs() -> list[Any]:
    if INTERPRETED:
        return [triton.Config({"HIGH": 16, "WIDE": 128, "DEEP": 16})]
    shapes = [
        (16, 128, 128, 4, 4), (16, 256, 64, 4, 4), (16, 128, 64, 4, 5),
        (64, 128, 64, 4, 3), (128, 128, 64, 8, 3), (128, 256, 64, 8, 3),
    ]  # fmt: skip
    return [
        triton.Config(
            {"HIGH": high, "WIDE": wide, "DEEP": deep}, num_warps=warps, num_stages=stages
        )
        for high, wide, deep, warps, stages in shapes
    ]


def _fits(configs: list[Any], arguments: dict[str, Any], **_: Any) -> list[Any]:
    """Keep tile heights that suit the number of queries and fit into shared memory."""
    high = 16 if arguments["query_count"] <= 16 else 64 if arguments["query_count"] <= 64 else 128
    size = arguments["vectors"].element_size()
    fitting = [
        c
        for c in configs
        if c.kwargs["HIGH"] == high
        and (high + c.kwargs["WIDE"]) * c.kwargs["DEEP"] * size * c.num_stages < 220_000
    ]
    return fitting or configs[:1]


@triton.autotune(
    configs=_configs(),
    key=["D", "query_class", "FILTERED"],
    prune_configs_by={"early_config_prune": _fits},
)
@triton.jit
def _best_kernel(
    queries, vectors, allow, best, query_count, row_count, group_count, query_class,
    D: tl.constexpr, FILTERED: tl.constexpr, PRECISION: tl.constexpr, GROUP_ROWS: tl.constexpr,
    HIGH: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """Compute the largest inner product of each query with the allowed rows of each group."""
    # Tiles over the same vectors run one after the other, so that these are read from memory once.
    query = tl.program_id(0) * HIGH + tl.arange(0, HIGH)
    row = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    query_in, row_in = query < query_count, row < row_count
    sums = tl.zeros((HIGH, WIDE), dtype=tl.float32)
    query_pointers = queries + query[:, None].to(tl.int64) * D
    row_pointers = vectors + row[None, :].to(tl.int64) * D
    for start in range(0, D, DEEP):
        depth = start + tl.arange(0, DEEP)
        if D % DEEP == 0:
            one = tl.load(query_pointers + depth[None, :], mask=query_in[:, None], other=0.0)
            other = tl.load(row_pointers + depth[:, None], mask=row_in[None, :], other=0.0)
        else:
            inside = depth < D
            one = tl.load(
                query_pointers + depth[None, :], mask=query_in[:, None] & inside[None, :], other=0.0
            )
            other = tl.load(
                row_pointers + depth[:, None], mask=row_in[None, :] & inside[:, None], other=0.0
            )
        if INTERPRETED:  # the interpreter reads the bits of bfloat16 as integers
            one, other = one.to(tl.float32), other.to(tl.float32)
        sums = tl.dot(one, other, sums, input_precision=PRECISION)
    if FILTERED:
        row_in &= tl.load(allow + row, mask=row_in, other=0) != 0
    sums = tl.where(row_in[None, :], sums, float("-inf"))
    top = tl.max(tl.reshape(sums, (HIGH, WIDE // GROUP_ROWS, GROUP_ROWS)), 2)
    group = tl.program_id(1) * (WIDE // GROUP_ROWS) + tl.arange(0, WIDE // GROUP_ROWS)
    pointers = best + query[:, None].to(tl.int64) * group_count + group[None, :]
    tl.store(pointers, top, mask=query_in[:, None] & (group < group_count)[None, :])


def unsupported_reason(queries_MD: Tensor, corpus: Corpus) -> str | None:
    """Return why these kernels cannot search a corpus, or None if they can."""
    if not queries_MD.is_cuda and not INTERPRETED:
        return f"queries_MD is on {queries_MD.device}, not on a GPU"
    types = {shard.dtype for shard in corpus.shards}
    if not types <= {torch.float16, torch.bfloat16, torch.float32}:
        return f"vectors_ND is {types}, not float16, bfloat16 or float32"
    if corpus.dim % 16 or corpus.dim > 4096:
        return f"vectors_ND has {corpus.dim} dims, not a multiple of 16 up to 4,096"
    return None


def topk(
    queries_MD: Tensor, corpus: Corpus, k: int, *, allow: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `kernels.topk`; queries are float32, on the GPU that merges the results."""
    at_once = max(16, BEST_BYTES // (4 * -(-corpus.rows // GROUP)) // 16 * 16)
    parts = [_topk(part, corpus, k, allow) for part in queries_MD.split(at_once)]
    scores, rows = zip(*parts, strict=True)
    return torch.cat(scores), torch.cat(rows)


def _topk(
    queries_MD: Tensor, corpus: Corpus, k: int, allow: Tensor | None
) -> tuple[Tensor, Tensor]:
    device = queries_MD.device
    best, first_rows, last_rows = [], [], []
    max_norm, cast_error = corpus.max_norm or 0.0, 0.0
    for first, shard in _on_gpus(corpus, device):
        allowed = None if allow is None else allow[first : first + len(shard)].to(shard.device)
        cast_MD = queries_MD.to(shard.device, shard.dtype)
        best.append(_screen(cast_MD, shard, allowed).to(device, non_blocking=True))
        starts = torch.arange(first, first + len(shard), GROUP, device=device)
        first_rows.append(starts)
        last_rows.append((starts + GROUP).clamp(max=first + len(shard)))
        cast_error = max(cast_error, _relative_cast_error(queries_MD, shard.dtype))
        if corpus.max_norm is None:
            max_norm = max(max_norm, _max_norm(shard, first))
    best_MX = torch.cat(best, dim=1)
    norms_M = torch.linalg.vector_norm(queries_MD, dim=1)
    relative_error = cast_error + (1 + cast_error) * sum_error(corpus.dim, ROUNDOFF)
    error_M1 = (norms_M * max_norm * relative_error)[:, None]
    threshold_M1 = best_MX.new_full((len(best_MX), 1), -torch.inf)
    if k <= best_MX.shape[1]:
        threshold_M1 = best_MX.topk(k, dim=1).values[:, -1:] - error_M1
    candidate_MX = (best_MX + error_M1 >= threshold_M1) & (best_MX > -torch.inf)
    query_H, group_H = candidate_MX.nonzero(as_tuple=True)
    starts_X, ends_X = torch.cat(first_rows), torch.cat(last_rows)
    rows_HG = starts_X[group_H, None] + torch.arange(GROUP, device=device)
    kept_HG = rows_HG < ends_X[group_H, None]
    if allow is not None:
        kept_HG &= allow.to(device)[rows_HG.clamp(max=corpus.rows - 1)]
    query_P, rows_P = query_H[:, None].expand_as(rows_HG)[kept_HG], rows_HG[kept_HG]
    scores_P = exact_scores(queries_MD.double(), corpus, query_P, rows_P)
    # k empty places per query, after all candidates.
    empty = torch.arange(len(queries_MD), device=device).repeat_interleave(k)
    return best_pairs(
        torch.cat([query_P, empty]),
        torch.cat([rows_P, torch.full_like(empty, -1)]),
        torch.cat([scores_P, scores_P.new_full(empty.shape, -torch.inf)]),
        (len(queries_MD), k),
    )


def _screen(queries_MD: Tensor, shard_ND: Tensor, allow_N: Tensor | None) -> Tensor:
    """Return the best score of each group of a shard, (M, X)."""
    groups = -(-len(shard_ND) // GROUP)
    best_MX = torch.empty((len(queries_MD), groups), dtype=torch.float32, device=shard_ND.device)
    count, rows = len(queries_MD), len(shard_ND)
    with torch.cuda.device_of(shard_ND):
        _best_kernel[lambda c: (triton.cdiv(count, c["HIGH"]), triton.cdiv(rows, c["WIDE"]))](
            queries_MD.contiguous(), shard_ND.contiguous(),
            allow_N if allow_N is not None else shard_ND, best_MX,
            count, rows, groups, min(count, 128).bit_length(),
            D=shard_ND.shape[1], FILTERED=allow_N is not None,
            PRECISION="ieee" if shard_ND.dtype == torch.float32 else "tf32", GROUP_ROWS=GROUP,
        )  # fmt: skip
    return best_MX


def _on_gpus(corpus: Corpus, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Yield vectors with their first row number: in place on a GPU, streamed from the host."""
    pinned: list[Tensor] = []
    copied: list[Any] = []
    turn = 0
    for first, shard in corpus.with_first_rows():
        if shard.is_cuda or device.type != "cuda":
            yield first, shard
            continue
        high = max(
            GROUP, STREAMED_BYTES // (shard.shape[1] * shard.element_size()) // GROUP * GROUP
        )
        for start in range(0, len(shard), high):
            part = shard[start : start + high]
            if not pinned or pinned[0].dtype != shard.dtype:
                shape = (high, shard.shape[1])
                pinned = [torch.empty(shape, dtype=shard.dtype, pin_memory=True) for _ in range(2)]
                copied = [torch.cuda.Event() for _ in range(2)]
            # While the GPU copies and screens one part, the host fills the other buffer.
            staging, event = pinned[turn % 2], copied[turn % 2]
            event.synchronize()
            staging = staging[: len(part)].copy_(part)
            on_gpu = staging.to(device, non_blocking=True)
            event.record()
            turn += 1
            yield first + start, on_gpu


def _relative_cast_error(queries_MD: Tensor, dtype: torch.dtype) -> float:
    """Return the largest relative error of a query when cast to another dtype."""
    cast_error_M = torch.linalg.vector_norm(queries_MD - queries_MD.to(dtype).float(), dim=1)
    return float((cast_error_M / torch.linalg.vector_norm(queries_MD, dim=1)).max())


def _max_norm(shard_ND: Tensor, first: int) -> float:
    parts = shard_ND.split(1 << 18)
    norms = [torch.linalg.vector_norm(part.float(), dim=1).max() for part in parts]
    max_norm = float(torch.stack(norms).max())
    if not math.isfinite(max_norm):
        raise VectorError(f"vectors_ND holds NaN in rows {first} to {first + len(shard_ND) - 1}")
    return max_norm
