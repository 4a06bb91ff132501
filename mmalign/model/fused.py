"""Fused transformer layers for encoding on a CPU; their results are the same.

Shapes: B items, T tokens, W width, H heads, S side of an image in pixels, P side of a patch, R rows
(patches of all images), O width of the output.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmalign.model.int8 import Linear8

# Up to SHORT tokens, all attention weights of a head fit a core's cache, and plain bfloat16
# products are faster than the kernel that never stores them: 0.15 ms per image and layer (50
# tokens, 12 heads) instead of 0.27. In float32 they are not (0.29 and 0.21).
SHORT = 128
# A typical number of rows, for which the layout of packed weights is chosen; any number works.
ROWS = 800
# Middle of the pixel range: after subtracting it, pixels are exact in bfloat16 and int8.
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

    Only layers whose owner is known just to call them: some attentions of timm pass on the weights
    of their layers, and packed weights cannot be read by other code.
    """
    for owner in list(module.modules()):
        if isinstance(owner, (nn.Sequential, Attention, Patches)):
            for name, layer in list(owner.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(owner, name, PackedLinear(layer))


class PackedLinear(nn.Module):
    """A linear layer whose weights are laid out for oneDNN's product.

    `nn.Linear` reorders them at each call. For bfloat16 on a CPU that supports it natively.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), ROWS)
        self.bias = None if layer.bias is None else layer.bias.detach()

    def forward(self, states: Tensor) -> Tensor:
        """Map (..., W) to (..., O)."""
        product = torch.ops.mkldnn._linear_pointwise
        return product(states, self.weight, self.bias, "none", [], "")  # type: ignore[no-any-return]


def _is_plain(attention: nn.MultiheadAttention) -> bool:
    return attention.in_proj_weight is not None and attention.bias_k is None


class Attention(nn.Module):
    """`nn.MultiheadAttention` as self-attention, with its layers as separate modules."""

    def __init__(self, attention: nn.MultiheadAttention, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.batch_first = attention.num_heads, attention.batch_first
        self.dtype = dtype
        width = attention.embed_dim
        # The scale of the attention products is folded into the query weights.
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
        """Take the arguments of `nn.MultiheadAttention`; the value must be the key.

        Args:
            query: States that attend.
            key: States attended to.
            value: The same as key.
            attn_mask: Added to every product, (T, T).
            key_padding_mask: True for keys to ignore, (B, T).
            need_weights: Must not be requested.
        """
        if value is not key or need_weights:
            raise ValueError(
                "unsupported attention: values must be the keys, and no weights be returned"
            )
        alike = query is key
        if not self.batch_first:
            query, key = query.transpose(0, 1), key.transpose(0, 1)
        q, k, v = self._heads(key)
        if not alike:
            q = self._heads(query)[0]
        mask = None if attn_mask is None else attn_mask.to(self.dtype)
        if key_padding_mask is not None:
            shut = torch.zeros(key_padding_mask.shape, dtype=self.dtype)
            mask = shut.masked_fill_(key_padding_mask, -torch.inf)[:, None, None, :]
        mixed = _mix(q, k, v, mask).transpose(1, 2).reshape(query.shape)
        out = self.out(mixed.to(query.dtype))
        return (out if self.batch_first else out.transpose(0, 1)), None

    def _heads(self, states_BTW: Tensor) -> Tensor:
        items, tokens, width = states_BTW.shape
        qkv: Tensor = self.qkv(states_BTW).to(self.dtype)
        each = qkv.view(items, tokens, 3, self.heads, width // self.heads)
        return each.permute(2, 0, 3, 1, 4)


def _mix(q_BHTW: Tensor, k_BHTW: Tensor, v_BHTW: Tensor, mask: Tensor | None) -> Tensor:
    """Compute attention with queries that are already scaled."""
    if k_BHTW.shape[2] > SHORT or k_BHTW.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q_BHTW, k_BHTW, v_BHTW, attn_mask=mask, scale=1.0)
    products_BHTT = q_BHTW @ k_BHTW.transpose(-1, -2)
    if mask is not None:
        products_BHTT = products_BHTT + mask
    # Summed in float32, which torch also does faster than a softmax in bfloat16.
    return products_BHTT.softmax(-1, dtype=torch.float32).to(v_BHTW.dtype) @ v_BHTW


class Patches(nn.Module):
    """A convolution with non-overlapping patches, as one product over raw pixels.

    Pixel normalisation is folded into its weights: w (p / 255 - mean) / std is linear in p.
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
        product = nn.Linear(3 * self.side**2, len(bias_O))
        product.weight = nn.Parameter((weight_OPP3 / (255 * spread_3)).flatten(1))
        product.bias = nn.Parameter(bias_O)
        self.product: nn.Linear | PackedLinear | Linear8 = product

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
        rows_RW = grid.transpose(2, 3).reshape(-1, 3 * self.side**2)
        if isinstance(self.product, Linear8):
            maps_RO = self.product.of_bytes(rows_RW)
        else:
            maps_RO = self.product(rows_RW.to(self.product.bias.dtype).sub_(MIDDLE))
        return maps_RO.view(-1, across, across, maps_RO.shape[1]).permute(0, 3, 1, 2)
