"""The networks of our own presets: a residual convolution tower and a small text transformer.

Shapes: B items, C channels, S side of an image, T tokens, W width of the text tower, D shared
dimensions.

Both are designed for what a CPU does well: few, wide 3x3 convolutions that use its fast kernels,
and a text tower that is cut to the longest caption of the batch.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmalign.model.encoder import Towers

if TYPE_CHECKING:
    from mmalign.model.presets import Preset

FIRST_TEMPERATURE = 0.07
# The fields of a preset that decide the vectors of each tower; dropout decides none.
FIELDS = {
    "image": ("image_size", "image_widths", "image_blocks", "stem_strides", "image_grid", "dim"),
    "text": (
        "text_width", "text_layers", "text_heads", "text_hidden", "vocabulary", "context", "dim",
    ),
}  # fmt: skip


class OwnTowers(Towers):
    """The towers of a preset."""

    any_size = True

    def __init__(self, preset: "Preset", vocabulary: int) -> None:
        super().__init__()
        self.image = ConvTower(preset)
        self.text = TextTower(preset, vocabulary)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / FIRST_TEMPERATURE)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))

    def image_features(self, images_B3SS: Tensor) -> Tensor:
        """See `Towers`."""
        return self.image(images_B3SS)  # type: ignore[no-any-return]

    def text_features(self, tokens_BT: Tensor) -> Tensor:
        """See `Towers`."""
        return self.text(tokens_BT)  # type: ignore[no-any-return]

    def architecture_of(self, modality: str, architecture: dict[str, Any]) -> dict[str, Any]:
        """See `Towers`."""
        return {k: v for k, v in architecture.items() if k in ("kind", *FIELDS[modality])}

    def weights_of(self, modality: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Towers`."""
        start = f"{modality}."
        own = {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
        if modality == "text" and not len(self.text.layers):
            del own["places"]  # a bag of words has no order
        return own


class ConvTower(nn.Module):
    """A small residual network: a strided stem, then one stage per width."""

    def __init__(self, preset: "Preset") -> None:
        super().__init__()
        widths = preset.image_widths
        layers: list[nn.Module] = []
        inside = 3
        for stride_index in range(preset.stem_strides):
            last = stride_index == preset.stem_strides - 1
            outside = widths[0] if last else widths[0] // 2
            layers += [*_conv(inside, outside, stride=2), nn.ReLU(inplace=True)]
            inside = outside
        total, number = sum(preset.image_blocks), 0
        for stage, (width, blocks) in enumerate(zip(widths, preset.image_blocks, strict=True)):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                drop = preset.drop_path * number / max(1, total - 1)
                layers.append(_Residual(inside, width, stride, drop))
                inside, number = width, number + 1
        self.stages = nn.Sequential(*layers)
        self.grid = preset.image_grid
        self.dropout = nn.Dropout(preset.dropout / 2)
        self.head = nn.Linear(inside * max(1, self.grid) ** 2, preset.dim, bias=False)

    def forward(self, images_B3SS: Tensor) -> Tensor:
        """Return features (B, D)."""
        maps = self.stages(images_B3SS)
        if self.grid:
            # Pooled to a coarse grid and flattened, which preserves position.
            features = F.adaptive_avg_pool2d(maps, self.grid).flatten(1)
        else:
            features = maps.mean(dim=(2, 3))
        return self.head(self.dropout(features))  # type: ignore[no-any-return]


class _Residual(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int, drop: float) -> None:
        super().__init__()
        self.drop = drop
        self.branch = nn.Sequential(
            *_conv(inside, outside, stride=stride), nn.ReLU(inplace=True), *_conv(outside, outside)
        )
        # Starts as the identity, so that a deep tower trains from the first step.
        nn.init.zeros_(self.branch[-1].weight)  # type: ignore[arg-type]
        shortcut: list[nn.Module] = [nn.AvgPool2d(2, ceil_mode=True)] if stride == 2 else []
        if inside != outside:
            shortcut += _conv(inside, outside, side=1)
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, maps: Tensor) -> Tensor:
        branch = self.branch(maps)
        if self.training and self.drop:
            kept = torch.rand(len(maps), 1, 1, 1, device=maps.device) >= self.drop
            branch = branch * (kept / (1 - self.drop)).to(branch.dtype)
        return F.relu(branch + self.shortcut(maps), inplace=True)


def _conv(inside: int, outside: int, *, side: int = 3, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inside, outside, side, stride, side // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outside)]


class TextTower(nn.Module):
    """Token embeddings, pre-norm transformer layers, mean over the tokens, a head.

    Without layers it is a bag of words, which is the best choice for a short CPU budget on captions
    whose word order carries little information.
    """

    def __init__(self, preset: "Preset", vocabulary: int) -> None:
        super().__init__()
        width = preset.text_width
        self.words = nn.Embedding(vocabulary, width, padding_idx=0)
        nn.init.normal_(self.words.weight, std=0.02)
        self.places = nn.Parameter(torch.randn(preset.context, width) * 0.01)
        self.layers = nn.ModuleList(
            _Layer(width, preset.text_heads, preset.dropout) for _ in range(preset.text_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(preset.dropout)
        self.word_dropout = preset.word_dropout
        hidden = preset.text_hidden
        self.head = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Dropout(preset.dropout),
            nn.Linear(hidden, preset.dim, bias=False),
        )

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return features (B, D) of token ids padded with 0."""
        real_BT = tokens_BT != 0
        if self.training and self.word_dropout:
            hidden_BT = torch.rand(tokens_BT.shape, device=tokens_BT.device) < self.word_dropout
            real_BT = real_BT & ~hidden_BT
        # A text without tokens attends to its first pad, so that no softmax is over an empty set.
        real_BT[:, 0] = True
        states_BTW = self.words(tokens_BT)
        if len(self.layers):
            states_BTW = self.dropout(states_BTW + self.places[: tokens_BT.shape[1]])
        for layer in self.layers:
            states_BTW = layer(states_BTW, real_BT)
        weight_BT1 = real_BT[:, :, None].to(states_BTW.dtype)
        mean_BW = (states_BTW * weight_BT1).sum(1) / weight_BT1.sum(1)
        return self.head(self.dropout(self.norm(mean_BW)))  # type: ignore[no-any-return]


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, states_BTW: Tensor, real_BT: Tensor) -> Tensor:
        count, tokens, width = states_BTW.shape
        qkv = self.qkv(self.norm_1(states_BTW)).view(count, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=real_BT[:, None, None, :])
        mixed = mixed.transpose(1, 2).reshape(count, tokens, width)
        states_BTW = states_BTW + self.dropout(self.out(mixed))
        return states_BTW + self.dropout(  # type: ignore[no-any-return]
            self.mlp(self.norm_2(states_BTW))
        )
