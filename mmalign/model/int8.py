"""Linear layers in int8, for encoding on a CPU; this is faster with VNNI or AMX.

R rows (tokens of all items), W width of the input, O width of the output, B items, T tokens.

Weights are quantized once, with a scale per output; activations dynamically, with a scale per
token, so that one token with large values does not coarsen the others. Sums are exact integers;
everything between the layers stays float32. Convolutions, norms and softmax are unchanged.
A processor without VNNI adds pairs of products in 16 bits. There weights have seven bits, as
2 * 255 * 63 fits and 2 * 255 * 127 does not: it would saturate without an error.

Source: Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale"
(its vector-wise quantization).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmalign.kernels.int8 import PackedRows, quantize_rows
from mmalign.kernels.processor import has_vnni

LEVELS, NARROW_LEVELS, ZERO = 127, 63, 128
# With fewer weights than this, quantization costs more than it saves.
WORTH = 1 << 16


def weight_levels() -> int:
    """Return the largest quantized weight whose sums do not overflow on this processor."""
    return LEVELS if has_vnni() else NARROW_LEVELS


def quantize(network: nn.Module, encode: Callable[[], object]) -> None:
    """Replace the large linear layers of a network that is only used to encode, in place.

    Some modules read the weights of their layers and never call these, so int8 layers do not work
    there. One run of the network with its original layers shows which ones do so.

    Args:
        network: The network to change.
        encode: Runs all parts of the network.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    plain = [layer for layer in layers if type(layer).forward is nn.Linear.forward]
    with _watched(plain) as watched:
        encode()
        called = {id(layer) for layer in watched if layer.calls == layer.reads > 0}
    for owner in list(network.modules()):
        for name, layer in list(owner.named_children()):
            # open_clip checks the class of its last text layer.
            if not isinstance(layer, nn.Linear) or name == "text_projection":
                continue
            if id(layer) in called and layer.weight.numel() >= WORTH:
                setattr(owner, name, Linear8(layer))


@contextmanager
def _watched(layers: list[nn.Linear]) -> Iterator[list["_Watched"]]:
    """Make layers count their calls and reads of their weights."""
    kinds = [type(layer) for layer in layers]
    try:
        for layer in layers:
            layer.__dict__.update(calls=0, reads=0)
            layer.__class__ = _Watched
        yield cast("list[_Watched]", layers)
    finally:
        for layer, kind in zip(layers, kinds, strict=True):
            layer.__class__ = kind
            del layer.__dict__["calls"], layer.__dict__["reads"]


class _Watched(nn.Linear):
    """A linear layer that counts its calls and the reads of its weights; final."""

    calls: int
    reads: int
    # Some of open_clip's layers check the dtype of weights, unless this attribute exists.
    int8_original_dtype = torch.float32

    def forward(self, states: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(states)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            self.reads += 1
        return super().__getattr__(name)


class Linear8(nn.Module):
    """A linear layer with weights and inputs in int8; final."""

    int8_original_dtype = torch.float32
    """The attribute where open_clip finds the input dtype of a layer without float weights."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight_OW = layer.weight.detach().float()
        self.width = len(weight_OW)
        steps_OW, step_O = quantize_rows(weight_OW, weight_levels())
        self.rows = PackedRows(steps_OW, step_O)
        # Inputs are shifted by ZERO to be unsigned; this subtracts what that adds to every sum.
        self.moved_O = -ZERO * step_O * steps_OW.sum(dim=1)
        self.bias_O = torch.zeros(self.width) if layer.bias is None else layer.bias.detach().float()

    def forward(self, states: Tensor) -> Tensor:
        """Map (..., W) to (..., O), float32."""
        states_RW = states.reshape(-1, states.shape[-1])
        # Two reductions, without a copy of the absolute values.
        least_R1, most_R1 = (f(states_RW, 1, keepdim=True) for f in (torch.amin, torch.amax))
        step_R1 = torch.maximum(most_R1, -least_R1).float().div_(LEVELS).clamp_(min=1e-30)
        # torch converts floats to signed bytes nine times as fast as to unsigned ones; flipping the
        # highest bit then adds 128.
        signed_RW = (states_RW * step_R1.reciprocal()).round_().to(torch.int8)
        sums_RO = self.rows.products(
            signed_RW.view(torch.uint8).bitwise_xor_(ZERO), bias_O=self.moved_O
        )
        torch.addcmul(self.bias_O, sums_RO, step_R1, out=sums_RO)
        return sums_RO.view(*states.shape[:-1], self.width)

    def of_bytes(self, bytes_RW: Tensor) -> Tensor:
        """Map bytes, each standing for its value minus 128, to (R, O) float32; inputs are exact."""
        return self.rows.products(bytes_RW, bias_O=self.moved_O).add_(self.bias_O)
