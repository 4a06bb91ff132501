"""Training: it learns, it resumes exactly, and it stops with a clear message."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, weights_of, write_pairs
from safetensors.torch import load_file

from mmalign import Searcher, load_model
from mmalign.data import Augment, scan
from mmalign.errors import ConfigError, DataError, ModelError, TrainingError, UsageError
from mmalign.model import (
    drop_weights,
    keep_weights,
    new_model,
    save_description,
    save_model,
)
from mmalign.optimization import Arithmetic, Average, fastest
from mmalign.pairs import can_mirror, load_pairs
from mmalign.train import TrainConfig, configure, train
from mmalign.trainer import Trainer
from mmalign.words import WordHead


def rows_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_folder_holds_what_it_should(run: Path) -> None:
    names = {p.name for p in run.iterdir() if p.suffix != ".kept"}
    assert names == {
        "config.toml", "events", "metrics.jsonl", "model.json", weights_of(run).name, "state.pt",
        "tokenizer.json",
    }  # fmt: skip
    assert weights_of(run).stem == load_model(run).identity.replace("nano", "model")
    last = rows_of(run)[-1]
    assert last["step"] == 9
    assert 0 <= last["wait_share"] <= 1
    assert {"loss", "samples_per_s", "image_retrieval_recall@10"} <= last.keys()
    assert list((run / "events").iterdir())


def test_it_learns(tmp_path: Path, scenes: Path) -> None:
    """The same few scenes again and again: the right one comes among the first ten of 96."""
    config = replace(QUICK, epochs=40, learning_rate=2e-3, augment=Augment(1.0, colour=0, erase=0))
    result = train(config, [str(scenes)], tmp_path / "run", val=[str(scenes)])
    assert result["image_retrieval_recall@10"] > 0.5  # by chance: 0.10
    assert result["loss"] < 2.0  # at the start: ln 32 = 3.5


@pytest.mark.parametrize("loss", ["infonce", "siglip"])
def test_resuming_repeats_an_unbroken_run(tmp_path: Path, scenes: Path, loss: str) -> None:
    config = replace(QUICK, loss=loss, epochs=2)
    train(config, [str(scenes)], tmp_path / "whole")
    stopped = tmp_path / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        step = Trainer.step

        def interrupted(self: Trainer, batch: object) -> torch.Tensor:
            if self.state.step == 4:
                raise KeyboardInterrupt
            return step(self, batch)  # type: ignore[arg-type]

        patch.setattr(Trainer, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config, [str(scenes)], stopped)
    train(config, [str(scenes)], stopped, resume=True)
    a, b = (load_file(weights_of(f)) for f in (tmp_path / "whole", stopped))
    # Bit for bit where the same arithmetic is chosen both times, which a busy machine may upset.
    assert all(torch.allclose(a[k].float(), b[k].float(), atol=5e-3) for k in a)
    whole, resumed = (torch.load(f / "state.pt") for f in (tmp_path / "whole", stopped))
    assert whole["step"] == resumed["step"] == 6


def test_fine_tuning_starts_from_the_given_weights(tmp_path: Path, small_clip: str) -> None:
    from mmalign.model import openclip

    source = [str(write_pairs(tmp_path / "pairs", 8))]
    torch.manual_seed(1)
    clip = openclip.module().create_model(small_clip, pretrained=None)
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    config = replace(
        QUICK, preset="tiny", model=small_clip, pretrained=str(tmp_path / "clip.pt"),
        epochs=1, batch_size=4, learning_rate=1e-9, captions_per_image=1,
    )  # fmt: skip
    train(config, source, tmp_path / "run", val=source)
    tuned = load_model(tmp_path / "run").encode_texts(["a dog"])
    given = load_model(f"{small_clip}:{tmp_path / 'clip.pt'}").encode_texts(["a dog"])
    assert np.allclose(tuned, given, atol=1e-3)


def test_a_nan_loss_stops_and_keeps_good_weights(tmp_path: Path, scenes: Path) -> None:
    config = replace(QUICK, learning_rate=1e30, clip_norm=1e30)
    with pytest.raises(TrainingError, match="learning_rate"):
        train(config, [str(scenes)], tmp_path / "run")
    with pytest.raises(ModelError, match="no trained weights yet"):
        load_model(tmp_path / "run")


def test_a_batch_larger_than_the_data(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs", 10)
    with pytest.raises(TrainingError, match=r"batch_size=32 is larger than the 10 .* batch_size=8"):
        train(QUICK, [str(source)], tmp_path / "run")


def test_an_empty_source(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images found"):
        train(QUICK, [str(tmp_path / "empty")], tmp_path / "run")


def test_a_run_is_never_overwritten(run: Path, scenes: Path) -> None:
    with pytest.raises(UsageError, match="--resume"):
        train(QUICK, [str(scenes)], run)


def test_fine_tuning_has_milder_defaults() -> None:
    scratch, tuned = configure({}), configure({"model": "x", "augment": {"erase": 0.1}})
    assert tuned.learning_rate < scratch.learning_rate
    assert (tuned.word_loss, tuned.caption_loss) == (0, 0)
    assert (tuned.augment.crop_min, tuned.augment.erase) == (0.9, 0.1)
    assert configure({"model": "x", "learning_rate": 1e-3}).learning_rate == 1e-3


def test_words_are_learned_by_rarity() -> None:
    """A token in every caption weighs nothing; the image that says its own words is cheaper."""
    tokens = torch.tensor([[1, 2, 0], [1, 3, 0], [1, 4, 4], [1, 5, 0]])
    head = WordHead(4, tokens)
    assert head.idf_V[:2].tolist() == [0, 0]
    assert torch.allclose(head.idf_V[2:], torch.tensor(2.0).log())
    with torch.no_grad():
        head.score.weight.zero_()
        head.score.bias.zero_()
        head.score.weight[2, 0] = head.score.weight[3, 1] = 1.0
    images = torch.eye(4)[:2]
    right = head(images, tokens[:2, None])
    wrong = head(images.flip(0), tokens[:2, None])
    assert right < 0.01 < wrong


def test_a_complete_run_is_not_trained_on(run: Path, scenes: Path) -> None:
    before = weights_of(run).read_bytes()
    with pytest.raises(UsageError, match="training is complete"):
        train(QUICK, [str(scenes)], run, val=[str(scenes)], resume=True)
    assert weights_of(run).read_bytes() == before


def test_weights_need_an_architecture(tmp_path: Path, scenes: Path) -> None:
    with pytest.raises(ConfigError, match="pretrained needs model"):
        train(replace(QUICK, pretrained="x"), [str(scenes)], tmp_path / "run")


def test_some_are_held_out_where_no_validation_is_given(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs", 220)
    config = TrainConfig(preset="nano", epochs=1, batch_size=64, validations=1)
    result = train(config, [str(source)], tmp_path / "run")
    assert "image_retrieval_recall@10" in result


def test_mirroring_follows_the_captions(tmp_path: Path, scenes: Path) -> None:
    assert not can_mirror(scan([str(scenes)]).records)
    assert can_mirror(scan([str(write_pairs(tmp_path / "pairs", 3))]).records)


def test_a_batch_joins_images_with_their_own_captions(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs", 12)
    records = scan([str(source)], caption_keys=("captions", "captions_zh")).records
    encoder = new_model("nano", [c for r in records for c in r.captions])
    pairs, _ = load_pairs(encoder, records, tmp_path / "c.npy", crops=False, label="decode")
    draw = next(pairs.sampler(4, 2, seed=0).draws())
    batch = pairs.batch(draw)
    assert batch.images_B3SS.shape == (4, 3, 64, 64)
    owners = pairs.owners_P[draw.captions_BC]
    assert np.array_equal(owners, np.repeat(draw.rows_B[:, None], 2, axis=1))
    captions = [c for r in records for c in r.captions]
    wanted = encoder.tokenizer([captions[i] for i in draw.captions_BC[:, 0]])
    assert torch.equal(batch.tokens_BCT[:, 0, : wanted.shape[1]], wanted)


def test_equal_captions_share_a_group(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    write_pairs(folder, 3)
    for name in ("000", "002"):
        (folder / f"{name}.json").write_text('{"captions": ["the same"]}')
    records = scan([str(folder)]).records
    encoder = new_model("nano", ["the same"])
    pairs, _ = load_pairs(encoder, records, tmp_path / "c.npy", crops=False, label="decode")
    groups = pairs.groups_P.tolist()
    assert groups[0] == groups[-1]
    assert len(set(groups)) == 3


def test_the_average_lends_and_returns(run: Path) -> None:
    towers = load_model(run).towers
    average = Average(towers, 0.9)
    before = {k: v.clone() for k, v in towers.state_dict().items()}
    with torch.no_grad():
        for weight in towers.parameters():
            weight += 1
    moved = {k: v.clone() for k, v in towers.state_dict().items()}
    towers.train()
    with average.applied(towers):
        assert not towers.training
        assert all(torch.equal(v, before[k]) for k, v in towers.state_dict().items())
    assert towers.training
    assert all(torch.equal(v, moved[k]) for k, v in towers.state_dict().items())


def test_choosing_an_arithmetic_changes_no_weights(run: Path) -> None:
    encoder = load_model(run)
    encoder.towers.train()
    before = {k: v.clone() for k, v in encoder.towers.state_dict().items()}
    pixels = torch.randint(0, 255, (8, 3, 64, 64), dtype=torch.uint8)
    chosen = fastest(
        encoder.towers, lambda: encoder.image_vectors(pixels), torch.device("cpu"), is_image=True
    )
    assert isinstance(chosen, Arithmetic)
    assert all(torch.equal(v, before[k]) for k, v in encoder.towers.state_dict().items())
    assert all(p.grad is None for p in encoder.towers.parameters())


@pytest.mark.parametrize("part_size", [5, 32])
def test_a_batch_in_parts(part_size: int, tmp_path: Path, scenes: Path) -> None:
    """Parts train as a batch does, up to the batch norms, which see a part at a time."""
    config = replace(QUICK, epochs=2, part_size=part_size)
    train(config, [str(scenes)], tmp_path / "run")
    train(replace(config, part_size=None), [str(scenes)], tmp_path / "whole")
    last, truth = (
        json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[-1])
        for run in ("run", "whole")
    )
    assert last["step"] == truth["step"]
    assert last["loss"] == pytest.approx(truth["loss"], rel=0.2)


def test_a_store_outlives_further_training(
    run: Path, store: Path, scenes: Path, tmp_path: Path
) -> None:
    """Weights that a store was made with stay beside better ones, and are found by identity."""
    before = load_model(run).identity
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    config = replace(QUICK, epochs=4, learning_rate=1e-2)
    train(config, [str(scenes)], folder, resume=True)
    assert load_model(folder).identity != before
    assert load_model(folder, before).identity == before
    hits = Searcher.open(store, folder).search("a red star", 1)
    assert len(hits) == 1


def test_training_drops_only_weights_that_nobody_keeps(tmp_path: Path) -> None:
    encoder, names = new_model("nano", ["a"]), []
    for step in (1, 2):
        with torch.no_grad():
            encoder.towers.log_scale += 1
        names.append(save_model(encoder, tmp_path, steps=step))
        if step == 1:
            keep_weights(load_model(tmp_path))
    for name in names:
        drop_weights(tmp_path, name)
    assert [(tmp_path / name).exists() for name in names] == [True, False]


def test_a_run_without_a_validation_is_no_model_yet(tmp_path: Path) -> None:
    save_description(new_model("nano", ["a"]), tmp_path)
    with pytest.raises(ModelError, match=f"no trained weights yet.*--out {tmp_path} --resume"):
        load_model(tmp_path)
