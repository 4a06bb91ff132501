"""The networks of CLIP: a vision transformer and a text transformer, with the weights of open_clip.

Parts and weights have open_clip's names, so that its checkpoints fit. Only the token that stands
for an item leaves the last block: of twelve blocks, that saves five sixths of the work of one.

Shapes: B items, T tokens, W width of a tower, S side of an image, D shared dimensions.

Sources: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language
Supervision"; Dosovitskiy et al. 2020, "An Image is Worth 16x16 Words".
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Settings that decide no vector: of training, of the tokenizer, of networks of other libraries.
IGNORED = {
    "hf_model_pretrained", "hf_tokenizer_name", "pad_id", "timm_drop", "timm_drop_path",
    "timm_model_pretrained", "tokenizer_kwargs", "tokenizer_mode",
}  # fmt: skip
SHARED = {"act_kwargs", "layers", "ls_init_value", "mlp_ratio", "norm_kwargs", "pool_type", "width"}
VISION = SHARED | {
    "final_ln_after_pool", "head_width", "image_size", "no_ln_pre", "patch_size",
}  # fmt: skip
TEXT = SHARED | {
    "context_length", "eos_id", "heads", "no_causal_mask", "proj_bias", "proj_type", "vocab_size",
}  # fmt: skip


class QuickGELU(nn.Module):
    """The activation of OpenAI's models."""

    def forward(self, states: Tensor) -> Tensor:
        """Map each value x to x sigmoid(1.702 x)."""
        return states * torch.sigmoid(1.702 * states)


class LayerScale(nn.Module):
    """A factor for each channel."""

    def __init__(self, width: int, first: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), first))

    def forward(self, states: Tensor) -> Tensor:
        """Scale (..., W)."""
        return states * self.gamma


class Attention(nn.MultiheadAttention):
    """Attention with the weights of torch's module, computed by fewer and faster steps.

    Masks of torch's module import its symbolic shapes, which takes as long as half an answer.
    """

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None, need_weights: bool = False,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Attend from `query` (B, R, W) to `key` (B, T, W); arguments as in `fused.Attention`."""
        width, heads = self.embed_dim, self.num_heads
        if query is key:
            q, k, v = F.linear(key, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            q = F.linear(query, self.in_proj_weight[:width], self.in_proj_bias[:width])
            rest = F.linear(key, self.in_proj_weight[width:], self.in_proj_bias[width:])
            k, v = rest.chunk(2, dim=-1)
        mask = attn_mask if key_padding_mask is None else ~key_padding_mask[:, None, None]
        q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), None


class Block(nn.Module):
    """A pre-norm transformer block: attention, then a network of two layers."""

    def __init__(self, width: int, heads: int, config: Mapping[str, Any], *, quick: bool) -> None:
        super().__init__()
        hidden = int(width * config.get("mlp_ratio", 4.0))
        first, activation = config.get("ls_init_value"), config.get("act_kwargs") or {}
        self.ln_1, self.ln_2 = _norm(width, config), _norm(width, config)
        self.attn = Attention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, hidden),
                gelu=QuickGELU() if quick else nn.GELU(**activation),
                c_proj=nn.Linear(hidden, width),
            )
        )
        self.ls_1, self.ls_2 = (
            nn.Identity() if first is None else LayerScale(width, first) for _ in range(2)
        )

    def forward(self, states_BTW: Tensor, mask_TT: Tensor | None) -> Tensor:
        """Return the states (B, T, W) of all tokens."""
        seen_BTW = self.ln_1(states_BTW)
        mixed_BTW, _ = self.attn(
            seen_BTW, seen_BTW, seen_BTW, need_weights=False, attn_mask=mask_TT
        )
        states_BTW = states_BTW + self.ls_1(mixed_BTW)
        return states_BTW + self.ls_2(self.mlp(self.ln_2(states_BTW)))  # type: ignore[no-any-return]

    def of_one(self, states_BTW: Tensor, place_B: Tensor, mask_TT: Tensor | None) -> Tensor:
        """Return the states (B, W) of one token of each item."""
        rows_B = torch.arange(len(states_BTW), device=states_BTW.device)
        seen_BTW = self.ln_1(states_BTW)
        hidden_BT = None if mask_TT is None else mask_TT[place_B] < 0
        mixed_B1W, _ = self.attn(
            seen_BTW[rows_B, place_B][:, None], seen_BTW, seen_BTW,
            need_weights=False, key_padding_mask=hidden_BT,
        )  # fmt: skip
        one_BW = states_BTW[rows_B, place_B] + self.ls_1(mixed_B1W[:, 0])
        return one_BW + self.ls_2(self.mlp(self.ln_2(one_BW)))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Blocks, one after the other."""

    def __init__(self, width: int, heads: int, config: Mapping[str, Any], *, quick: bool) -> None:
        super().__init__()
        layers = range(config.get("layers", 12))
        self.resblocks = nn.ModuleList(Block(width, heads, config, quick=quick) for _ in layers)

    def forward(
        self, states_BTW: Tensor, place_B: Tensor | None = None, mask_TT: Tensor | None = None
    ) -> Tensor:
        """Return the states (B, W) of one token of each item; without a place, all (B, T, W)."""
        *blocks, last = self.resblocks
        for block in blocks:
            states_BTW = block(states_BTW, mask_TT)
        if place_B is None:
            return last(states_BTW, mask_TT)  # type: ignore[no-any-return]
        return last.of_one(states_BTW, place_B, mask_TT)  # type: ignore[no-any-return,operator]


class VisionTower(nn.Module):
    """A vision transformer; its image is the first token, or the mean of the others."""

    def __init__(self, config: Mapping[str, Any], dim: int, *, quick: bool) -> None:
        super().__init__()
        width, side = config.get("width", 768), config.get("patch_size", 16)
        places = (config.get("image_size", 224) // side) ** 2 + 1
        self.conv1 = nn.Conv2d(3, width, side, side, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(places, width))
        self.ln_pre = nn.Identity() if config.get("no_ln_pre") else _norm(width, config)
        heads = width // config.get("head_width", 64)
        self.transformer = Transformer(width, heads, config, quick=quick)
        self.ln_post = _norm(width, config)
        self.proj = nn.Parameter(torch.zeros(width, dim))
        self.means = config.get("pool_type", "tok") == "avg"
        self.norm_last = bool(config.get("final_ln_after_pool"))

    @staticmethod
    def fits(config: Mapping[str, Any]) -> bool:
        """Return whether open_clip's vision_cfg describes such a tower."""
        return (
            _known(config, VISION)
            and isinstance(config.get("layers", 12), int)
            and isinstance(config.get("image_size", 224), int)
            and isinstance(config.get("patch_size", 16), int)
            and config.get("pool_type", "tok") in ("tok", "avg")
        )

    def forward(self, images_B3SS: Tensor) -> Tensor:
        """Return features (B, D)."""
        patches_BTW = self.conv1(images_B3SS).flatten(2).transpose(1, 2)
        first_B1W = self.class_embedding.to(patches_BTW.dtype).expand(len(patches_BTW), 1, -1)
        states_BTW = torch.cat([first_B1W, patches_BTW], dim=1)
        states_BTW = self.ln_pre(states_BTW + self.positional_embedding.to(states_BTW.dtype))
        if not self.means:
            first_B = torch.zeros(len(states_BTW), dtype=torch.long, device=states_BTW.device)
            pooled_BW = self.ln_post(self.transformer(states_BTW, first_B))
        elif self.norm_last:
            pooled_BW = self.ln_post(self.transformer(states_BTW)[:, 1:].mean(dim=1))
        else:
            pooled_BW = self.ln_post(self.transformer(states_BTW))[:, 1:].mean(dim=1)
        return pooled_BW @ self.proj  # type: ignore[no-any-return]


class TextTower(nn.Module):
    """A text transformer; its text is one of its tokens."""

    def __init__(self, config: Mapping[str, Any], dim: int, *, quick: bool) -> None:
        super().__init__()
        width = config.get("width", 512)
        # Drawing weights without memory would import torch's compiler, which takes over a second.
        self.token_embedding = nn.Embedding.from_pretrained(
            torch.empty(config.get("vocab_size", 49408), width), freeze=False
        )
        self.positional_embedding = nn.Parameter(
            torch.zeros(config.get("context_length", 77), width)
        )
        self.transformer = Transformer(width, config.get("heads", 8), config, quick=quick)
        self.ln_final = _norm(width, config)
        self.text_projection: nn.Parameter | nn.Linear | None = None
        if config.get("proj_type", "linear") == "linear":
            self.text_projection = (
                nn.Linear(width, dim)
                if config.get("proj_bias")
                else nn.Parameter(torch.zeros(width, dim))
            )
        self.pool_type = config.get("pool_type", "argmax")
        self.end_id = config.get("eos_id", 2)
        self.is_causal = not config.get("no_causal_mask")

    @staticmethod
    def fits(config: Mapping[str, Any]) -> bool:
        """Return whether open_clip's text_cfg describes such a tower."""
        return (
            _known(config, TEXT)
            and config.get("pool_type", "argmax") in ("argmax", "eos", "first", "last")
            and config.get("proj_type", "linear") in ("linear", "none")
        )

    @property
    def cuts_texts(self) -> bool:
        """Return whether padding can be left out: no token sees it, and none of it is the text."""
        return self.is_causal and self.pool_type in ("argmax", "eos")

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return features (B, D)."""
        tokens = tokens_BT.shape[1]
        states_BTW = self.token_embedding(tokens_BT) + self.positional_embedding[:tokens]
        mask_TT = None
        if self.is_causal:
            mask_TT = states_BTW.new_full((tokens, tokens), -torch.inf).triu(1)
        pooled_BW = self.ln_final(self.transformer(states_BTW, self._place(tokens_BT), mask_TT))
        if isinstance(self.text_projection, nn.Parameter):
            return pooled_BW @ self.text_projection  # type: ignore[no-any-return]
        return pooled_BW if self.text_projection is None else self.text_projection(pooled_BW)  # type: ignore[no-any-return]

    def _place(self, tokens_BT: Tensor) -> Tensor:
        """Return which token (B,) stands for each text."""
        if self.pool_type in ("first", "last"):
            place = 0 if self.pool_type == "first" else tokens_BT.shape[1] - 1
            return tokens_BT.new_full((len(tokens_BT),), place)
        # The token that ends a text: the one with the end id, or the one with the largest id.
        ends_BT = (tokens_BT == self.end_id).int() if self.pool_type == "eos" else tokens_BT
        return ends_BT.argmax(dim=-1)


def _norm(width: int, config: Mapping[str, Any]) -> nn.LayerNorm:
    return nn.LayerNorm(width, **(config.get("norm_kwargs") or {}))


def _known(config: Mapping[str, Any], names: set[str]) -> bool:
    """Return whether no setting is unknown; one that is off, or None, changes nothing."""
    return all(key in names or key in IGNORED or not value for key, value in config.items())
