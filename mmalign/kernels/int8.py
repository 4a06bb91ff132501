"""Products of bytes with a matrix quantized row by row, by oneDNN on a CPU; sums are exact.

R rows of bytes, O rows of the matrix, W width of both.
"""

import torch
from torch import Tensor


def quantize_rows(matrix_OW: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Round each row to whole steps from -levels to levels.

    Returns:
        The steps (O, W), as floats, and the size of a step in each row (O,).
    """
    step_O = (matrix_OW.abs().amax(dim=1) / levels).clamp(min=1e-30)
    return (matrix_OW / step_O[:, None]).round_(), step_O


class PackedRows:
    """A quantized matrix in the memory layout of oneDNN; final."""

    def __init__(self, steps_OW: Tensor, step_O: Tensor) -> None:
        """Pack what `quantize_rows` returned."""
        self.packed = torch.ops.onednn.qlinear_prepack(steps_OW.to(torch.int8), None)
        self.step_O = step_O
        self.zero_O = torch.zeros(len(step_O), dtype=torch.int32)

    def products(self, bytes_RW: Tensor, zero: int = 0, bias_O: Tensor | None = None) -> Tensor:
        """Return float32 (R, O): the products of the bytes, less `zero`, plus a bias."""
        products_RO: Tensor = torch.ops.onednn.qlinear_pointwise(
            bytes_RW, 1.0, zero, self.packed, self.step_O, self.zero_O,
            bias_O, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return products_RO
