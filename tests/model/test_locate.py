"""A store finds its model by identity or space, wherever either was moved."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign import load_model
from mmalign.errors import IdentityError, ModelError
from mmalign.model import (
    Encoder,
    find_model,
    keep_weights,
    locate,
    new_model,
    openclip,
    remember,
    save_model,
)

CAPTIONS = ["a red circle", "two dogs run"]


@pytest.fixture
def run(tmp_path: Path, pico: str) -> Path:
    """A run in a folder of runs, as a store in `tmp_path` / store recorded it."""
    return saved(tmp_path / "here" / "runs" / "photos", pico)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """The folder of a store beside the folder of runs."""
    folder = tmp_path / "here" / "photos.store"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def space(run: Path) -> str:
    return str(described(run)["space"])


def saved(folder: Path, preset: str) -> Path:
    folder.mkdir(parents=True)
    save_model(new_model(preset, CAPTIONS), folder)
    return folder


def described(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "model.json").read_text(encoding="utf-8"))
    return content


def trained_further(run: Path) -> None:
    """Save other weights in a run."""
    encoder = load_model(run)
    with torch.no_grad():
        for weight in encoder.towers.parameters():
            weight += 0.1
    save_model(encoder, run)


def test_a_run_in_its_place_is_found_by_its_space(run: Path, space: str) -> None:
    assert find_model(str(run), space).source == str(run)


def test_a_run_in_its_place_is_found_by_the_identity_of_format_2(run: Path) -> None:
    identity = described(run)["identity"]
    assert find_model(str(run), identity).identity == identity


def test_a_run_that_was_moved_is_found_where_it_was_last_loaded(
    run: Path, store: Path, space: str, tmp_path: Path
) -> None:
    moved = shutil.move(run, tmp_path / "elsewhere")
    remember(load_model(moved))
    assert find_model(str(run), space, near=store).source == str(moved)


def test_a_model_is_remembered_by_the_identity_of_format_2_too(
    run: Path, space: str, tmp_path: Path
) -> None:
    identity = described(run)["identity"]
    moved = shutil.move(run, tmp_path / "elsewhere")
    remember(load_model(moved))
    assert find_model(str(run), identity).source == str(moved)


def test_a_run_that_was_moved_together_with_its_store_is_found(
    run: Path, store: Path, space: str, tmp_path: Path
) -> None:
    shutil.move(tmp_path / "here", tmp_path / "there")
    there = tmp_path / "there"
    found = find_model(str(run), space, near=there / store.name)
    assert found.source == str(there / "runs" / "photos")


def test_a_run_from_windows_that_was_moved_together_with_its_store_is_found(
    run: Path, store: Path, space: str
) -> None:
    found = find_model(r"C:\work\here\runs\photos", space, near=store)
    assert found.source == str(run)


def test_a_run_under_another_name_beside_its_store_is_found(
    run: Path, store: Path, space: str, pico: str
) -> None:
    saved(store.parent / "a other run", pico)
    renamed = shutil.move(run, store.parent / "renamed")
    assert find_model(str(run), space, near=store).source == str(renamed)


def test_a_model_that_was_found_is_remembered(
    run: Path, store: Path, space: str, tmp_path: Path
) -> None:
    renamed = shutil.move(run, store.parent / "renamed")
    find_model(str(run), space, near=store)
    assert find_model(str(run), space, near=tmp_path / "other.store").source == str(renamed)


def test_earlier_weights_of_a_run_are_found_beside_a_store(
    run: Path, store: Path, space: str
) -> None:
    keep_weights(load_model(run))
    trained_further(run)
    renamed = shutil.move(run, store.parent / "renamed")
    found = find_model(str(run), space, near=store)
    assert (found.source, found.space) == (str(renamed), space)


def test_another_model_in_the_recorded_place_is_passed_over(
    run: Path, space: str, tmp_path: Path, pico: str
) -> None:
    moved = shutil.move(run, tmp_path / "elsewhere")
    remember(load_model(moved))
    saved(run, pico)
    assert find_model(str(run), space).source == str(moved)


def forget_space(run: Path) -> None:
    """Describe a run as versions without spaces did."""
    new = ("identity", "space", "towers", "origin")
    old = {k: v for k, v in described(run).items() if k not in new}
    (run / "model.json").write_text(json.dumps(old))


def test_a_run_that_recorded_no_space_is_found_in_its_place(run: Path, space: str) -> None:
    forget_space(run)
    assert find_model(str(run), space).space == space


def test_a_run_that_recorded_no_space_and_was_moved_with_its_store_is_found(
    run: Path, store: Path, space: str, tmp_path: Path
) -> None:
    forget_space(run)
    there = Path(shutil.move(tmp_path / "here", tmp_path / "there"))
    assert find_model(str(run), space, near=there / store.name).space == space


def test_a_damaged_run_in_the_recorded_place_is_passed_over(
    run: Path, space: str, tmp_path: Path
) -> None:
    copy = shutil.copytree(run, tmp_path / "elsewhere")
    remember(load_model(copy))
    (run / "model.json").write_text("{")
    assert find_model(str(run), space).source == str(copy)


@pytest.fixture
def weights(small_clip: str, tmp_path: Path) -> str:
    """The name of an open_clip model with weights in a file."""
    torch.manual_seed(0)
    network = openclip.module().create_model(small_clip)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    return f"{small_clip}:{tmp_path / 'weights.pt'}"


def test_an_open_clip_model_is_found_by_its_space(weights: str) -> None:
    space = load_model(weights).space
    assert find_model(weights, space).source == weights


def test_an_open_clip_model_that_was_moved_is_found_where_it_was_last_loaded(
    weights: str, tmp_path: Path, small_clip: str
) -> None:
    space = load_model(weights).space
    moved = shutil.move(tmp_path / "weights.pt", tmp_path / "moved.pt")
    remember(load_model(f"{small_clip}:{moved}"))
    assert find_model(weights, space).source == f"{small_clip}:{moved}"


def test_a_tower_that_is_known_spares_the_hash_of_the_other(
    weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = load_model(weights)
    hashed = []
    real = Encoder.tower_identity_with

    def noted(self: Encoder, modality: str, state: Mapping[str, Tensor]) -> str:
        hashed.append(modality)
        return real(self, modality, state)

    text = {"text": known.tower_identity("text")}
    space = known.space
    monkeypatch.setattr(Encoder, "tower_identity_with", noted)
    find_model(weights, space, towers=text)
    assert hashed == ["text"]


def test_a_tower_of_another_model_is_not_enough(weights: str) -> None:
    with pytest.raises(IdentityError, match="is small-clip-"):
        find_model(weights, "small-clip-0000", towers={"text": "text-0000"})


def test_a_model_that_is_nowhere_is_named_with_the_places_and_the_remedy(
    run: Path, store: Path, space: str
) -> None:
    shutil.rmtree(run)
    with pytest.raises(ModelError) as caught:
        find_model(str(run), space, near=store)
    said = str(caught.value)
    assert "\n" not in said
    for part in (space, f"{run} does not exist", str(store), "--model"):
        assert part in said


def test_a_model_that_is_another_one_is_an_error_of_identity(
    run: Path, space: str, pico: str
) -> None:
    shutil.rmtree(run)
    saved(run, pico)
    with pytest.raises(IdentityError, match=f"{run} holds another model"):
        find_model(str(run), space)


def test_the_fault_of_an_earlier_version_is_named(
    small_clip: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Encoder, "former_fault", lambda *_: "an earlier version was wrong")
    with pytest.raises(IdentityError, match="an earlier version was wrong"):
        find_model(weights, "small-clip-0000")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"{}", b'{"source": "x"}', b"7"])
def test_a_damaged_memory_is_passed_over_and_mended(
    content: bytes, run: Path, space: str, home: Path, tmp_path: Path
) -> None:
    remember(load_model(run))
    files = list(home.rglob("*.json"))
    for file in files:
        file.write_bytes(content)
    moved = shutil.move(run, tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="does not exist"):
        find_model(str(run), space)
    remember(load_model(moved))
    assert find_model(str(run), space).source == str(moved)


def test_a_home_that_cannot_be_written_is_no_error(
    run: Path, space: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("MMALIGN_HOME", str(tmp_path / "file"))
    remember(load_model(run))
    assert find_model(str(run), space).source == str(run)


def test_without_a_home_nothing_is_remembered(
    run: Path, space: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MMALIGN_HOME")
    monkeypatch.setattr(locate, "user_folder", lambda: None)
    remember(load_model(run))
    moved = shutil.move(run, tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="does not exist"):
        find_model(str(run), space)
    assert find_model(str(moved), space).source == str(moved)


def test_models_are_remembered_in_the_folder_of_the_system(
    run: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MMALIGN_HOME")
    monkeypatch.setattr(locate, "user_folder", lambda: tmp_path / "cache")
    remember(load_model(run))
    assert len(list((tmp_path / "cache" / "models").iterdir())) == 2
    assert not home.exists()


def test_a_model_that_was_never_saved_is_not_remembered(pico: str, home: Path) -> None:
    remember(new_model(pico, CAPTIONS))
    assert not home.exists()
