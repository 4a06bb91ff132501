"""Contrastive losses on a GPU: the three passes of `blocked.py`, with every tile fused.

Shapes: B images of this process (rows), N texts of all processes (columns), D dimensions, R rows
of a slab.

The logits of a tile stay in registers from the product to their exponentials. The backward pass
writes the weights of one slab of rows at a time, in the dtype of the inputs; both gradients are
plain matrix products with it, at the full speed of the vendor's library. Sums are float32.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import os
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmalign.kernels.blocked import Problem

# Triton's interpreter runs the kernels on the CPU, for tests.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS = range(16, 2049, 16)
# Memory of one slab of weights, whatever the batch size.
SLAB_BYTES = 128 << 20
# Each direction of the log-sum-exps is split into PARTS parts of whole tiles: enough programs to
# fill a GPU, few enough partial sums to combine cheaply.
PARTS, TALLEST = 32, 128
# float16 loses precision below 6e-5, where the weights of a large batch lie.
GAIN = {torch.float16: 4096.0}


def unsupported_reason(images: Tensor) -> str | None:
    """Return why these kernels cannot take a matrix, or None if they can."""
    if not images.is_cuda and not INTERPRETED:
        return f"image_ND is on {images.device}, not on a GPU"
    if images.dtype not in DTYPES:
        return f"image_ND is {images.dtype}, not bfloat16, float16 or float32"
    if images.shape[1] not in WIDTHS:
        return f"image_ND has {images.shape[1]} dims, not a multiple of 16 up to 2,048"
    return None


def _configs() -> list[Any]:
    if INTERPRETED:
        return [triton.Config({"HIGH": 64, "WIDE": 128, "DEEP": 16})]
    shapes = [(128, 128, 64, 4, 3), (128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (64, 128, 32, 4, 3)]
    return [
        triton.Config(
            {"HIGH": high, "WIDE": wide, "DEEP": deep}, num_warps=warps, num_stages=stages
        )
        for high, wide, deep, warps, stages in shapes
    ]


def _fits(configs: list[Any], arguments: dict[str, Any], **_: Any) -> list[Any]:
    """Keep the configurations whose tiles fit into shared memory for this dtype."""
    size = arguments["images"].element_size()
    fitting = [
        c
        for c in configs
        if (c.kwargs["HIGH"] + c.kwargs["WIDE"]) * c.kwargs["DEEP"] * size * c.num_stages < 220_000
    ]
    return fitting or configs[-1:]


_KEY = ["D", "size_class", "ROW_IDS", "COLUMN_IDS"]
_PRUNE = {"early_config_prune": _fits}


@triton.jit
def _logits(
    images, texts, scale, row_ids, column_ids, rows, columns, row_count, column_count, first,
    D: tl.constexpr, ROW_IDS: tl.constexpr, COLUMN_IDS: tl.constexpr,
    HIGH: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute one tile of logits: -inf outside the matrices and for pairs that share an id."""
    sums = tl.zeros((HIGH, WIDE), dtype=tl.float32)
    rows_in = (rows < row_count)[:, None]
    columns_in = (columns < column_count)[None, :]
    row_pointers = images + rows[:, None].to(tl.int64) * D
    column_pointers = texts + columns[None, :].to(tl.int64) * D
    for start in range(0, D, DEEP):
        depth = start + tl.arange(0, DEEP)
        if D % DEEP == 0:
            image = tl.load(row_pointers + depth[None, :], mask=rows_in, other=0.0)
            text = tl.load(column_pointers + depth[:, None], mask=columns_in, other=0.0)
        else:
            inside = depth < D
            image = tl.load(
                row_pointers + depth[None, :], mask=rows_in & inside[None, :], other=0.0
            )
            text = tl.load(
                column_pointers + depth[:, None], mask=columns_in & inside[:, None], other=0.0
            )
        if INTERPRETED:  # the interpreter reads the bits of bfloat16 as integers
            image, text = image.to(tl.float32), text.to(tl.float32)
        sums = tl.dot(image, text, sums, input_precision=PRECISION)
    logits = tl.where(rows_in & columns_in, sums * tl.load(scale), float("-inf"))
    if ROW_IDS > 0:
        share_id = tl.zeros((HIGH, WIDE), dtype=tl.int32)
        for i in range(ROW_IDS):
            row_id = tl.load(row_ids + rows * ROW_IDS + i, mask=rows < row_count, other=-1)
            for j in range(COLUMN_IDS):
                pointers = column_ids + columns * COLUMN_IDS + j
                column_id = tl.load(pointers, mask=columns < column_count, other=-2)
                share_id |= (row_id[:, None] == column_id[None, :]).to(tl.int32)
        # Positive pairs are never masked.
        is_positive = (rows + first)[:, None] == columns[None, :]
        logits = tl.where((share_id != 0) & ~is_positive, float("-inf"), logits)
    return logits


@triton.jit
def _log_sum(logits, axis: tl.constexpr):
    top = tl.max(logits, axis)
    # A row that is all -inf must not become NaN; every other row has a sum of at least 1.
    safe = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(logits - tl.expand_dims(safe, axis)), axis)
    return top + tl.log(tl.maximum(total, 1.0))


@triton.jit
def _log_add(a, b):
    top = tl.maximum(a, b)
    safe = tl.where(top == float("-inf"), 0.0, top)
    return top + tl.log(tl.maximum(tl.exp(a - safe) + tl.exp(b - safe), 1.0))


@triton.autotune(configs=_configs(), key=_KEY, prune_configs_by=_PRUNE)
@triton.jit
def _log_sum_exps_kernel(
    images, texts, scale, row_ids, column_ids, row_sums, column_sums, positive_logits,
    row_count, column_count, first, rows_each, columns_each, size_class,
    D: tl.constexpr, ROW_IDS: tl.constexpr, COLUMN_IDS: tl.constexpr, PRECISION: tl.constexpr,
    HIGH: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of one rectangle along rows and down columns, and its diagonal logits."""
    row_part, column_part = tl.program_id(1), tl.program_id(0)
    first_row, first_column = row_part * rows_each, column_part * columns_each
    row_end = tl.minimum(first_row + rows_each, row_count)
    column_end = tl.minimum(first_column + columns_each, column_count)
    for row in range(first_row, row_end, HIGH):
        rows = row + tl.arange(0, HIGH)
        row_log_sum = tl.full((HIGH,), float("-inf"), dtype=tl.float32)
        for column in range(first_column, column_end, WIDE):
            columns = column + tl.arange(0, WIDE)
            logits = _logits(
                images, texts, scale, row_ids, column_ids, rows, columns,
                row_end, column_end, first, D, ROW_IDS, COLUMN_IDS, HIGH, WIDE, DEEP, PRECISION,
            )  # fmt: skip
            positive_column = rows + first
            if (row + first < column + WIDE) & (row + first + HIGH > column):
                is_positive = positive_column[:, None] == columns[None, :]
                in_tile = (
                    (positive_column >= column)
                    & (positive_column < column + WIDE)
                    & (rows < row_end)
                )
                tl.store(
                    positive_logits + rows,
                    tl.sum(tl.where(is_positive, logits, 0.0), 1),
                    mask=in_tile,
                )
            row_log_sum = _log_add(row_log_sum, _log_sum(logits, 1))
            column_log_sum = _log_sum(logits, 0)
            # Only this program writes here: its running sums of the columns from the tiles above.
            pointers = column_sums + row_part.to(tl.int64) * column_count + columns
            if row > first_row:
                previous = tl.load(pointers, mask=columns < column_end, other=float("-inf"))
                column_log_sum = _log_add(column_log_sum, previous)
            tl.store(pointers, column_log_sum, mask=columns < column_end)
            tl.debug_barrier()
        pointers = row_sums + column_part.to(tl.int64) * row_count + rows
        tl.store(pointers, row_log_sum, mask=rows < row_end)


@triton.autotune(configs=_configs(), key=_KEY, prune_configs_by=_PRUNE)
@triton.jit
def _infonce_kernel(
    images, texts, scale, row_ids, column_ids, row_sums, column_sums, weights,
    row_count, column_count, first, gain, size_class,
    D: tl.constexpr, ROW_IDS: tl.constexpr, COLUMN_IDS: tl.constexpr, PRECISION: tl.constexpr,
    HIGH: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """Derivative of InfoNCE, times N, with respect to each logit of a tile."""
    rows = tl.program_id(0) * HIGH + tl.arange(0, HIGH)
    columns = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    logits = _logits(
        images, texts, scale, row_ids, column_ids, rows, columns,
        row_count, column_count, first, D, ROW_IDS, COLUMN_IDS, HIGH, WIDE, DEEP, PRECISION,
    )  # fmt: skip
    row_sum = tl.load(row_sums + rows, mask=rows < row_count, other=0.0)
    column_sum = tl.load(column_sums + columns, mask=columns < column_count, other=0.0)
    weight = tl.exp(logits - row_sum[:, None]) + tl.exp(logits - column_sum[None, :])
    is_positive = (rows + first)[:, None] == columns[None, :]
    weight = 0.5 * tl.where(is_positive, weight - 2.0, weight)
    pointers = weights + rows[:, None].to(tl.int64) * column_count + columns[None, :]
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    tl.store(pointers, (weight * gain).to(weights.dtype.element_ty), mask=inside)


# One partial sum per tile: clear those that a narrower configuration wrote during autotuning.
@triton.autotune(
    configs=_configs(), key=_KEY, prune_configs_by=_PRUNE, reset_to_zero=["losses", "slopes"]
)
@triton.jit
def _sigmoid_kernel(
    images, texts, scale, row_ids, column_ids, bias, losses, slopes, weights,
    row_count, column_count, first, gain, size_class,
    D: tl.constexpr, ROW_IDS: tl.constexpr, COLUMN_IDS: tl.constexpr, PRECISION: tl.constexpr,
    HIGH: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """Sigmoid loss of each row, the sum of its derivatives, and the derivative of each logit."""
    rows = tl.program_id(0) * HIGH + tl.arange(0, HIGH)
    columns = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    logits = _logits(
        images, texts, scale, row_ids, column_ids, rows, columns,
        row_count, column_count, first, D, ROW_IDS, COLUMN_IDS, HIGH, WIDE, DEEP, PRECISION,
    )  # fmt: skip
    logits += tl.load(bias)
    is_positive = (rows + first)[:, None] == columns[None, :]
    exp_minus_abs = tl.exp(-tl.abs(logits))
    # log(1 + x) by its series, where computing 1 + x would round x away.
    log1p_term = tl.where(
        exp_minus_abs < 1e-3,
        exp_minus_abs - 0.5 * exp_minus_abs * exp_minus_abs,
        tl.log(1.0 + exp_minus_abs),
    )
    signed_logits = tl.where(is_positive, -logits, logits)
    loss = tl.maximum(signed_logits, 0.0) + log1p_term
    sigmoid = tl.where(logits >= 0, 1.0, exp_minus_abs) / (1.0 + exp_minus_abs)
    one_minus_sigmoid = tl.where(logits >= 0, exp_minus_abs, 1.0) / (1.0 + exp_minus_abs)
    weight = tl.where(is_positive, -one_minus_sigmoid, sigmoid)
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    # A masked pair has the logit -inf, so exp(-inf) makes its contribution zero.
    loss = tl.where(inside & (logits > float("-inf")), loss, 0.0)
    weight = tl.where(inside, weight, 0.0)
    sums = tl.program_id(1).to(tl.int64) * row_count + rows
    tl.store(losses + sums, tl.sum(loss, 1), mask=rows < row_count)
    tl.store(slopes + sums, tl.sum(weight, 1), mask=rows < row_count)
    pointers = weights + rows[:, None].to(tl.int64) * column_count + columns[None, :]
    tl.store(pointers, (weight * gain).to(weights.dtype.element_ty), mask=inside)


def log_sum_exps(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """See `blocked.log_sum_exps`."""
    rows, columns = len(problem.image_BD), len(problem.text_ND)
    rows_each, columns_each = (
        TALLEST * -(-count // (PARTS * TALLEST)) for count in (rows, columns)
    )
    parts = (-(-columns // columns_each), -(-rows // rows_each))
    row_sums = problem.scale.new_empty((parts[0], rows), dtype=torch.float32)
    column_sums = problem.scale.new_empty((parts[1], columns), dtype=torch.float32)
    positive_logits = problem.scale.new_empty(rows, dtype=torch.float32)
    images, texts, ids = _operands(problem)
    with torch.cuda.device_of(images):
        _log_sum_exps_kernel[parts](
            images, texts, problem.scale, *ids, row_sums, column_sums, positive_logits,
            rows, columns, problem.first_column, rows_each, columns_each, _size_class(columns),
            **_constants(problem, ids),
        )  # fmt: skip
    return row_sums.logsumexp(0), column_sums.logsumexp(0), positive_logits


def infonce_gradients(
    problem: Problem,
    row_lse_B: Tensor,
    column_lse_N: Tensor,
    *,
    wants_image: bool,
    wants_text: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """See `blocked.infonce_gradients`."""
    images, texts, ids = _operands(problem)
    columns = len(texts)
    gradients = _Gradients(images, texts, wants_image, wants_text)
    with torch.cuda.device_of(images):
        for rows, weights in _slabs(images, columns):
            count = rows.stop - rows.start
            _infonce_kernel[_grid(count, columns)](
                images[rows], texts, problem.scale, ids[0][rows], ids[1],
                row_lse_B[rows].contiguous(), column_lse_N, weights,
                count, columns, problem.first_column + rows.start, gradients.gain,
                _size_class(columns),
                **_constants(problem, ids),
            )  # fmt: skip
            gradients.add(rows, weights)
    return gradients.result()


def sigmoid_pass(
    problem: Problem, bias: Tensor, *, wants_image: bool, wants_text: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """See `blocked.sigmoid_pass`."""
    images, texts, ids = _operands(problem)
    columns = len(texts)
    gradients = _Gradients(images, texts, wants_image, wants_text)
    loss, grad_bias = (torch.zeros((), dtype=torch.float64, device=images.device) for _ in range(2))
    narrowest = min(c.kwargs["WIDE"] for c in _configs())
    with torch.cuda.device_of(images):
        for rows, weights in _slabs(images, columns):
            count = rows.stop - rows.start
            # One sum per row and tile; wider tiles leave the remaining entries at zero.
            sums = problem.scale.new_zeros((2, -(-columns // narrowest), count))
            _sigmoid_kernel[_grid(count, columns)](
                images[rows], texts, problem.scale, ids[0][rows], ids[1], bias,
                sums[0], sums[1], weights,
                count, columns, problem.first_column + rows.start, gradients.gain,
                _size_class(columns),
                **_constants(problem, ids),
            )  # fmt: skip
            loss += sums[0].sum(dtype=torch.float64)
            grad_bias += sums[1].sum(dtype=torch.float64)
            gradients.add(rows, weights)
    return loss, grad_bias, *gradients.result()


class _Gradients:
    """Gradients of images, weights @ texts (B, D), and of texts, weights.T @ images (N, D)."""

    def __init__(self, images: Tensor, texts: Tensor, wants_image: bool, wants_text: bool) -> None:
        self.images, self.texts = images, texts
        self.gain = GAIN.get(images.dtype, 1.0)
        self.grad_image_BD = torch.empty_like(images, dtype=torch.float32) if wants_image else None
        self.grad_text_ND = torch.zeros_like(texts, dtype=torch.float32) if wants_text else None

    def add(self, rows: slice, weights_RN: Tensor) -> None:
        if self.grad_image_BD is not None:
            _add_product(self.grad_image_BD[rows].zero_(), weights_RN, self.texts)
        if self.grad_text_ND is not None:
            _add_product(self.grad_text_ND, weights_RN.T, self.images[rows])

    def result(self) -> tuple[Tensor | None, Tensor | None]:
        for matrix in (self.grad_image_BD, self.grad_text_ND):
            if matrix is not None and self.gain != 1:
                matrix.div_(self.gain)
        return self.grad_image_BD, self.grad_text_ND


def _add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    """Add a product to a float32 matrix, summing in float32 whatever the dtype of the factors."""
    if one.dtype == torch.float32:
        total.addmm_(one, other)
    elif total.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):
        torch.addmm(total, one, other, out_dtype=torch.float32, out=total)
    else:  # torch before 2.8, and the interpreter
        total.addmm_(one.float(), other.float())


def _operands(problem: Problem) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return the matrices and the ids (arbitrary tensors if there are none)."""
    images, texts = problem.image_BD, problem.text_ND
    if problem.image_ids_BL is None or problem.text_ids_NM is None:
        return images, texts, (images, texts)
    return images, texts, (_padded(problem.image_ids_BL, -1), _padded(problem.text_ids_NM, -2))


def _padded(ids_NL: Tensor, padding: int) -> Tensor:
    """Pad ids to a power-of-two width, so that few kernels are compiled and tuned."""
    width = ids_NL.shape[1]
    wider = (1 << (width - 1).bit_length()) - width
    return torch.nn.functional.pad(ids_NL, (0, wider), value=padding).contiguous()


def _constants(problem: Problem, ids: tuple[Tensor, Tensor]) -> dict[str, Any]:
    has_ids = problem.image_ids_BL is not None
    return {
        "D": problem.image_BD.shape[1],
        "ROW_IDS": ids[0].shape[1] if has_ids else 0,
        "COLUMN_IDS": ids[1].shape[1] if has_ids else 0,
        "PRECISION": "ieee" if problem.image_BD.dtype == torch.float32 else "tf32",
    }


def _slabs(images: Tensor, columns: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of rows and the buffer for their weights, (R, N)."""
    count = len(images)
    high = max(128, SLAB_BYTES // (columns * images.element_size()) // 128 * 128)
    memory = images.new_empty((min(high, count), columns))
    for start in range(0, count, high):
        rows = slice(start, min(start + high, count))
        yield rows, memory[: rows.stop - rows.start]


def _grid(rows: int, columns: int) -> Any:
    return lambda chosen: (triton.cdiv(rows, chosen["HIGH"]), triton.cdiv(columns, chosen["WIDE"]))


def _size_class(columns: int) -> int:
    """Group sizes within a factor of four, which share one tuning."""
    return columns.bit_length() // 2
