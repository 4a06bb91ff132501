"""Our networks of CLIP give open_clip's vectors, and are built from its files alone."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mmalign import load_model
from mmalign.errors import ModelError
from mmalign.model import Encoder, clip_catalog, clip_layers, openclip, save_model
from mmalign.model.clip_networks import blank, create
from mmalign.model.clip_towers import (
    OpenClipTowers,
    adopted,
    compare_with_public,
    own_network,
    own_towers,
)

open_clip = openclip.module()
VISION = {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
TEXTS = ["a dog", "two dogs run on a beach", "!"]
SIZES = {
    "layers", "width", "image_size", "patch_size", "head_width", "heads", "context_length",
    "vocab_size", "hf_tokenizer_name", "tokenizer_kwargs",
}  # fmt: skip


def architecture(**changes: Any) -> dict[str, Any]:
    config = {"embed_dim": 32, **changes}
    for tower, sizes in (("vision_cfg", VISION), ("text_cfg", TEXT)):
        config[tower] = {**config.get(tower, {}), **sizes}
    return {"kind": "open_clip", "config": config}


def small(name: str) -> dict[str, Any]:
    """A model of open_clip's list with all of its settings but the sizes."""
    config = open_clip.get_model_config(name)
    for tower in ("vision_cfg", "text_cfg"):
        config[tower] = {k: v for k, v in config[tower].items() if k not in SIZES}
    return architecture(**{**config, "embed_dim": 32})


def kinds() -> list[dict[str, Any]]:
    """One of each kind that open_clip lists that is ours in full, and some more."""
    listed = [small(n) for n in open_clip.list_models() if own_network({"name": n}) is not None]
    more = [
        architecture(vision_cfg={"pool_type": "avg"}),
        architecture(vision_cfg={"ls_init_value": 0.5}, text_cfg={"ls_init_value": 0.5}),
        architecture(text_cfg={"pool_type": "first"}, quick_gelu=True),
        architecture(text_cfg={"pool_type": "eos", "eos_id": 7}),
        architecture(text_cfg={"proj_type": "none"}, embed_dim=32),
        architecture(text_cfg={"no_causal_mask": True, "proj_bias": True}, custom_text=True),
        architecture(text_cfg={"norm_kwargs": {"eps": 0.1}, "act_kwargs": {"approximate": "tanh"}}),
        architecture(init_logit_bias=-10.0, nonscalar_logit_scale=True),
    ]
    return list({json.dumps(each, sort_keys=True): each for each in [*listed, *more]}.values())


KINDS = kinds()


def drawn(what: dict[str, Any]) -> Any:
    """open_clip's network with random weights, none of which hides what is before it."""
    torch.manual_seed(0)
    network = create(what, None, device="cpu").eval()
    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim == 1:
                weight.uniform_(0.5, 1.5)
    return network


def test_many_kinds_are_ours() -> None:
    assert len(KINDS) > 10


@pytest.mark.parametrize("what", KINDS, ids=range(len(KINDS)))
def test_our_networks_give_the_vectors_of_open_clip(what: dict[str, Any]) -> None:
    public = drawn(what)
    own: Any = own_network(what)
    own.load_state_dict(public.state_dict(), assign=True)
    own.eval()
    assert own.state_dict().keys() == public.state_dict().keys()
    assert compare_with_public(own, public, what["config"]) == ""
    images, tokens = torch.randn(3, 3, 64, 64), torch.randint(1, 49000, (3, 16))
    tokens[0, 5], tokens[1, 9], tokens[2, 15] = 49407, 49407, 49407
    if what["config"]["text_cfg"].get("pool_type") == "eos":
        tokens[0, 5], tokens[1, 9], tokens[2, 15] = (
            what["config"]["text_cfg"].get("eos_id", 2),
        ) * 3
    with torch.no_grad():
        assert torch.allclose(own.encode_image(images), public.encode_image(images), atol=1e-4)
        assert torch.allclose(own.encode_text(tokens), public.encode_text(tokens), atol=1e-4)


@pytest.mark.parametrize("what", KINDS[:3], ids=range(3))
def test_they_have_the_same_gradients(what: dict[str, Any]) -> None:
    public = drawn(what)
    own: Any = own_network(what)
    own.load_state_dict({k: v.clone() for k, v in public.state_dict().items()}, assign=True)
    images, tokens = torch.randn(2, 3, 64, 64), torch.randint(1, 49000, (2, 16))
    for network in (own, public):
        network.train()
        (
            network.encode_image(images)[:, 0].sum() + network.encode_text(tokens)[:, 0].sum()
        ).backward()
    wanted = {name: weight.grad for name, weight in public.named_parameters()}
    for name, weight in own.named_parameters():
        if wanted[name] is not None:
            assert torch.allclose(weight.grad, wanted[name], rtol=1e-3, atol=1e-4), name


@pytest.mark.slow
def test_names_have_the_weights_of_open_clip() -> None:
    ours = 0
    for name in open_clip.list_models():
        own = own_network({"name": name})
        if own is None:
            continue
        ours += 1
        public = openclip.build({"kind": "open_clip", "name": name})
        shapes = {k: v.shape for k, v in public.state_dict().items()}
        assert {k: v.shape for k, v in own.state_dict().items()} == shapes
    assert ours > 30


@pytest.mark.parametrize(
    "changes",
    [
        {"vision_cfg": {"attentional_pool": True}}, {"vision_cfg": {"patch_dropout": 0.5}},
        {"vision_cfg": {"scale_fc": True}}, {"vision_cfg": {"pos_embed_type": "sin_cos_2d"}},
        {"text_cfg": {"embed_cls": True}}, {"text_cfg": {"of_tomorrow": 3}},
        {"multimodal_cfg": {"width": 32}}, {"of_tomorrow": True},
    ],
)  # fmt: skip
def test_what_is_not_known_is_left_to_open_clip(changes: dict[str, Any]) -> None:
    assert own_network(architecture()) is not None
    assert own_network(architecture(**changes)) is None


def test_a_tower_of_open_clip_stands_beside_one_of_ours() -> None:
    what = architecture()
    what["config"]["vision_cfg"] = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}
    public = drawn(what)
    towers = adopted(public, what, "a resnet")
    assert isinstance(towers.clip, clip_layers.TextTower)
    assert towers.cuts_texts
    assert towers.clip.visual is public.visual
    assert towers.clip.state_dict().keys() == public.state_dict().keys()


def test_a_network_that_differs_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    what = architecture()
    monkeypatch.setattr(clip_layers.Block, "of_one", lambda self, states, *_: states[:, -1])
    public = drawn(what)
    capsys.readouterr()
    assert adopted(public, what, "a model").clip is public
    said = capsys.readouterr().err
    assert "warning: a model: encoded by open_clip's own slower networks" in said
    assert "images by" in said
    assert "texts by" in said
    assert said.count("\n") == 1


def test_a_network_of_other_names_is_not_taken(capsys: pytest.CaptureFixture[str]) -> None:
    what = architecture()
    public = drawn(what)
    public.visual.ln_last = public.visual.__dict__["_modules"].pop("ln_post")
    assert adopted(public, what, "a model").clip is public
    assert "do not fit the installed version (missing: visual.ln_post" in capsys.readouterr().err


def test_what_is_read_of_open_clips_files_is_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {n: open_clip.get_model_config(n) for n in open_clip.list_models()}
    tags = {name: open_clip.list_pretrained_tags_by_model(name) for name in wanted}
    preprocess = openclip.preprocess_of(
        "", open_clip.get_model_preprocess_cfg(drawn(architecture()))
    )
    assert openclip.preprocess_of("", {**openclip.DEFAULTS, "size": 64}) == preprocess
    words = open_clip.get_tokenizer("ViT-B-32")(TEXTS)
    packaged = {file.stem for file in (clip_catalog._folder() / "model_configs").glob("*.json")}
    monkeypatch.setattr(clip_catalog, "PACKAGE", "open_clip_as_if_not_imported")
    monkeypatch.setattr(clip_catalog, "_folder", lambda: Path(open_clip.__file__).parent)
    found = clip_catalog.names()
    assert set(found) == packaged
    assert packaged <= wanted.keys()
    for name in found:
        assert clip_catalog.config_of({"name": name}) == wanted[name]
        assert clip_catalog.tags(name) == tags[name]
    assert clip_catalog.config_of({"name": "no-such"}) == {}
    assert clip_catalog.part("tokenizer").__name__.startswith(clip_catalog.PARTS)
    assert torch.equal(openclip.OpenClipTokenizer({"name": "ViT-B-32"})(TEXTS), words)


@pytest.fixture
def weights(small_clip: str, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    state = create({"kind": "open_clip", "name": small_clip}, None, device="cpu").state_dict()
    torch.save(state, tmp_path / "w.pt")
    return tmp_path / "w.pt"


def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("form", ["pt", "safetensors", "state_dict", "module", "half", "legacy"])
def test_weights_are_read_in_every_form(form: str, weights: Path, small_clip: str) -> None:
    state = torch.load(weights)
    wanted = load_model(f"{small_clip}:{weights}")
    file = weights.with_name(f"other.{'safetensors' if form == 'safetensors' else 'pt'}")
    if form == "safetensors":
        save_file(state, file)
    elif form == "state_dict":
        torch.save({"epoch": 3, "state_dict": state}, file)
    elif form == "module":
        torch.save({f"module.{k}": v for k, v in state.items()}, file)
    elif form == "half":
        torch.save({k: v.half() for k, v in state.items()}, file)
    elif form == "legacy":
        torch.save(state, file, _use_new_zipfile_serialization=False)
    else:
        torch.save(state, file)
    found = load_model(f"{small_clip}:{file}")
    if form == "half":
        assert np.allclose(found.encode_texts(TEXTS), wanted.encode_texts(TEXTS), atol=1e-2)
    else:
        assert found.tower_identities == wanted.tower_identities
    assert all(w.dtype == torch.float32 for w in found.towers.parameters())


@pytest.mark.parametrize("where", ["file", "run"])
def test_an_image_tower_is_read_when_it_is_needed(
    where: str, weights: Path, small_clip: str, tmp_path: Path
) -> None:
    whole = load_model(f"{small_clip}:{weights}")
    name, file = f"{small_clip}:{weights}", weights
    if where == "run":
        (tmp_path / "run").mkdir()
        name, file = str(tmp_path / "run"), tmp_path / "run" / save_model(whole, tmp_path / "run")
    later = load_model(name, lazily=True)
    assert later.tower_identities == whole.tower_identities
    assert np.array_equal(later.encode_texts(TEXTS), whole.encode_texts(TEXTS))
    changed = load_model(name, lazily=True)
    assert np.array_equal(later.encode_images(pixels()), whole.encode_images(pixels()))
    # What was read does not depend on the file.
    os.utime(file, ns=(1, 1))
    assert np.array_equal(later.encode_images(pixels()), whole.encode_images(pixels()))
    assert np.array_equal(changed.encode_texts(TEXTS), whole.encode_texts(TEXTS))
    with pytest.raises(ModelError, match="was changed while it was in use"):
        changed.encode_images(pixels())


def test_weights_that_are_no_numbers_are_refused_before_an_image_is_encoded(
    weights: Path, small_clip: str
) -> None:
    state = torch.load(weights)
    state["visual.proj"][0, 0] = torch.nan
    torch.save(state, weights)
    with pytest.raises(ModelError, match=r"NaN or infinity, first in visual\.proj"):
        load_model(f"{small_clip}:{weights}")
    later = load_model(f"{small_clip}:{weights}", lazily=True)
    assert np.isfinite(later.encode_texts(TEXTS)).all()
    with pytest.raises(ModelError, match=r"NaN or infinity, first in visual\.proj"):
        later.encode_images(pixels())


def test_large_weights_are_numbers(weights: Path, small_clip: str) -> None:
    state = torch.load(weights)
    state["logit_scale"] = torch.tensor(1.0)
    state["visual.proj"].fill_(1e38)  # their sum is infinite
    torch.save(state, weights)
    assert isinstance(load_model(f"{small_clip}:{weights}"), Encoder)


def test_a_model_without_weights_has_no_memory() -> None:
    towers = own_towers(architecture())
    assert isinstance(towers, OpenClipTowers)
    assert all(weight.is_meta for weight in towers.clip.parameters())
    filled = openclip.with_memory(towers)
    assert all(weight.isnan().all() for weight in filled.clip.parameters())
    assert isinstance(blank(architecture()), torch.nn.Module)
