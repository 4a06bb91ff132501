"""Identities of towers cover what decides their vectors and nothing else; spaces follow them."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PICO, weights_of
from torch import Tensor, nn

from mmalign import load_model
from mmalign.errors import ModelError
from mmalign.model import (
    MODALITIES,
    Encoder,
    Origin,
    Preprocess,
    blank_model,
    in_precision,
    keep_weights,
    new_model,
    save_description,
    save_model,
    space_after,
)
from mmalign.model.clip_networks import create
from mmalign.model.openclip import wrap
from mmalign.model.presets import PRESETS, Preset
from mmalign.model.tokenizer import train
from mmalign.model.towers import FIELDS

CAPTIONS = ["a red circle left of a blue star", "two dogs run"]
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 64, "layers": 2, "width": 64, "patch_size": 32}
TIMM = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
DECODER = {"context_length": 15, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
# Every way in which open_clip puts a model together.
CLIPS: dict[str, dict[str, Any]] = {
    "clip": {},
    "custom text": {"custom_text": True},
    "siglip": {
        "custom_text": True, "init_logit_bias": -10,
        "text_cfg": {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    },
    "no projection": {"text_cfg": {**TEXT, "proj_type": "none"}, "custom_text": True},
    "coca": {
        "custom_text": True, "multimodal_cfg": DECODER,
        "vision_cfg": {**VIT, "attentional_pool": True, "output_tokens": True},
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
    },
    "resnet": {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}},
    "timm": {"vision_cfg": TIMM},
    "timm resnet": {"vision_cfg": {**TIMM, "timm_model_name": "test_resnet"}},
}  # fmt: skip
PRESET_KINDS = ("pico", "bag of words")


def clip_of(changes: dict[str, Any]) -> Encoder:
    """A small open_clip model with random weights."""
    config = {"embed_dim": 32, "vision_cfg": VIT, "text_cfg": TEXT, **changes}
    architecture = {"kind": "open_clip", "config": json.loads(json.dumps(config))}
    torch.manual_seed(0)
    return wrap(create(architecture, None, device="cpu"), "open_clip", architecture)


def encoder_of(kind: str, monkeypatch: pytest.MonkeyPatch) -> Encoder:
    if kind in CLIPS:
        return clip_of(CLIPS[kind])
    layers = 0 if kind == "bag of words" else 1
    return preset(monkeypatch, text_layers=layers)


def preset(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Encoder:
    """An encoder of a small preset; towers of equal settings have equal weights."""
    monkeypatch.setitem(PRESETS, "pico", replace(PICO, **changes))
    encoder = new_model("pico", CAPTIONS)
    for modality in MODALITIES:
        torch.manual_seed(0)
        for weight in getattr(encoder.towers, modality).parameters():
            nn.init.normal_(weight, std=0.1)
    return encoder


def features(encoder: Encoder, modality: str) -> Tensor:
    if modality == "text":
        return encoder.towers.text_features(encoder.tokenizer(CAPTIONS))
    side = encoder.preprocess.size
    generator = torch.Generator().manual_seed(0)
    return encoder.towers.image_features(torch.randn(2, 3, side, side, generator=generator))


def covered(encoder: Encoder, modality: str) -> set[str]:
    """The weights that count for a tower, by their names in the whole model."""
    state = encoder.towers.state_dict()
    marked = {name: torch.tensor(i) for i, name in enumerate(state)}
    numbers = {int(mark) for mark in encoder.towers.weights_of(modality, marked).values()}
    return {name for i, name in enumerate(state) if i in numbers}


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("kind", [*PRESET_KINDS, *CLIPS])
def test_a_tower_covers_the_parameters_that_its_vectors_have_a_gradient_in(
    kind: str, modality: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_of(kind, monkeypatch)
    encoder.towers.requires_grad_(True)
    features(encoder, modality).sum().backward()
    named = dict(encoder.towers.named_parameters())
    wanted = {name for name, weight in named.items() if weight.grad is not None}
    assert covered(encoder, modality) & named.keys() == wanted


@pytest.mark.parametrize("kind", ["pico", "resnet", "timm resnet"])
def test_a_tower_covers_the_buffers_that_its_vectors_depend_on(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_of(kind, monkeypatch)
    buffers = {n: b for n, b in encoder.towers.named_buffers() if n in encoder.towers.state_dict()}
    depends, counts = set(), set()
    with torch.no_grad():
        for weight in encoder.towers.parameters():
            if weight.ndim == 1:  # some scales start as 0 and hide what is before them
                nn.init.uniform_(weight, 0.5, 1.5)
        before = encoder.tower_identity("image")
        wanted = features(encoder, "image")
        for name, buffer in buffers.items():
            buffer += 1
            if not torch.equal(features(encoder, "image"), wanted):
                depends.add(name)
            if encoder.tower_identity_with("image", encoder.towers.state_dict()) != before:
                counts.add(name)
            buffer -= 1
    assert counts == depends != set()


def test_every_field_of_a_preset_belongs_to_a_tower_or_to_training() -> None:
    training = {"dropout", "word_dropout", "drop_path"}
    assert {*FIELDS["image"], *FIELDS["text"], *training} == {f.name for f in fields(Preset)}


@pytest.mark.parametrize(
    ("changes", "stays"),
    [
        ({"text_width": 32}, {"image"}),
        ({"text_layers": 2}, {"image"}),
        ({"image_blocks": (2, 1)}, {"text"}),
        ({"image_size": 64}, {"text"}),
        ({"dropout": 0.5, "word_dropout": 0.5, "drop_path": 0.5}, {"image", "text"}),
        ({"dim": 32}, set()),
    ],
)
def test_a_preset_changes_the_identity_of_the_towers_that_it_decides(
    changes: dict[str, Any], stays: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = preset(monkeypatch).tower_identities
    after = preset(monkeypatch, **changes).tower_identities
    assert {m for m in MODALITIES if after[m] == before[m]} == stays


@pytest.mark.parametrize(
    ("changes", "stays"),
    [
        ({"text_cfg": {**TEXT, "width": 64}}, {"image"}),
        ({"text_cfg": {**TEXT, "no_causal_mask": True}}, {"image"}),
        ({"vision_cfg": {**VIT, "pool_type": "avg"}}, {"text"}),
        ({"vision_cfg": {**VIT, "patch_dropout": 0.5}}, {"image", "text"}),
        ({"custom_text": True, "init_logit_bias": -10}, {"image", "text"}),
        ({"quick_gelu": True}, set()),
    ],
)
def test_a_configuration_changes_the_identity_of_the_towers_that_it_decides(
    changes: dict[str, Any], stays: set[str]
) -> None:
    before, other = clip_of({}), clip_of(changes)
    with torch.no_grad():
        for encoder in (before, other):
            for weight in encoder.towers.parameters():
                weight.fill_(0.1)
    after = other.tower_identities
    assert {m for m in MODALITIES if after[m] == before.tower_identities[m]} == stays


def test_quick_gelu_decides_no_network_that_ignores_it() -> None:
    before, after = (clip_of({**CLIPS["timm"], "quick_gelu": quick}) for quick in (False, True))
    assert before.tower_identity("image") == after.tower_identity("image")
    assert before.tower_identity("text") != after.tower_identity("text")


def test_a_name_and_its_configuration_have_the_same_towers(small_clip: str) -> None:
    from mmalign.model import openclip

    named = openclip.load(small_clip, None)
    config = openclip.module().get_model_config(small_clip)
    architecture = {"kind": "open_clip", "config": config}
    words = openclip.OpenClipTokenizer(architecture)
    other = replace(named, name="open_clip", architecture=architecture, tokenizer=words)
    assert other.identity != named.identity
    assert other.tower_identities == named.tower_identities


@pytest.mark.parametrize(
    ("part", "stays"),
    [
        ("clip.visual.proj", {"text"}),
        ("clip.text.text_projection", {"image"}),
        ("clip.logit_scale", {"image", "text"}),
        ("_bias", {"image", "text"}),
        ("clip.text_decoder.text_projection", {"image", "text"}),
    ],
)
def test_a_weight_changes_the_identity_of_the_towers_that_use_it(
    part: str, stays: set[str]
) -> None:
    encoder = clip_of(CLIPS["coca"])
    before = encoder.tower_identities
    weights = dict(encoder.towers.state_dict())
    weights[part] = weights[part] + 1
    after = {m: encoder.tower_identity_with(m, weights) for m in MODALITIES}
    assert {m for m in MODALITIES if after[m] == before[m]} == stays


def test_a_weight_of_both_towers_counts_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = preset(monkeypatch, text_hidden=64)
    towers: Any = encoder.towers
    towers.text.head[3] = towers.image.head
    before = encoder.tower_identities
    with torch.no_grad():
        towers.image.head.weight += 1
    after = encoder.described(towers.state_dict()).towers
    assert [m for m in MODALITIES if after[m] == before[m]] == []


def test_preprocessing_belongs_to_the_image_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = preset(monkeypatch)
    other = replace(encoder, preprocess=Preprocess(32, interpolation="bilinear"))
    assert other.tower_identity("image") != encoder.tower_identity("image")
    assert other.tower_identity("text") == encoder.tower_identity("text")


def test_the_tokenizer_belongs_to_the_text_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = preset(monkeypatch)
    other = replace(encoder, tokenizer=train(["x"], vocabulary=300, context=16))
    assert other.tower_identity("image") == encoder.tower_identity("image")
    assert other.tower_identity("text") != encoder.tower_identity("text")


def test_identities_and_spaces_are_printable(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = replace(preset(monkeypatch), name="猫 model\n")
    printable = r"[A-Za-z0-9._:/@-]+-[0-9a-f]{16}"
    for name in (*encoder.tower_identities.values(), encoder.space):
        assert re.fullmatch(printable, name)


def only(hashed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Note which towers are hashed from here on."""
    real: Callable[..., str] = Encoder.tower_identity_with

    def noted(self: Encoder, modality: str, weights: Any) -> str:
        hashed.append(modality)
        return real(self, modality, weights)

    monkeypatch.setattr(Encoder, "tower_identity_with", noted)


def test_a_tower_is_hashed_alone_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, hashed = preset(monkeypatch), list[str]()
    only(hashed, monkeypatch)
    assert encoder.tower_identity("text") == encoder.tower_identity("text")
    assert hashed == ["text"]


def test_the_space_of_a_run_needs_the_text_tower_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(preset(monkeypatch), tmp_path)
    encoder, hashed = load_model(tmp_path), list[str]()
    only(hashed, monkeypatch)
    assert encoder.space.startswith("pico-")
    assert hashed == ["text"]


@pytest.mark.parametrize("wanted", ["bfloat16", "int8"])
def test_another_precision_has_the_same_towers_and_space(
    wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = preset(monkeypatch)
    fast, got = in_precision(encoder, wanted)
    assert got == wanted
    assert (fast.tower_identities, fast.space) == (encoder.tower_identities, encoder.space)


BEFORE = Origin("lit-0", {"image": "image-1", "text": "text-1"})


@pytest.mark.parametrize(
    ("before", "image", "text", "stays"),
    [
        (BEFORE, "image-1", "text-2", True),
        (BEFORE, "image-2", "text-1", True),
        (BEFORE, "image-1", "text-1", True),
        (BEFORE, "image-2", "text-2", False),
        (None, "image-1", "text-1", False),
    ],
)
def test_a_space_stays_while_one_tower_does(
    before: Origin | None, image: str, text: str, stays: bool
) -> None:
    space = space_after(before, {"image": image, "text": text}.__getitem__, "nano")
    assert (space == "lit-0") == stays
    assert stays or space == space_after(None, {"image": image, "text": text}.__getitem__, "nano")


def test_two_models_with_the_same_towers_share_a_space(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = preset(monkeypatch)
    other = preset(monkeypatch)
    with torch.no_grad():
        other.towers.log_scale += 1
    assert other.identity != encoder.identity
    assert other.space == encoder.space


def described(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "model.json").read_text(encoding="utf-8"))
    return content


def test_a_run_records_what_its_weights_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = preset(monkeypatch)
    save_model(encoder, tmp_path)
    recorded = described(tmp_path)
    assert recorded["identity"] == encoder.identity
    assert recorded["space"] == encoder.space
    assert recorded["towers"] == encoder.tower_identities


def train_towers(encoder: Encoder, *trained: str) -> None:
    """Change the weights of these towers only."""
    with torch.no_grad():
        for modality in trained:
            for weight in getattr(encoder.towers, modality).parameters():
                weight += 0.1


def frozen(run: Path, out: Path, *trained: str) -> Path:
    """A run from another run, in which only these towers were trained."""
    encoder = load_model(run)
    train_towers(encoder, *trained)
    out.mkdir()
    save_model(encoder, out)
    return out


def test_a_run_with_a_frozen_tower_is_loaded_in_the_space_that_it_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = preset(monkeypatch)
    save_model(encoder, tmp_path)
    once = frozen(tmp_path, tmp_path / "once", "text")
    twice = frozen(once, tmp_path / "twice", "image")
    assert load_model(once).tower_identity("text") != encoder.tower_identity("text")
    assert load_model(once).space == load_model(twice).space == encoder.space


def test_a_run_in_which_both_towers_were_trained_has_a_space_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = preset(monkeypatch)
    save_model(encoder, tmp_path)
    after = load_model(frozen(tmp_path, tmp_path / "after", "image", "text"))
    assert after.space not in (encoder.space, "")
    assert after.space == space_after(None, after.tower_identity, "pico")


def test_weights_that_were_changed_are_not_in_the_recorded_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(preset(monkeypatch), tmp_path)
    encoder = load_model(tmp_path)
    train_towers(encoder, "image", "text")
    assert encoder.space != described(tmp_path)["space"]


def test_a_run_from_a_version_without_spaces_gets_that_of_its_towers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = preset(monkeypatch)
    save_model(encoder, tmp_path)
    new = ("identity", "space", "towers", "origin")
    old = {k: v for k, v in described(tmp_path).items() if k not in new}
    (tmp_path / "model.json").write_text(json.dumps(old))
    assert load_model(tmp_path).space == encoder.space


def test_a_training_that_is_stopped_early_still_knows_what_it_started_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = preset(monkeypatch)
    encoder.origin = encoder.described(encoder.towers.state_dict())
    save_description(encoder, tmp_path)
    assert blank_model(tmp_path).origin == encoder.origin


def test_earlier_weights_are_found_by_their_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(preset(monkeypatch), tmp_path)
    first = load_model(tmp_path)
    keep_weights(first)
    later = frozen(tmp_path, tmp_path / "later", "image", "text")
    for file in tmp_path.glob("model-*"):
        shutil.copy(file, later)
    assert load_model(later).space != first.space
    again = load_model(later, first.space)
    assert (again.space, again.identity) == (first.space, first.identity)
    assert load_model(later, "no-space").space == load_model(later).space


def test_earlier_weights_with_a_frozen_tower_stay_in_the_space_that_they_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(preset(monkeypatch), tmp_path)
    encoder, run = load_model(tmp_path), tmp_path / "run"
    run.mkdir()
    for trained in (["text"], ["image", "text"]):
        train_towers(encoder, *trained)
        save_model(encoder, run)
        keep_weights(load_model(run))
    started = described(tmp_path)["space"]
    assert load_model(run).space != started
    assert load_model(run, started).space == started


@pytest.mark.parametrize("space", [["x"], "two words", 7])
def test_a_space_that_is_no_name_is_refused_in_one_line(
    space: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(preset(monkeypatch), tmp_path)
    (tmp_path / "model.json").write_text(json.dumps({**described(tmp_path), "space": space}))
    with pytest.raises(
        ModelError, match="the model is damaged.*not the names of a space"
    ) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_weights_of_a_run_are_named_by_the_identity_of_format_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = preset(monkeypatch)
    save_model(encoder, tmp_path)
    assert weights_of(tmp_path).stem == encoder.identity.replace("pico", "model")
