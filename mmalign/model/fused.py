"""Fused transformer layers for encoding on a CPU, with the results of the layers they replace.

Shapes: B items, T tokens, W width of the states, H heads, K width of a head, S side of an image in
pixels, P side of a patch, R patches of all images, F values of a patch, O width of the output.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmalign.model.int8 import Linear8

# Up to this many tokens, the attention weights of a head fit into the cache of a core, and in
# bfloat16 it is faster to compute them by a plain matrix product than to call the fused kernel of
# torch, which never stores them. For 50 tokens and 12 heads, in ms per image and layer: bfloat16
# 0.15 plain, 0.27 fused; float32 0.29 plain, 0.21 fused.
MAX_MATERIALIZED_TOKENS = 128
# A typical number of rows, for which the layout of packed weights is chosen; any number works.
TYPICAL_ROWS = 800
# Subtracted from pixels (0 to 255): they then lie in -128 to 127, which bfloat16 and int8 represent
# exactly.
MIDDLE = 128


def replace_attention(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace PyTorch's attention, in place, by one whose layers are separate modules.

    Args:
        module: A network that is only used to encode.
        dtype: The dtype in which queries, keys and values are multiplied.
    """
    for name, child in list(module.named_children()):
        if isinstance(child, nn.MultiheadAttention) and _is_plain(child):
            setattr(module, name, Attention(child, dtype))
        else:
            replace_attention(child, dtype)


def pack(module: nn.Module) -> None:
    """Lay out bfloat16 weights for oneDNN, in place, in a network that is only used to encode.

    Only oneDNN can read packed weights. So a layer is packed only if the module that contains it is
    known to call it; some attentions of timm read the weights of their layers instead.
    """
    for owner in list(module.modules()):
        if isinstance(owner, (nn.Sequential, Attention, Patches)):
            for name, layer in list(owner.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(owner, name, PackedLinear(layer))


class PackedLinear(nn.Module):
    """A linear layer whose weights are laid out for the matrix product of oneDNN.

    `nn.Linear` reorders them at each call. For bfloat16 on a CPU that supports it natively.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), TYPICAL_ROWS)
        self.bias = None if layer.bias is None else layer.bias.detach()

    def forward(self, states: Tensor) -> Tensor:
        """Map (..., W) to (..., O)."""
        linear = torch.ops.mkldnn._linear_pointwise
        return linear(states, self.weight, self.bias, "none", [], "")  # type: ignore[no-any-return]


def _is_plain(attention: nn.MultiheadAttention) -> bool:
    return attention.in_proj_weight is not None and attention.bias_k is None


class Attention(nn.Module):
    """`nn.MultiheadAttention` with its layers as separate modules; `value` must be `key`."""

    def __init__(self, attention: nn.MultiheadAttention, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.batch_first = attention.num_heads, attention.batch_first
        self.dtype = dtype
        width = attention.embed_dim
        # The query weights include the scale of the products of queries and keys.
        scale = torch.ones(3 * width, 1)
        scale[:width] = (width // self.heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.qkv.weight = nn.Parameter(attention.in_proj_weight.detach() * scale)
        self.qkv.bias = nn.Parameter(attention.in_proj_bias.detach() * scale[:, 0])
        self.out = attention.out_proj

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None, need_weights: bool = False,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Take the arguments of `nn.MultiheadAttention`.

        Args:
            query: States that attend.
            key: States attended to.
            value: Must be the same tensor as `key`.
            attn_mask: Added to the products of queries and keys, (T, T).
            key_padding_mask: True for keys to ignore, (B, T).
            need_weights: Must be False.
        """
        if value is not key or need_weights:
            raise ValueError(
                "unsupported attention: value must be key, and need_weights must be False"
            )
        is_self_attention = query is key
        if not self.batch_first:
            query, key = query.transpose(0, 1), key.transpose(0, 1)
        q, k, v = self._qkv_by_head(key)
        if not is_self_attention:
            q = self._qkv_by_head(query)[0]
        mask = None if attn_mask is None else attn_mask.to(self.dtype)
        if key_padding_mask is not None:
            zeros = torch.zeros(key_padding_mask.shape, dtype=self.dtype)
            mask = zeros.masked_fill_(key_padding_mask, -torch.inf)[:, None, None, :]
        attended = _attend(q, k, v, mask).transpose(1, 2).reshape(query.shape)
        out = self.out(attended.to(query.dtype))
        return (out if self.batch_first else out.transpose(0, 1)), None

    def _qkv_by_head(self, states_BTW: Tensor) -> Tensor:
        items, tokens, width = states_BTW.shape
        qkv: Tensor = self.qkv(states_BTW).to(self.dtype)
        by_head = qkv.view(items, tokens, 3, self.heads, width // self.heads)
        return by_head.permute(2, 0, 3, 1, 4)


def _attend(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, mask: Tensor | None) -> Tensor:
    """Compute attention with queries that are already scaled."""
    if k_BHTK.shape[2] > MAX_MATERIALIZED_TOKENS or k_BHTK.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, attn_mask=mask, scale=1.0)
    logits_BHTT = q_BHTK @ k_BHTK.transpose(-1, -2)
    if mask is not None:
        logits_BHTT = logits_BHTT + mask
    # A softmax in float32 is more accurate than one in bfloat16, and torch computes it faster.
    return logits_BHTT.softmax(-1, dtype=torch.float32).to(v_BHTK.dtype) @ v_BHTK


class Patches(nn.Module):
    """A convolution with non-overlapping patches, as one linear layer over raw pixels.

    Pixel normalisation is part of its weights: w (p / 255 - mean) / std is linear in p.
    """

    def __init__(
        self, convolution: nn.Conv2d, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        weight_OPP3 = convolution.weight.detach().float().permute(0, 2, 3, 1)
        self.side = weight_OPP3.shape[1]
        spread_3, mean_3 = torch.tensor(std), torch.tensor(mean)
        bias_O = (weight_OPP3 * ((MIDDLE / 255 - mean_3) / spread_3)).sum(dim=(1, 2, 3))
        if convolution.bias is not None:
            bias_O += convolution.bias.detach()
        linear = nn.Linear(3 * self.side**2, len(bias_O))
        linear.weight = nn.Parameter((weight_OPP3 / (255 * spread_3)).flatten(1))
        linear.bias = nn.Parameter(bias_O)
        self.linear: nn.Linear | PackedLinear | Linear8 = linear

    @staticmethod
    def fits(layer: object) -> bool:
        """Return whether a layer is such a convolution over colour images."""
        return (
            isinstance(layer, nn.Conv2d)
            and layer.in_channels == 3
            and layer.groups == 1
            and layer.kernel_size == layer.stride
            and layer.kernel_size[0] == layer.kernel_size[1]
            and layer.padding in ((0, 0), "valid")
            and layer.dilation == (1, 1)
        )

    def forward(self, pixels_B3SS: Tensor) -> Tensor:
        """Map pixels (B, 3, S, S) uint8 to (B, O, S / P, S / P), as the convolution does."""
        across = pixels_B3SS.shape[-1] // self.side
        whole = across * self.side
        bytes_BSS3 = pixels_B3SS.permute(0, 2, 3, 1)[:, :whole, :whole]
        grid = bytes_BSS3.unflatten(2, (across, self.side)).unflatten(1, (across, self.side))
        patches_RF = grid.transpose(2, 3).reshape(-1, 3 * self.side**2)
        if isinstance(self.linear, Linear8):
            maps_RO = self.linear.of_bytes(patches_RF)
        else:
            maps_RO = self.linear(patches_RF.to(self.linear.bias.dtype).sub_(MIDDLE))
        return maps_RO.view(-1, across, across, maps_RO.shape[1]).permute(0, 3, 1, 2)
