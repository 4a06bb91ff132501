"""Encoding in other arithmetics: near float32, of one identity, and never by accident."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mmalign import measured
from mmalign.errors import UsageError
from mmalign.model import (
    Encoder,
    cosines,
    fused,
    in_precision,
    int8,
    new_model,
    openclip,
    precision,
)

CAPTIONS = ["a dog", "two dogs run on a beach", "一只狗在海滩上奔跑", "!", "", "a dog !"]


@pytest.fixture(scope="module")
def clip(small_clip: str) -> Encoder:
    torch.manual_seed(0)
    return openclip.load(small_clip, None)


@pytest.fixture(scope="module")
def public(clip: Encoder) -> Any:
    """open_clip's own network with the same weights."""
    network = openclip.blank(clip.architecture)
    network.load_state_dict(clip.towers.clip.state_dict())  # type: ignore[union-attr]
    return network.eval()


def pixels(encoder: Encoder, count: int = 4) -> np.ndarray:
    side = encoder.preprocess.size
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def test_texts_are_cut_without_a_change(clip: Encoder, public: Any) -> None:
    assert clip.towers.cuts_texts
    tokens = clip.tokenizer(CAPTIONS)
    lengths = clip.text_lengths(tokens)
    # CLIP's token of "!" is 0, as padding is; its end-of-text token comes behind.
    assert lengths.tolist() == [4, 8, *lengths[2:3].tolist(), 3, 2, 5]
    with torch.no_grad():
        whole = public.encode_text(tokens, normalize=True)
        for token, length, wanted in zip(tokens, lengths, whole, strict=True):
            cut = clip.text_vectors(token[None, :length])[0]
            assert torch.allclose(cut, wanted, atol=1e-6)
    assert np.allclose(clip.encode_texts(CAPTIONS), whole.numpy(), atol=1e-6)


@pytest.mark.parametrize("setting", [{"pool_type": "last"}, {"no_causal_mask": True}])
def test_texts_are_left_whole_where_padding_is_read(
    setting: dict[str, Any], small_clip: str
) -> None:
    config = openclip.module().get_model_config(small_clip)
    config["text_cfg"] |= setting
    assert not openclip.unfilled({"kind": "open_clip", "config": config}).cuts_texts


def test_many_texts_come_back_in_their_order() -> None:
    encoder = new_model("nano", CAPTIONS)
    texts = [f"{'very ' * (i % 7)}old dog {i}" for i in range(150)]
    alone = np.concatenate([encoder.encode_texts([t]) for t in texts])
    assert np.allclose(encoder.encode_texts(texts), alone, atol=1e-5)


@pytest.mark.parametrize("wanted", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", ["clip", "nano"])
def test_other_precisions_are_near_and_the_same_model(
    wanted: precision.Precision, name: str, clip: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "WORTH", 1)
    torch.manual_seed(0)
    encoder = clip if name == "clip" else new_model("nano", CAPTIONS)
    before = encoder.identity
    fast, got = in_precision(encoder, wanted)
    assert (got, fast.identity, fast.dim) == (wanted, before, encoder.dim)
    for some, other in (
        (fast.encode_images(pixels(fast)), encoder.encode_images(pixels(fast))),
        (fast.encode_texts(CAPTIONS), encoder.encode_texts(CAPTIONS)),
    ):
        assert some.dtype == np.float32
        assert cosines(some, other).min() > 0.995
        assert not np.array_equal(some, other)
    del encoder.__dict__["identity"]
    assert encoder.identity == before, "the float32 model was changed"


def test_eight_bits_replace_every_large_layer(clip: Encoder) -> None:
    fast, _ = in_precision(clip, "int8")
    kinds = [type(m) for m in fast.towers.modules()]
    large = [
        m for m in fast.towers.modules()
        if isinstance(m, nn.Linear) and m.weight.numel() >= int8.WORTH
    ]  # fmt: skip
    assert nn.MultiheadAttention not in kinds
    assert large == []


def test_packed_weights_give_the_same(clip: Encoder) -> None:
    if not precision.packs_bfloat16():
        pytest.skip("no packed bfloat16 products here")
    torch.manual_seed(0)
    for bias in (True, False):
        layer = nn.Linear(96, 80, bias=bias).bfloat16()
        packed = fused.PackedLinear(layer)
        for shape in ((1, 96), (3, 50, 96), (1000, 96)):
            states = torch.randn(shape).bfloat16()
            with torch.inference_mode():
                wanted = layer(states)
                assert packed(states).shape == wanted.shape
                assert torch.allclose(packed(states), wanted, rtol=0.01, atol=0.01)
    fast, _ = in_precision(clip, "bfloat16")
    kinds = [type(m) for m in fast.towers.modules()]
    assert nn.Linear not in kinds
    assert fused.PackedLinear in kinds


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["bfloat16", "int8"])
def test_texts_with_padding_and_a_last_layer_are_encoded_in_other_precisions(
    wanted: precision.Precision, small_clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "WORTH", 1)
    torch.manual_seed(0)
    encoder = openclip.load(small_clip, None)
    # As SigLIP's: a last layer with a bias, of which open_clip asks the class.
    network: Any = encoder.towers.clip
    width, dim = network.text_projection.shape
    del network.text_projection
    network.text_projection = nn.Linear(width, dim)
    encoder.towers = openclip.OpenClipTowers(network).eval()
    for cut in (True, False):
        encoder.towers.cuts_texts = cut
        fast, _ = in_precision(encoder, wanted)
        assert cosines(fast.encode_texts(CAPTIONS), encoder.encode_texts(CAPTIONS)).min() > 0.995


def test_layers_whose_weights_others_read_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "WORTH", 1)
    attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
    owner = nn.ModuleDict({"layer": nn.Linear(8, 8), "attention": attention})
    fused.pack(owner)
    assert isinstance(owner["layer"], nn.Linear)
    states = torch.ones(2, 3, 8)
    int8.quantize(owner, lambda: (owner["layer"](states), attention(states, states, states)))
    assert isinstance(owner["layer"], int8.Linear8)
    assert isinstance(attention.out_proj, nn.Linear)
    assert type(attention.out_proj).__name__ == "NonDynamicallyQuantizableLinear"


class Scaled(nn.Linear):
    """A kind of linear layer with a step of its own."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(states)


class Reads(nn.Module):
    """An owner that calls one layer, reads the weights of another, and does both with a third."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.both = (nn.Linear(8, 8) for _ in range(3))
        self.unused, self.scaled = nn.Linear(8, 8), Scaled(8, 8)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        states = nn.functional.linear(self.called(states), self.read.weight)
        return self.scaled(self.both(states)) * self.both.weight.mean()


def test_only_layers_that_are_called_and_not_read_become_eight_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(int8, "WORTH", 1)
    torch.manual_seed(0)
    owner, states = Reads(), torch.randn(5, 8)
    wanted = owner(states)
    int8.quantize(owner, lambda: owner(states))
    kinds = {name: type(layer) for name, layer in owner.named_children()}
    assert kinds == {
        "called": int8.Linear8, "read": nn.Linear, "both": nn.Linear, "unused": nn.Linear,
        "scaled": Scaled,
    }  # fmt: skip
    assert vars(owner.read).keys() == vars(nn.Linear(8, 8)).keys()
    assert torch.allclose(owner(states), wanted, atol=0.05)


TIMM = {"timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear", "image_size": 160}
FAMILIES = {
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8},
    "vit": {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16},
    "attentional-pool": {
        "image_size": 64, "layers": 2, "width": 64, "patch_size": 32, "attentional_pool": True,
    },
    **{name: {"timm_model_name": name, **TIMM} for name in (
        "test_vit", "test_vit3", "test_resnet", "test_convnext", "test_nfnet",
    )},
}  # fmt: skip
QUICK = ("resnet", "vit", "attentional-pool", "test_vit")


@pytest.mark.parametrize(
    "family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_networks_of_all_families_are_encoded_in_every_precision(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "WORTH", 1)
    monkeypatch.setattr(precision, "ROUNDS", 1)
    shape = {
        "embed_dim": 32, "vision_cfg": FAMILIES[family],
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2,
                     "layers": 1},
    }  # fmt: skip
    (tmp_path / f"tiny-{family}.json").write_text(json.dumps(shape))
    openclip.module().add_model_config(tmp_path / f"tiny-{family}.json")
    torch.manual_seed(0)
    encoder = openclip.load(f"tiny-{family}", None)
    for wanted in ("bfloat16", "int8"):
        fast, got = in_precision(encoder, wanted)  # type: ignore[arg-type]
        assert got == wanted
        some, other = fast.encode_images(pixels(fast)), encoder.encode_images(pixels(fast))
        assert cosines(some, other).min() > 0.99
        assert cosines(fast.encode_texts(CAPTIONS), encoder.encode_texts(CAPTIONS)).min() > 0.99


def broken(*_: object, **__: object) -> None:
    raise AttributeError("no such operator")


def filled(value: float) -> Callable[..., torch.Tensor]:
    return lambda layer, states: torch.full((*states.shape[:-1], layer.width), value)


@pytest.mark.parametrize(
    ("where", "what", "how", "wanted"),
    [
        (fused.Attention, "forward", lambda *a, **k: (a[1].flip(-1), None), "bfloat16"),
        (fused.Attention, "__init__", broken, "auto"),
        (fused.PackedLinear, "__init__", broken, "bfloat16"),
        (fused.PackedLinear, "forward", lambda self, x: x.new_zeros(*x.shape[:-1], 64), "auto"),
        (fused.Patches, "forward", lambda self, x: torch.ones(len(x), 64, 2, 2), "bfloat16"),
        (fused.Patches, "__init__", broken, "int8"),
        (int8.Linear8, "forward", filled(1.0), "int8"),
        (int8.Linear8, "__init__", broken, "int8"),
        (int8.Linear8, "forward", filled(torch.nan), "int8"),
    ],
)  # fmt: skip
def test_a_way_that_fails_or_differs_is_not_taken(
    where: type, what: str, how: Callable[..., Any], wanted: precision.Precision, clip: Encoder,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if where is fused.PackedLinear and not precision.packs_bfloat16():
        pytest.skip("no packed bfloat16 products here")
    monkeypatch.setattr(int8, "WORTH", 1)
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    before = clip.encode_texts(CAPTIONS)
    monkeypatch.setattr(where, what, how)
    capsys.readouterr()
    assert in_precision(clip, wanted) == (clip, "float32")
    (line,) = capsys.readouterr().err.splitlines()
    assert "warning: small-clip is encoded in float32, not in" in line
    assert np.array_equal(clip.encode_texts(CAPTIONS), before)


def test_one_large_token_does_not_coarsen_the_others() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    states = torch.randn(10, 64)
    states[3] *= 1000
    off = (int8.Linear8(layer)(states) - layer(states)).abs().amax(dim=1)
    assert off[3] < 10 * int8.LEVELS / int8.weight_levels()
    assert off[torch.arange(10) != 3].max() < 0.05


def test_the_largest_sums_are_whole_on_any_processor() -> None:
    """Without VNNI, pairs of products are added in 16 bits and cut off there."""
    layer = nn.Linear(64, 32, bias=False)
    torch.nn.init.ones_(layer.weight)
    for sign in (1, -1):
        found = int8.Linear8(layer)(torch.full((10, 64), float(sign)))
        assert torch.allclose(found, torch.full((10, 32), 64.0 * sign), rtol=1e-5)


def test_auto_goes_by_the_processor_and_the_furthest_vector(
    clip: Encoder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    assert in_precision(clip, "auto")[1] == "bfloat16"
    off = precision._in_bfloat16(clip)
    encode = off.encode_texts

    def one_far(texts: Sequence[str]) -> np.ndarray:
        vectors = encode(texts)
        vectors[3] *= 0.9985  # so is its cosine
        return vectors

    off.encode_texts = one_far  # type: ignore[method-assign,assignment]
    monkeypatch.setattr(precision, "_in_bfloat16", lambda encoder: off)
    capsys.readouterr()
    assert in_precision(clip, "auto") == (clip, "float32"), "one of many vectors is too far"
    assert in_precision(clip, "bfloat16") == (off, "bfloat16"), "asked for by name"
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    assert in_precision(clip, "auto") == (clip, "float32")


def test_no_clock_decides_what_is_stored(clip: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def clock() -> float:
        raise AssertionError("read")

    monkeypatch.setattr(precision.time, "perf_counter", clock)
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    for wanted in ("auto", "bfloat16", "float32"):
        in_precision(clip, wanted)  # type: ignore[arg-type]


def test_eight_bits_say_where_they_do_not_pay(
    clip: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("MMALIGN_CACHE", str(tmp_path))
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    figures = iter([{"bfloat16": 0.85, "int8": 1.0}, {"float32": 2.0, "int8": 1.0}])
    monkeypatch.setattr(precision, "_seconds", lambda encoders: next(figures))
    for _ in range(2):
        monkeypatch.setattr(measured, "_known", {})  # as a new process: it is recorded
        capsys.readouterr()
        assert in_precision(clip, "int8")[1] == "int8"
        assert (
            "--precision int8 is slower on this machine: small-clip encodes images at 0.85 of "
            "its speed in bfloat16" in capsys.readouterr().err
        )
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    assert in_precision(clip, "int8")[1] == "int8"
    assert capsys.readouterr().err == ""
    assert len(list(tmp_path.iterdir())) == 2


def test_both_ways_are_timed(clip: Encoder) -> None:
    found = precision._seconds({"one": clip, "other": clip})
    assert found.keys() == {"one", "other"}
    assert all(value > 0 for value in found.values())


def test_eight_bits_without_support_are_refused(
    clip: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_int8", lambda: False)
    with pytest.raises(UsageError, match="int8 needs a CPU"):
        in_precision(clip, "int8")


@pytest.mark.parametrize(
    ("dtype", "max_tokens", "off"),
    [(torch.float32, 100, 1e-5), (torch.bfloat16, 100, 0.02), (torch.bfloat16, 0, 0.02)],
)
@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_in_the_open_is_the_same(
    batch_first: bool,
    dtype: torch.dtype,
    max_tokens: int,
    off: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fused, "MAX_MATERIALIZED_TOKENS", max_tokens)
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(64, 4, batch_first=batch_first).eval()
    nn.init.normal_(plain.in_proj_bias)
    ours = fused.Attention(plain, dtype)
    states = torch.randn(3, 7, 64)
    states = states if batch_first else states.transpose(0, 1)
    query = states[:, :1] if batch_first else states[:1]
    causal = torch.full((7, 7), -torch.inf).triu(1)
    unseen = torch.arange(7) > torch.tensor([[2], [6], [0]])
    with torch.no_grad():
        for first, masks in (
            (states, {}),
            (states, {"attn_mask": causal}),
            (query, {"key_padding_mask": unseen}),
        ):
            wanted, _ = plain(first, states, states, need_weights=False, **masks)
            found, _ = ours(first, states, states, **masks)
            assert torch.allclose(found, wanted, atol=off)
    with pytest.raises(ValueError, match="value must be key"):
        ours(states, states, query)


@pytest.mark.parametrize("bias", [False, True])
def test_patches_are_the_convolution_of_normalised_pixels(bias: bool) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 24, 8, 8, bias=bias)
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    # Three columns and rows are left over, as the convolution leaves them.
    pixels_B3SS = torch.randint(0, 256, (2, 3, 35, 35), dtype=torch.uint8)
    images = (pixels_B3SS / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[
        :, None, None
    ]
    patches = fused.Patches(convolution, mean, std)
    with torch.no_grad():
        wanted = convolution(images)
        assert torch.allclose(patches(pixels_B3SS), wanted, atol=1e-5)
        int8.quantize(patches, lambda: patches(pixels_B3SS))
        assert isinstance(patches.linear, nn.Linear), "too small to pay"
        patches.linear = int8.Linear8(patches.linear)  # type: ignore[assignment]
        assert (patches(pixels_B3SS) - wanted).abs().max() < 0.02


def test_only_convolutions_without_overlap_become_patches() -> None:
    assert fused.Patches.fits(nn.Conv2d(3, 8, 4, 4))
    for other in (
        nn.Conv2d(3, 8, 4, 2),
        nn.Conv2d(3, 8, 4, 4, padding=1),
        nn.Conv2d(3, 8, 4, 4, dilation=2),
        nn.Conv2d(4, 8, 4, 4),
        nn.Conv2d(3, 8, (4, 2), (4, 2)),
        nn.Identity(),
    ):
        assert not fused.Patches.fits(other)


def test_a_model_for_encoding_takes_pixels_as_they_are(clip: Encoder) -> None:
    for wanted in ("bfloat16", "int8"):
        fast, _ = in_precision(clip, wanted)  # type: ignore[arg-type]
        assert fast.towers.takes_pixels
        assert not clip.towers.takes_pixels
        assert nn.Conv2d not in map(type, fast.towers.modules())
