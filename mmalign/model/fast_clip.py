"""open_clip's networks with shortcuts, each of which is compared with open_clip's own functions.

Shapes: B items, T tokens, W width of a tower, S side of an image.

The shortcuts read open_clip internals, which are not its public API and are renamed between
versions. `compare_with_public` runs both once; a shortcut that fails or differs is not used.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmalign.model.clip_networks import tower_config
from mmalign.model.encoder import Encoder, Preprocess, Towers
from mmalign.model.fused import Patches
from mmalign.progress import say

# Largest distance between the unit vectors of both ways: both round in float32.
TOLERANCE = 1e-3
PROBE_TEXTS = ("a", "a photo of a brown dog that runs on the beach beside the sea")


class OpenClipTowers(Towers):
    """Any CLIP-like open_clip model."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip: Any = clip
        bias = getattr(clip, "logit_bias", None)
        self._bias = None if bias is not None else nn.Parameter(torch.zeros(()))
        self.cuts_texts = _cuts_texts(clip)
        self.pools_images = _pools_images(clip)

    @property
    def log_scale(self) -> nn.Parameter:  # type: ignore[override]
        """Return open_clip's parameter, which is a logarithm too."""
        return self.clip.logit_scale  # type: ignore[no-any-return]

    @property
    def logit_bias(self) -> nn.Parameter:  # type: ignore[override]
        """Return open_clip's own bias if the model has one."""
        return self.clip.logit_bias if self._bias is None else self._bias

    def take_pixels(self, preprocess: Preprocess) -> None:
        """See `Towers`."""
        visual = self.clip.visual
        if _is(visual, "VisionTransformer") and Patches.fits(visual.conv1):
            visual.conv1 = Patches(visual.conv1, preprocess.mean, preprocess.std)
            self.takes_pixels = True

    def image_features(self, images_B3SS: Tensor) -> Tensor:
        """See `Towers`."""
        if self.training or not self.pools_images:
            return self.clip.encode_image(images_B3SS)  # type: ignore[no-any-return]
        # open_clip's own steps, with the last block for the kept token only.
        visual = self.clip.visual
        states_BTW = visual._embeds(images_B3SS)
        first_B = torch.zeros(len(states_BTW), dtype=torch.long, device=states_BTW.device)
        pooled_BW = visual.ln_post(_one_token(visual.transformer, states_BTW, first_B))
        return pooled_BW if visual.proj is None else pooled_BW @ visual.proj  # type: ignore[no-any-return]

    def text_features(self, tokens_BT: Tensor) -> Tensor:
        """See `Towers`."""
        if not self.cuts_texts:
            return self.clip.encode_text(tokens_BT)  # type: ignore[no-any-return]
        # open_clip's own steps, for only as many positions as there are tokens.
        clip, places = self.clip, tokens_BT.shape[1]
        states_BTW = clip.token_embedding(tokens_BT) + clip.positional_embedding[:places]
        mask_TT = clip.attn_mask[:places, :places]
        # The token that ends a text: the one with the end id, or the one with the largest id.
        ends_BT = tokens_BT
        if clip.text_pool_type == "eos":
            ends_BT = (tokens_BT == clip.text_eos_id).int()
        last_B = ends_BT.argmax(dim=-1)
        pooled_BW = clip.ln_final(_one_token(clip.transformer, states_BTW, last_B, mask_TT))
        projection = clip.text_projection
        if isinstance(projection, nn.Linear):
            return projection(pooled_BW)  # type: ignore[no-any-return]
        return pooled_BW if projection is None else pooled_BW @ projection  # type: ignore[no-any-return]

    def architecture_of(self, modality: str, architecture: dict[str, Any]) -> dict[str, Any]:
        """See `Towers`."""
        return tower_config(modality, architecture)

    def weights_of(self, modality: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Towers`."""
        if modality == "text" and not hasattr(self.clip, "text"):
            # open_clip's class CLIP holds the parts of its text tower directly.
            rest = {k.removeprefix("clip."): v for k, v in weights.items() if k != "_bias"}
            return {k: v for k, v in rest.items() if not k.startswith(("visual.", "logit_"))}
        start = "clip.visual." if modality == "image" else "clip.text."
        return {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}


def compare_with_public(encoder: Encoder) -> None:
    """Use only those shortcuts of an encoder that give the same results as open_clip's functions.

    Disabled shortcuts are reported in one warning; the encoder is then slower but correct. Costs
    one image and two texts, encoded twice. Other encoders have nothing to compare.
    """
    towers = encoder.towers
    if not isinstance(towers, OpenClipTowers):
        return
    problems = []
    side = encoder.preprocess.size
    if towers.pools_images:
        image_1SS3 = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
        image = image_1SS3.to(encoder.device)
        off = _difference(lambda: towers.image_features(image), lambda: _public(towers, image))
        if off:
            towers.pools_images = False
            problems.append(f"images ({off})")
    if towers.cuts_texts:
        tokens_BT = encoder.tokenizer(PROBE_TEXTS).to(encoder.device)
        length = int(encoder.text_lengths(tokens_BT.cpu()).max())
        off = _difference(
            lambda: towers.text_features(tokens_BT[:, :length]), lambda: _public(towers, tokens_BT)
        )
        if off:
            towers.cuts_texts = False
            problems.append(f"texts ({off})")
    if problems:
        say(
            f"warning: {encoder.name}: {' and '.join(problems)} are encoded by open_clip's own "
            "slower functions: mmalign's shortcuts do not work with the installed version"
        )


def _public(towers: OpenClipTowers, inputs: Tensor) -> Tensor:
    clip = towers.clip
    encoded = clip.encode_image(inputs) if inputs.ndim == 4 else clip.encode_text(inputs)
    return encoded  # type: ignore[no-any-return]


def _difference(ours: Callable[[], Tensor], public: Callable[[], Tensor]) -> str:
    """Describe how a shortcut fails or differs; empty if it does not."""
    with torch.inference_mode():
        wanted_BD = F.normalize(public().float(), dim=-1)
        try:
            off = float((F.normalize(ours().float(), dim=-1) - wanted_BD).abs().max())
        except (AttributeError, TypeError, RuntimeError, ValueError, IndexError) as error:
            return (str(error).splitlines() or [type(error).__name__])[0]
    return "" if off <= TOLERANCE else f"they differ by {off:.2g}"


def _is(part: object, name: str) -> bool:
    """Return whether a layer is open_clip's own class of this name, not another."""
    kind = type(part)
    return kind.__module__.startswith("open_clip.") and kind.__name__ == name


def _cuts_texts(clip: Any) -> bool:
    """Return whether texts are read by causal attention and represented by their last token.

    No token then sees what follows it, so padding after it can be left out.
    """
    return (
        _is(clip, "CLIP")
        and getattr(clip, "attn_mask", None) is not None
        and getattr(clip, "text_pool_type", "") in ("argmax", "eos")
    )


def _pools_images(clip: Any) -> bool:
    """Return whether an image is represented by the first token of a plain transformer."""
    visual = clip.visual
    return (
        _is(clip, "CLIP")
        and _is(visual, "VisionTransformer")
        and getattr(visual, "pool_type", "") == "tok"
        and getattr(visual, "attn_pool", None) is None
        and not getattr(visual, "output_tokens", False)
        and hasattr(visual, "_embeds")
    )


def _one_token(
    transformer: Any, states_BTW: Tensor, place_B: Tensor, mask_TT: Tensor | None = None
) -> Tensor:
    """Run a transformer; return the states (B, W) of one token of each item.

    The last block runs for these tokens only, as its other outputs are unused: of twelve blocks,
    that saves five sixths of the work of one.
    """
    rows_B = torch.arange(len(states_BTW), device=states_BTW.device)
    *blocks, last = transformer.resblocks
    # Versions without the setting use batch-first layout.
    plain = _is(last, "ResidualAttentionBlock") and getattr(transformer, "batch_first", True)
    if transformer.training or not plain:
        return transformer(states_BTW, attn_mask=mask_TT)[rows_B, place_B]  # type: ignore[no-any-return]
    for block in blocks:
        states_BTW = block(states_BTW, attn_mask=mask_TT)
    seen_BTW = last.ln_1(states_BTW)
    hidden_BT = None if mask_TT is None else mask_TT[place_B] < 0
    query_B1W = seen_BTW[rows_B, place_B][:, None]
    mixed_B1W, _ = last.attn(
        query_B1W, seen_BTW, seen_BTW, need_weights=False, key_padding_mask=hidden_BT
    )
    one_BW = states_BTW[rows_B, place_B] + last.ls_1(mixed_B1W[:, 0])
    return one_BW + last.ls_2(last.mlp(last.ln_2(one_BW)))  # type: ignore[no-any-return]
