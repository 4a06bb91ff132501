"""Linear layers in eight bits, for encoding on a CPU with VNNI or AMX.

R rows (tokens of all items), W width of the input, O width of the output, B items, T tokens.

Weights are rounded once, with a step for each output; activations as they come, with a step for
each token, so that one token with large numbers does not coarsen the others. Sums are whole
numbers; what is between the layers stays float32. Convolutions, norms and softmax are untouched.

Source: Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale"
(its vector-wise quantization).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS, ZERO = 127, 128
# Below so many weights, rounding costs more than it saves.
WORTH = 1 << 16


def available() -> bool:
    """Say whether this build of torch can multiply bytes."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")


def quantize(module: nn.Module) -> nn.Module:
    """Replace the linear layers of a network that is only used to encode; it is changed in place.

    PyTorch's own attention hides two of its layers; it is replaced by one that shows them.
    """
    for name, child in list(module.named_children()):
        if isinstance(child, nn.MultiheadAttention) and _is_plain(child):
            setattr(module, name, quantize(Attention(child)))
        elif isinstance(child, nn.Linear) and child.weight.numel() >= WORTH:
            setattr(module, name, Linear8(child))
        else:
            quantize(child)
    return module


def _is_plain(attention: nn.MultiheadAttention) -> bool:
    return attention.in_proj_weight is not None and attention.bias_k is None


class Linear8(nn.Module):
    """A linear layer with weights and inputs in eight bits; final."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight_OW = layer.weight.detach().float()
        self.width = len(weight_OW)
        step_O = (weight_OW.abs().amax(dim=1) / LEVELS).clamp(min=1e-30)
        steps_OW = (weight_OW / step_O[:, None]).round_().to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(steps_OW, None)
        self.step_O = step_O
        self.zero_O = torch.zeros(self.width, dtype=torch.int32)
        # Inputs are moved up by ZERO to be unsigned; what that adds to every sum is taken off here.
        self.moved_O = -ZERO * step_O * steps_OW.sum(dim=1)
        self.bias_O = torch.zeros(self.width) if layer.bias is None else layer.bias.detach().float()

    def forward(self, states: Tensor) -> Tensor:
        """Map (..., W) to (..., O), float32."""
        states_RW = states.reshape(-1, states.shape[-1])
        step_R1 = states_RW.abs().amax(dim=1, keepdim=True).div_(LEVELS).clamp_(min=1e-30)
        bytes_RW = (states_RW / step_R1).round_().add_(ZERO).to(torch.uint8)
        sums_RO: Tensor = torch.ops.onednn.qlinear_pointwise(
            bytes_RW, 1.0, 0, self.packed, self.step_O, self.zero_O,
            self.moved_O, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        sums_RO.mul_(step_R1).add_(self.bias_O)
        return sums_RO.view(*states.shape[:-1], self.width)


class Attention(nn.Module):
    """`nn.MultiheadAttention` of a state with itself, its layers in the open; final."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads, self.batch_first = attention.num_heads, attention.batch_first
        width = attention.embed_dim
        self.qkv = nn.Linear(width, 3 * width)
        self.qkv.weight = nn.Parameter(attention.in_proj_weight.detach())
        self.qkv.bias = nn.Parameter(attention.in_proj_bias.detach())
        self.out = attention.out_proj

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Take the arguments of `nn.MultiheadAttention`; key and value must be the query."""
        if key is not query or value is not query or need_weights:
            raise ValueError("only attention of a state with itself, without weights")
        states_BTW = query if self.batch_first else query.transpose(0, 1)
        items, tokens, width = states_BTW.shape
        qkv = self.qkv(states_BTW).view(items, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        out = self.out(mixed.transpose(1, 2).reshape(items, tokens, width))
        return (out if self.batch_first else out.transpose(0, 1)), None
