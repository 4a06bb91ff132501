"""Encoders: presets, open_clip models, tokenizers, checkpoints and identity."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import weights_of

from mmalign import load_model
from mmalign.errors import InstallError, ModelError
from mmalign.model import PRESETS, Preprocess, new_model, openclip, save_model
from mmalign.model.tokenizer import CHINESE, SYLLABLES, common_characters, from_json, train

CAPTIONS = ["a red circle left of a blue star", "一个红色圆形在一个蓝色星形的左边", "two dogs run"]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_make_unit_vectors(name: str) -> None:
    encoder = new_model(name, CAPTIONS)
    size = encoder.preprocess.size
    pixels = np.random.default_rng(0).integers(0, 255, (3, size, size, 3), dtype=np.uint8)
    images, texts = encoder.encode_images(pixels), encoder.encode_texts([*CAPTIONS, ""])
    assert images.shape == (3, encoder.dim)
    assert texts.shape == (4, encoder.dim)
    for vectors in (images, texts):
        assert vectors.dtype == np.float32
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_padding_changes_nothing() -> None:
    encoder = new_model("nano", CAPTIONS)
    alone = encoder.encode_texts(["two dogs run"])
    beside = encoder.encode_texts(["two dogs run", CAPTIONS[0] * 3])
    assert np.allclose(alone[0], beside[0], atol=1e-6)


def test_encoding_does_not_depend_on_the_batch() -> None:
    encoder = new_model("nano", CAPTIONS)
    pixels = np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), dtype=np.uint8)
    whole = encoder.encode_images(pixels)
    assert np.allclose(whole[:1], encoder.encode_images(pixels[:1]), atol=1e-5)


def test_tokenizer_spells_anything_and_survives_json() -> None:
    words = train(CAPTIONS, vocabulary=400, context=16)
    texts = [*CAPTIONS, "ελληνικά 🙂", ""]
    tokens = words(texts)
    assert tokens.shape[0] == 5
    assert tokens.shape[1] <= 16
    assert torch.equal(from_json(words.to_json())(texts), tokens)
    spelled = words(["红色  Dogs 🙂 [pad]"])[0].tolist()
    assert words.backend.decode([t for t in spelled if t]).strip() == "红色 dogs 🙂 [pad]"
    assert 0 not in spelled


def test_common_chinese_characters_are_single_tokens_in_every_language() -> None:
    characters = common_characters()
    assert len(set(characters)) == len(characters)
    assert {"一", "狗", "的", "座", "啊", "。", "「"} <= set(characters)
    words = train(["a red square left of a blue circle"] * 5, vocabulary=400, context=64)
    words.backend.no_padding()
    text = "".join(characters)
    for first in range(0, len(text), 60):
        part = text[first : first + 60]
        assert len(words.backend.encode(part).ids) == len(part) + 1  # and the space before it
    query = "一只棕色的小狗在海边的沙滩上快乐地奔跑，远处有几艘白色的帆船，天空中飘着几朵云彩"
    words.backend.no_truncation()
    assert len(words.backend.encode(query).ids) == len(query) + 1


def test_words_of_captions_are_learned_beside_the_common_characters() -> None:
    small, large = (train(["红色 的 正方形 red squares"] * 9, v, context=64) for v in (270, 400))
    assert large.size <= 400 + len(common_characters())
    assert large(["红色"]).shape[1] == 1
    assert large(["squares"]).shape[1] == 1
    assert small(["红色"]).shape[1] > 1


def test_no_token_is_a_phrase() -> None:
    """Where a script has no spaces, captions that are asked for otherwise share their tokens."""
    captions = ["大的红色空心正方形在左边", "赤くて大きい四角が左にあります", "สี่เหลี่ยมสีแดงขนาดใหญ่"]
    words = train([*captions, "extraordinarily red squares"] * 9, vocabulary=1000, context=64)
    learned = [t.strip() for t in words.backend.get_vocab() if not t.startswith("<0x")]
    assert max(len(CHINESE.findall(t)) for t in learned) == 2
    assert max(len(SYLLABLES.findall(t)) for t in learned) == 4
    assert "extraordinarily" in learned
    for caption in captions:
        assert words.backend.decode(words.backend.encode(caption).ids).strip() == caption


def test_save_and_load_keep_vectors_and_identity(tmp_path: Path) -> None:
    encoder = new_model("nano", CAPTIONS)
    save_model(encoder, tmp_path)
    again = load_model(tmp_path)
    assert again.identity == encoder.identity
    assert np.array_equal(again.encode_texts(CAPTIONS), encoder.encode_texts(CAPTIONS))


@pytest.mark.parametrize("what", ["weights", "preprocessing", "tokenizer"])
def test_identity_sees_every_part(what: str) -> None:
    encoder = new_model("nano", CAPTIONS)
    other = new_model("nano", CAPTIONS)
    other.towers.load_state_dict(encoder.towers.state_dict())
    assert other.identity == encoder.identity
    del other.__dict__["identity"]
    if what == "weights":
        with torch.no_grad():
            next(other.towers.parameters()).view(-1)[0] += 1e-3
    elif what == "preprocessing":
        other.preprocess = Preprocess(size=64, interpolation="bilinear")
    else:
        other.tokenizer = train(["x"], vocabulary=300, context=16)
    assert other.identity != encoder.identity


def test_logit_scale_is_clamped() -> None:
    encoder = new_model("nano", CAPTIONS)
    assert float(encoder.towers.logit_scale.detach()) == pytest.approx(1 / 0.07, rel=1e-5)
    with torch.no_grad():
        encoder.towers.log_scale.fill_(math.log(1e6))
    assert float(encoder.towers.logit_scale.detach()) == 100


def test_open_clip_models_agree_with_open_clip(tmp_path: Path, small_clip: str) -> None:
    """By name from a local file, through a run folder, and without our wrapping."""
    open_clip = openclip.module()
    torch.manual_seed(0)
    clip = open_clip.create_model(small_clip, pretrained=None).eval()
    torch.save(clip.state_dict(), tmp_path / "weights.pt")
    encoder = load_model(f"{small_clip}:{tmp_path / 'weights.pt'}")
    save_model(encoder, tmp_path)
    tokens = open_clip.get_tokenizer(small_clip)(CAPTIONS)
    with torch.no_grad():
        wanted = clip.encode_text(tokens, normalize=True).numpy()
    assert np.allclose(encoder.encode_texts(CAPTIONS), wanted, atol=1e-5)
    again = load_model(tmp_path)
    assert again.identity == encoder.identity
    assert again.preprocess == encoder.preprocess
    assert again.preprocess.resize_mode == "shortest"
    # Weights that are loaded are not drawn before: none may be left as memory happened to be.
    for name, weight in clip.state_dict().items():
        assert torch.equal(encoder.towers.state_dict()[f"clip.{name}"], weight)


def test_a_network_without_weights_holds_none(small_clip: str) -> None:
    """What a checkpoint does not cover is not whatever the memory held."""
    architecture = {"kind": "open_clip", "name": small_clip}
    built = openclip.build(architecture)
    assert all(weight.is_meta for weight in built.parameters())
    assert not any(buffer.is_meta for buffer in built.buffers())
    blank = openclip.blank(architecture)
    assert all(weight.isnan().all() for weight in blank.parameters())
    assert torch.equal(blank.attn_mask, openclip.module().create_model(small_clip).attn_mask)


def test_nothing_is_unpickled(tmp_path: Path, small_clip: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (Path(tmp_path / "exploded"),))  # type: ignore[return-value]

    torch.save({"state_dict": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(f"{small_clip}:{tmp_path / 'bomb.pt'}")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "json", "foreign"])
def test_damaged_runs_are_refused_in_one_line(run: Path, tmp_path: Path, damage: str) -> None:
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    weights = weights_of(broken)
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "flip":
        weights.write_bytes(b"\xff" * 8 + weights.read_bytes()[8:])
    elif damage == "missing":
        weights.unlink()
    elif damage == "json":
        (broken / "model.json").write_text("{")
    else:
        description = json.loads((broken / "model.json").read_text())
        description["architecture"]["text_width"] = 64
        (broken / "model.json").write_text(json.dumps(description))
    with pytest.raises(ModelError, match=str(broken)) as caught:
        load_model(broken)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/run", "no such run folder"),
        ("nosuchrun", "neither a run folder nor an open_clip model"),
        ("ViT-B-33:openai", "did you mean 'ViT-B-32'"),
        ("ViT-B-32", "no weights given: write ViT-B-32:TAG"),
        ("ViT-B-32:opanai", "openai"),
    ],
)
def test_unknown_models_say_what_is_known(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(name)


def test_a_mismatched_torchvision_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.__import__

    def refuse(name: str, *args: object, **words: object) -> object:
        if name == "open_clip":
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name, *args, **words)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InstallError, match="CPU-only pair"):
        openclip.module()
