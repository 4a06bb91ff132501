"""`mmalign search FOLDER`: a folder of images searched without a store of one's own."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command import answer, call, complaint
from conftest import jpeg, write_pairs

from mmalign.cli import folder as folders
from mmalign.model import openclip
from mmalign.store import open_store


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMALIGN_STORES", str(tmp_path / "stores"))
    return write_pairs(tmp_path / "photos", 12)


def names(found: dict[str, Any]) -> set[str]:
    return {Path(hit["uri"]).name for hit in found["hits"]}


def test_a_folder_is_embedded_and_kept_up_to_date(photos: Path, run: Path, tmp_path: Path) -> None:
    first = call("search", photos, "red", "--model", run, "-k", "20", "--json")
    assert first.exit_code == 0
    assert "12 added" in first.stderr
    (store,) = (tmp_path / "stores").iterdir()
    assert str(store) in first.stderr
    assert not [p for p in photos.iterdir() if p.suffix not in (".jpg", ".json")]
    (photos / "new.jpg").write_bytes(jpeg(99))
    (photos / "000.jpg").unlink()
    # The model is that of the store.
    found = names(answer("search", photos, "red", "-k", "20"))
    assert found == {"new.jpg", *(f"{i:03d}.jpg" for i in range(1, 12))}
    assert len(list((tmp_path / "stores").iterdir())) == 1


def test_here_keeps_it_in_the_folder(photos: Path, run: Path, tmp_path: Path) -> None:
    answer("search", photos, "red", "--model", run, "--here")
    assert (photos / ".mmalign.store").is_dir()
    assert not (tmp_path / "stores").exists()
    # It is found there from then on, and it is no source of images.
    assert len(answer("search", photos, "red", "-k", "50")["hits"]) == 12


def test_folders_of_one_name_do_not_mix(photos: Path, run: Path, tmp_path: Path) -> None:
    other = write_pairs(tmp_path / "more" / "photos", 3)
    assert len(answer("search", photos, "red", "--model", run, "-k", "50")["hits"]) == 12
    assert len(answer("search", other, "red", "--model", run, "-k", "50")["hits"]) == 3
    # A link to a folder is that folder.
    link = tmp_path / "link"
    link.symlink_to(other)
    assert len(answer("search", link, "red", "-k", "50")["hits"]) == 3
    assert len(list((tmp_path / "stores").iterdir())) == 2


def test_an_unplugged_drive_empties_no_store(photos: Path, run: Path, tmp_path: Path) -> None:
    answer("search", photos, "red", "--model", run)
    for number in range(3, 12):
        (photos / f"{number:03d}.jpg").unlink()
    done = call("search", photos, "red", "-k", "50", "--json")
    assert "more than a tenth" in done.stderr
    (store,) = (tmp_path / "stores").iterdir()
    assert len(open_store(store)) == 12
    call("search", photos, "red", "--yes")
    assert len(open_store(store)) == 3


def test_an_empty_folder_is_said_and_leaves_nothing(
    run: Path, tmp_path: Path, photos: Path
) -> None:
    (tmp_path / "empty").mkdir()
    assert "no images found" in complaint(1, "search", tmp_path / "empty", "q", "--model", run)
    assert not (tmp_path / "stores").exists()
    assert "not a store" in complaint(1, "search", tmp_path / "nowhere", "q")


def test_an_empty_folder_is_said_before_a_model_is_asked_for(
    tmp_path: Path, photos: Path, stub: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").write_text("no image")
    for command in (["search", tmp_path / "empty", "q"], ["watch", tmp_path / "empty"]):
        said = complaint(1, *command, "--yes")
        assert "no images found among 1 .md" in said
    assert not stub.exists()
    assert not (tmp_path / "stores").exists()


def test_a_folder_without_changes_needs_no_model_before_the_search(
    photos: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer("search", photos, "red", "--model", run)
    done = call("search", photos, "red", "-k", "50", "--json")
    assert "already there" not in done.stderr
    assert len(json.loads(done.stdout)["hits"]) == 12


def test_a_store_that_lost_its_manifests_is_no_folder_of_images(
    store: Path, tmp_path: Path, photos: Path
) -> None:
    shutil.copytree(store, tmp_path / "broken.store")
    for manifest in (tmp_path / "broken.store").glob("manifest-*.json"):
        manifest.unlink()
    assert "not a store" in complaint(1, "search", tmp_path / "broken.store", "q")


@pytest.fixture
def stub(small_clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A default model whose download copies a file; the file tells whether it happened."""
    weights = tmp_path / "public.pt"
    torch.save(openclip.load(small_clip, None).towers.clip.state_dict(), weights)  # type: ignore[union-attr]
    asked = tmp_path / "downloaded.pt"

    def download(cfg: dict[str, Any]) -> str:
        shutil.copyfile(weights, asked)
        return str(asked)

    public = openclip.part("pretrained")
    cfg = {"url": "", "hf_hub": "some/model/", "mean": None, "std": None}
    monkeypatch.setitem(public._PRETRAINED, small_clip, {"stub": cfg})
    monkeypatch.setattr(public, "download_pretrained", download)
    monkeypatch.setattr("mmalign.model.openclip.require_network", lambda *_: None)
    monkeypatch.setattr(folders, "NAME", small_clip)
    monkeypatch.setattr(folders, "TAG", "stub")
    monkeypatch.setattr(folders, "NEEDS", "torch")
    return asked


def test_the_default_model_is_asked_for(photos: Path, stub: Path) -> None:
    refused = complaint(2, "search", photos, "red")
    assert "--yes" in refused
    assert "--model NAME:FILE" in refused
    assert not stub.exists()
    done = call("search", photos, "red", "--yes")
    assert done.exit_code == 0, done.stderr
    assert "1.5 GB, licence MIT" in done.stderr
    assert stub.exists()


@pytest.mark.parametrize(("reply", "code"), [("y\n", 0), ("n\n", 2)])
def test_a_person_is_asked(
    reply: str, code: int, photos: Path, stub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmalign.cli.folder.is_answered", lambda: True)
    done = call("search", photos, "red", typed=reply)
    assert done.exit_code == code
    assert "Download it?" in done.stderr
    assert stub.exists() == (code == 0)


def test_a_missing_package_is_said_before_a_download(
    photos: Path, stub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "NEEDS", "nosuchpackage")
    assert "pip install nosuchpackage" in complaint(2, "search", photos, "red", "--yes")
    assert not stub.exists()
