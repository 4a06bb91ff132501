"""One encoder, one Searcher, one store, many threads: the answers of one thread, bit for bit."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from many_threads import together

from mmalign import Searcher, kernels, load_model, open_store
from mmalign.errors import ModelError, StoreError
from mmalign.index import Exact, Index
from mmalign.model import PRESETS, Encoder, in_precision, new_model, openclip, save_model
from mmalign.search import snapshot as search_module
from mmalign.store import Store
from mmalign.store.where import where

TEXTS = ["a red circle", "two blue squares left of a star", "", "一个红色圆形"]
# Batch norms, and patches that are dropped while training.
NORMS = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "patch_size": None}
DROPS = {"layers": 2, "width": 64, "patch_size": 16, "patch_dropout": 0.5}


@pytest.fixture(scope="module")
def architectures(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Small open_clip architectures whose training mode computes something else."""
    folder = tmp_path_factory.mktemp("architectures")
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    for name, vision in (("small-norms", NORMS), ("small-drops", DROPS)):
        shape = {"embed_dim": 32, "vision_cfg": {"image_size": 64, **vision}, "text_cfg": text}
        (folder / f"{name}.json").write_text(json.dumps(shape))
    openclip.module().add_model_config(folder)


def make(name: str, run: Path) -> Encoder:
    """Build a model, save it and load it, as people do."""
    torch.manual_seed(0)
    encoder = new_model(name, TEXTS) if name in PRESETS else openclip.load(name, None)
    run.mkdir()
    save_model(encoder, run)
    return load_model(run)


@pytest.mark.parametrize("name", [*PRESETS, "small-norms", "small-drops"])
def test_one_encoder_serves_many_threads(name: str, architectures: None, tmp_path: Path) -> None:
    encoder = make(name, tmp_path / "run")
    assert not encoder.towers.training
    side = 32 if encoder.towers.any_size else encoder.preprocess.size
    pixels = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    before = {key: value.clone() for key, value in encoder.towers.state_dict().items()}
    wanted = encoder.encode_images(pixels), encoder.encode_texts(TEXTS)
    for found in together(lambda: (encoder.encode_images(pixels), encoder.encode_texts(TEXTS))):
        assert np.array_equal(found[0], wanted[0])
        assert np.array_equal(found[1], wanted[1])
    assert not any(module.training for module in encoder.towers.modules())
    after = encoder.towers.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_other_precisions_serve_many_threads(precision: str, small_clip: str) -> None:
    torch.manual_seed(0)
    encoder, got = in_precision(openclip.load(small_clip, None), precision)  # type: ignore[arg-type]
    assert got == precision
    modes = [module.training for module in encoder.towers.modules()]
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    wanted = encoder.encode_images(pixels), encoder.encode_texts(TEXTS)
    for found in together(lambda: (encoder.encode_images(pixels), encoder.encode_texts(TEXTS))):
        assert np.array_equal(found[0], wanted[0])
        assert np.array_equal(found[1], wanted[1])
    assert [module.training for module in encoder.towers.modules()] == modes
    again = encoder.encode_images(pixels), encoder.encode_texts(TEXTS)
    assert all(np.array_equal(a, b) for a, b in zip(again, wanted, strict=True))


def test_encoding_in_training_mode_is_refused() -> None:
    encoder = new_model("nano", TEXTS)
    encoder.towers.train()
    with pytest.raises(ModelError, match="in training mode"):
        encoder.encode_texts(TEXTS)
    assert encoder.towers.training


def test_one_searcher_serves_many_threads(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [Searcher.open(store).search_many(TEXTS[:2], 5, to=to) for to in ("image", "text")]  # type: ignore[arg-type]
    opened: list[str] = []
    real = search_module.open_index

    def count(folder: Path | None, modality: str, shards: list[np.ndarray], owners: Any) -> Index:
        opened.append(modality)
        return real(folder, modality, shards, owners)

    monkeypatch.setattr(search_module, "open_index", count)
    # So that some of the searches prepare vectors, and some are under way meanwhile.
    monkeypatch.setattr("mmalign.index.exact.CODED_AFTER", 20)
    searcher = Searcher.open(store)
    for found in together(
        lambda: [searcher.search_many(TEXTS[:2], 5, to=to) for to in ("image", "text")]  # type: ignore[arg-type]
    ):
        assert found == wanted
    assert sorted(opened) == ["image", "text"]


def test_vectors_are_prepared_and_coded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).normal(size=(500, 32)).astype(np.float16)
    queries = np.random.default_rng(1).normal(size=(2, 32)).astype(np.float32)
    monkeypatch.setattr("mmalign.index.exact.CODED_AFTER", 20)
    made: list[str] = []
    prepare, coded = kernels.prepare, kernels.add_codes
    monkeypatch.setattr(kernels, "prepare", lambda *a: made.append("norms") or prepare(*a))
    monkeypatch.setattr(kernels, "add_codes", lambda *a: made.append("codes") or coded(*a))
    wanted = Exact([rows]).search(queries, 5)
    made.clear()
    index = Exact([rows])
    for scores, numbers in together(lambda: index.search(queries, 5)):
        assert np.array_equal(scores, wanted[0])
        assert np.array_equal(numbers, wanted[1])
    if index.coding_thread is not None:
        index.coding_thread.join()
    assert made == ["norms", "codes"] or (made == ["norms"] and not kernels.has_int8())


def test_damage_that_many_threads_meet_is_said_once(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Damaged(Exact):
        def search(self, *args: object, **words: object) -> tuple[np.ndarray, np.ndarray]:
            raise StoreError("returns rows beyond")

    searcher = Searcher.open(store)
    wanted = searcher.search("a red circle", exact=True)
    monkeypatch.setattr(
        search_module, "open_index", lambda folder, to, shards, owners: Damaged(shards)
    )
    for found in together(lambda: searcher.search("a red circle")):
        assert found == wanted
    assert capsys.readouterr().err.count("returns rows beyond") == 1


def test_one_store_serves_many_threads(store: Path, tmp_path: Path) -> None:
    alone = open_store(store)
    ids = alone.column("id")[::7]
    half = f"id in ({', '.join(map(repr, alone.column('id')[::2]))})"

    def answers(opened: Store) -> tuple[object, ...]:
        """Whatever is computed at the first call and kept, and all ways to read."""
        kinds = ("image", "text")
        return (
            opened.find(ids).tolist(),
            opened.rows([5, 90], ("captions", "meta")),
            opened.owners("text").tolist(),
            where(opened, half).tolist(),
            [v.tobytes() for kind in kinds for v in opened.vectors(kind)],
            [opened.vectors_of(kind, 90).tobytes() for kind in kinds],
            opened.column("uri"),
        )

    wanted = answers(alone)
    shared = open_store(shutil.copytree(store, tmp_path / "copy.store"))
    for found in together(lambda: answers(shared)):
        assert found == wanted
