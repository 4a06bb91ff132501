"""open_clip models behind our towers; the only file that imports open_clip.

torchvision and torch must come from one place: where they do not, open_clip's import fails with
words that help nobody, so they are replaced here.
"""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmalign.errors import InstallError, ModelError, nearest, reason_of
from mmalign.model.encoder import Encoder, Preprocess, Tokenizer, Towers
from mmalign.model.lean import Patches

TORCH_MISMATCH = (
    "torch and torchvision do not go together: install both from one index, for example "
    "`pip install --force-reinstall torch torchvision`, or for a CPU-only pair "
    "`pip install --force-reinstall torch torchvision "
    "--index-url https://download.pytorch.org/whl/cpu`"
)
# What fills a tensor with random numbers. Of calls inside a function that it has seen, a mode of
# torch hears nothing, so those of `nn.init` are named as well.
RANDOM = {
    Tensor.uniform_,
    Tensor.normal_,
    nn.init.uniform_,
    nn.init.normal_,
    nn.init.trunc_normal_,
    nn.init.kaiming_uniform_,
    nn.init.kaiming_normal_,
    nn.init.xavier_uniform_,
    nn.init.xavier_normal_,
}


def module() -> Any:
    """Import open_clip, or say in one line why it cannot be."""
    try:
        import open_clip
    except RuntimeError as error:
        if "torchvision::" in str(error):
            raise InstallError(f"{TORCH_MISMATCH} ({error})") from None
        raise
    return open_clip


class OpenClipTowers(Towers):
    """Any CLIP-like open_clip model; final."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip: Any = clip
        self._bias = None if clip.logit_bias is not None else nn.Parameter(torch.zeros(()))
        self.cuts_texts = _cuts_texts(clip)
        self.pools_images = _pools_images(clip)

    @property
    def log_scale(self) -> nn.Parameter:  # type: ignore[override]
        """open_clip stores the logarithm too."""
        return self.clip.logit_scale  # type: ignore[no-any-return]

    @property
    def logit_bias(self) -> nn.Parameter:  # type: ignore[override]
        """open_clip's own where the model has one."""
        return self.clip.logit_bias if self._bias is None else self._bias  # type: ignore[no-any-return]

    def take_pixels(self, preprocess: Preprocess) -> None:
        """See `Towers`."""
        visual = self.clip.visual
        if type(visual) is module().transformer.VisionTransformer and Patches.fits(visual.conv1):
            visual.conv1 = Patches(visual.conv1, preprocess.mean, preprocess.std)
            self.takes_pixels = True

    def image_features(self, images_B3SS: Tensor) -> Tensor:
        """See `Towers`."""
        if self.training or not self.pools_images:
            return self.clip.encode_image(images_B3SS)  # type: ignore[no-any-return]
        # open_clip's own steps, the last of them for the token alone that is kept.
        visual = self.clip.visual
        states_BTW = visual._embeds(images_B3SS)
        first_B = torch.zeros(len(states_BTW), dtype=torch.long, device=states_BTW.device)
        pooled_BW = visual.ln_post(_one_token(visual.transformer, states_BTW, first_B))
        return pooled_BW if visual.proj is None else pooled_BW @ visual.proj  # type: ignore[no-any-return]

    def text_features(self, tokens_BT: Tensor) -> Tensor:
        """See `Towers`."""
        if not self.cuts_texts:
            return self.clip.encode_text(tokens_BT)  # type: ignore[no-any-return]
        # open_clip's own steps, over as many places as there are tokens.
        clip, places = self.clip, tokens_BT.shape[1]
        states_BTW = clip.token_embedding(tokens_BT) + clip.positional_embedding[:places]
        mask_TT = clip.attn_mask[:places, :places]
        pool = module().transformer.text_global_pool
        places_BT = torch.arange(places, device=tokens_BT.device).expand(tokens_BT.shape)
        last_B = pool(places_BT, tokens_BT, clip.text_pool_type, clip.text_eos_id)
        pooled_BW = clip.ln_final(_one_token(clip.transformer, states_BTW, last_B, mask_TT))
        projection = clip.text_projection
        if isinstance(projection, nn.Linear):
            return projection(pooled_BW)  # type: ignore[no-any-return]
        return pooled_BW if projection is None else pooled_BW @ projection  # type: ignore[no-any-return]


def _cuts_texts(clip: Any) -> bool:
    """Say whether a text is read by causal attention and known by its last token.

    No token then sees what comes behind it, so padding there can be left out.
    """
    return (
        type(clip) is module().CLIP
        and clip.attn_mask is not None
        and clip.text_pool_type in ("argmax", "eos")
    )


def _pools_images(clip: Any) -> bool:
    """Say whether an image is known by the first token of a plain transformer."""
    visual = clip.visual
    return (
        type(clip) is module().CLIP
        and type(visual) is module().transformer.VisionTransformer
        and visual.pool_type == "tok"
        and visual.attn_pool is None
        and not visual.output_tokens
        # Not a part of open_clip's interface.
        and hasattr(visual, "_embeds")
    )


def _one_token(
    transformer: Any, states_BTW: Tensor, place_B: Tensor, mask_TT: Tensor | None = None
) -> Tensor:
    """Run a transformer; return the states (B, W) of one token of each item.

    The last block runs for these alone, as nobody reads what it makes of the others: of twelve
    blocks that saves the work of five sixths of one.
    """
    rows_B = torch.arange(len(states_BTW), device=states_BTW.device)
    *blocks, last = transformer.resblocks
    plain = type(last) is module().transformer.ResidualAttentionBlock and transformer.batch_first
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


class OpenClipTokenizer(Tokenizer):
    """The tokenizer that belongs to an open_clip model; final."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.backend = module().get_tokenizer(name)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return ids (B, T), T the model's context length."""
        return self.backend(list(texts))  # type: ignore[no-any-return]

    def cut(self, texts: Sequence[str]) -> list[str]:
        """See `Tokenizer`."""
        most = self.backend.context_length
        # No text has more tokens than bytes, but for its two marks.
        return [t for t in texts if len(t.encode()) + 2 > most and self._length(t) > most]

    def _length(self, text: str) -> int:
        """Tokens of a whole text, its marks included; 0 where open_clip does not tell."""
        if hasattr(self.backend, "encode"):
            return len(self.backend.encode(text)) + 2
        if hasattr(self.backend, "tokenizer"):
            return len(self.backend.tokenizer(text)["input_ids"])
        return 0

    def to_json(self) -> str:
        """The name is enough: open_clip holds the vocabulary."""
        return json.dumps({"open_clip": self.name})


def names() -> list[str]:
    """Names of all model architectures that open_clip knows."""
    return list(module().list_models())


def tags(name: str) -> list[str]:
    """Tags of the pretrained weights that open_clip knows for a model."""
    return list(module().list_pretrained_tags_by_model(name))


def load(name: str, pretrained: str | None) -> Encoder:
    """Build an open_clip model by name; `pretrained` is a tag, a local file, or None for random.

    Raises:
        ModelError: Unknown name or tag, or the weights cannot be had or do not fit.
    """
    open_clip = module()
    if name not in names():
        raise ModelError(f"no open_clip model is called {name!r}: {nearest(name, names())}")
    if pretrained is not None and not Path(pretrained).is_file() and pretrained not in tags(name):
        known = ", ".join(tags(name)) or "none"
        raise ModelError(
            f"{name} has no pretrained weights {pretrained!r}: tags {known}, or a file"
        )
    try:
        with _NotDrawn() if pretrained else nullcontext():
            clip = open_clip.create_model(name, pretrained=pretrained, weights_only=True)
    except Exception as error:  # hub, pickle and shape errors of many libraries
        reason = reason_of(error)
        raise ModelError(
            f"{name} with weights {pretrained!r} cannot be loaded: {reason}"
        ) from error
    return wrap(clip, name, source=f"{name}:{pretrained}" if pretrained else "")


def blank(name: str) -> Any:
    """Build an open_clip network whose weights are still to be loaded."""
    with _NotDrawn():
        return module().create_model(name, pretrained=None, pretrained_text=False)


class _NotDrawn(TorchFunctionMode):
    """No random weights where others are loaded over them (0.3 to 0.8 s of ViT-B/32); final."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Leave a tensor as it is where random numbers would fill it."""
        words = kwargs or {}
        if func in RANDOM:
            return args[0] if args else words["tensor"]
        return func(*args, **words)


def wrap(clip: Any, name: str, source: str = "") -> Encoder:
    """Make an encoder of a built open_clip model."""
    cfg = module().get_model_preprocess_cfg(clip)
    size = cfg["size"] if isinstance(cfg["size"], int) else cfg["size"][0]
    preprocess = Preprocess(
        size=size,
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        interpolation=cfg["interpolation"],
        resize_mode=cfg["resize_mode"],
    )
    architecture = {"kind": "open_clip", "name": name}
    towers = OpenClipTowers(clip)
    return Encoder(name, towers, OpenClipTokenizer(name), preprocess, architecture, source)
