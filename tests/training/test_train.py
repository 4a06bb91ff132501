"""Training: it learns, it resumes exactly, and it stops with a clear message."""

import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import QUICK, jpeg, weights_of, write_pairs
from PIL import Image

from mmalign import Searcher, load_model
from mmalign.cli.main import main
from mmalign.data import Augment, Record, scan
from mmalign.errors import ConfigError, DataError, ModelError, TrainingError, UsageError
from mmalign.evaluation.evaluate import evaluate
from mmalign.kernels.pair_ids import share_an_id
from mmalign.model import (
    Origin,
    drop_weights,
    keep_weights,
    new_model,
    save_description,
    save_model,
)
from mmalign.training.optimization import Arithmetic, Average, fastest_arithmetic, learning_rate
from mmalign.training.pairs import can_mirror, load_pairs
from mmalign.training.token_prediction import TokenHead
from mmalign.training.train import _new_encoder, configure, held_out_images, train
from mmalign.training.trainer import State, Trainer

pytestmark = pytest.mark.usefixtures("pico")
TINY = replace(QUICK, preset="pico")


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


def colours(folder: Path, *, held_out: bool) -> str:
    """Draw plain colours that three words name: 48 of them, or the other 16 mixtures."""
    folder.mkdir()
    words = [f"{name}{level}" for name in ("red", "green", "blue") for level in "abcd"]
    for i, levels in enumerate(product(range(4), repeat=3)):
        if (sum(levels) % 4 == 0) is held_out:
            Image.new("RGB", (8, 8), tuple(85 * x for x in levels)).save(folder / f"{i}.png")
            caption = " ".join(words[4 * channel + x] for channel, x in enumerate(levels))
            (folder / f"{i}.txt").write_text(caption)
    return str(folder)


@pytest.mark.slow
def test_it_learns(tmp_path: Path) -> None:
    """Mixtures of colours that it never saw are found by the words of their parts."""
    train_on, held = (colours(tmp_path / str(h), held_out=h) for h in (False, True))
    config = replace(
        QUICK, batch_size=16, epochs=8, captions_per_image=1, learning_rate=2e-3,
        augment=Augment(1.0, colour=0, erase=0),
    )  # fmt: skip
    result = train([train_on], tmp_path / "run", config, val=[held])
    assert result["image_retrieval_recall@5"] > 0.7  # by chance: 0.31
    assert result["text_retrieval_recall@5"] > 0.7
    assert result["loss"] < 1.6  # at the start: ln 16 = 2.8


@pytest.mark.slow
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
    train(source, tmp_path / "run", config, val=source)
    tuned = load_model(tmp_path / "run").encode_texts(["a dog"])
    given = load_model(f"{small_clip}:{tmp_path / 'clip.pt'}").encode_texts(["a dog"])
    assert np.allclose(tuned, given, atol=1e-3)


def test_fine_tuning_knows_the_model_that_it_started_from(tmp_path: Path, small_clip: str) -> None:
    from mmalign.model import openclip

    clip = openclip.module().create_model(small_clip, pretrained=None)
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    given = load_model(f"{small_clip}:{tmp_path / 'clip.pt'}")
    config = replace(QUICK, preset="tiny", model=small_clip, pretrained=str(tmp_path / "clip.pt"))
    assert _new_encoder(config, []).origin == Origin(given.space, given.tower_identities)


def test_a_training_from_scratch_started_from_no_model(small_clip: str) -> None:
    config = replace(QUICK, preset="tiny", model=small_clip)
    assert _new_encoder(config, []).origin is None


def test_a_nan_loss_stops_and_keeps_good_weights(tmp_path: Path, scenes: Path) -> None:
    config = replace(TINY, learning_rate=1e30, clip_norm=1e30)
    with pytest.raises(TrainingError, match="learning_rate"):
        train([str(scenes)], tmp_path / "run", config)
    with pytest.raises(ModelError, match="no trained weights yet"):
        load_model(tmp_path / "run")


def test_a_batch_larger_than_the_data(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs", 10)
    with pytest.raises(TrainingError, match=r"batch_size=32 is larger than the 10 .* batch_size=8"):
        train([str(source)], tmp_path / "run", TINY)


def test_a_batch_of_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size=1 must be at least 2"):
        configure({"batch_size": 1})


def pairs_of(folder: Path, captions: list[str], *, one_image: bool = False) -> str:
    folder.mkdir()
    for i, caption in enumerate(captions):
        (folder / f"{i}.jpg").write_bytes(jpeg(0 if one_image else i))
        (folder / f"{i}.txt").write_text(caption)
    return str(folder)


@pytest.mark.parametrize(
    ("captions", "warning"),
    [
        (["same"] * 4, "all 4 {}images have the same captions and cannot be told apart, so "),
        (["a cat\na dog"] * 4, "all 4 {}images have the same captions"),
        (
            ["a cat"] * 3 + ["a dog"],
            "on average, a caption also fits 50% of the other {}images, so few",
        ),
    ],
)
def test_pairs_that_are_equal_are_a_warning(
    captions: list[str],
    warning: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The loss is 0 then, or low for no merit of the model; recall is by chance."""
    source = pairs_of(tmp_path / "pairs", captions)
    other = str(write_pairs(tmp_path / "other", 4))
    config = replace(TINY, batch_size=2, epochs=1)
    result = train([source], tmp_path / "a", config)
    assert f"warning: {warning.format('')}" in capsys.readouterr().err
    assert result["loss"] == 0 or "50%" in warning
    train([other], tmp_path / "b", config, val=[source])
    assert f"warning: {warning.format('validation ')}" in capsys.readouterr().err
    evaluate(run, [source])
    assert f"warning: {warning.format('')}" in capsys.readouterr().err


def test_images_that_are_all_equal_are_a_warning(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = pairs_of(tmp_path / "pairs", [f"word{i}" for i in range(4)], one_image=True)
    train([source], tmp_path / "run", replace(TINY, batch_size=2, epochs=1))
    assert "warning: all 4 images are equal and cannot be told apart" in capsys.readouterr().err
    evaluate(run, [source])
    assert "warning: all 4 images have the same vector" in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 2, 20, pytest.param(200, marks=pytest.mark.slow)])
def test_sets_of_any_size_are_trained_on_and_evaluated_from_the_shell(
    count: int, tmp_path: Path
) -> None:
    """With the settings of a newcomer; what a refusal proposes works."""
    pairs = write_pairs(tmp_path / "pairs", count)

    def call(*words: str | Path) -> Result:
        done = CliRunner().invoke(main, [str(word) for word in words])
        assert done.exception is None or isinstance(done.exception, SystemExit)
        return done

    words = ["train", "--data", pairs, "--out", tmp_path / "run", "--preset", "pico"]
    words += ["--set", "epochs=1"]
    done = call(*words)
    if count < 128:
        assert done.exit_code == 1
        assert done.stderr.splitlines()[-1].startswith("mmalign: ")
        remedy = re.findall(r"--set batch_size=\d+", done.stderr)
        if count == 1:
            assert not remedy
            assert "needs at least 2" in done.stderr
            return
        done = call(*words, *remedy[0].split())
    assert done.exit_code == 0, done.stderr
    # Of few images none is held out; what is held out is enough to choose by.
    assert ("validation_loss" in done.stdout) is (count == 200)
    assert "warning" not in done.stderr
    for some in (1, 2, count):
        part = write_pairs(tmp_path / f"eval{some}", some)
        done = call("evaluate", "--model", tmp_path / "run", "--data", part)
        assert done.exit_code == 0, done.stderr
        said = re.findall(r"warning: .* always 100 %", done.stderr)
        assert len(said) == (some <= 10), done.stderr


def test_an_empty_source(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images found"):
        train([str(tmp_path / "empty")], tmp_path / "run", QUICK)


def test_a_run_is_never_overwritten(run: Path, scenes: Path) -> None:
    with pytest.raises(UsageError, match="--resume"):
        train([str(scenes)], run, QUICK)


def test_fine_tuning_has_milder_defaults() -> None:
    scratch, tuned = configure({}), configure({"model": "x", "augment": {"erase": 0.1}})
    assert tuned.learning_rate < scratch.learning_rate
    assert (tuned.word_loss, tuned.caption_loss) == (0, 0)
    assert (tuned.augment.crop_min, tuned.augment.erase) == (0.9, 0.1)
    assert configure({"model": "x", "learning_rate": 1e-3}).learning_rate == 1e-3


def test_words_are_learned_by_rarity() -> None:
    """A token in every caption weighs nothing; the image that says its own words is cheaper."""
    tokens = torch.tensor([[1, 2, 0], [1, 3, 0], [1, 4, 4], [1, 5, 0]])
    head = TokenHead(4, torch.tensor([4, 4, 1, 1, 1, 1]), len(tokens))
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
        train([str(scenes)], run, QUICK, val=[str(scenes)], resume=True)
    assert weights_of(run).read_bytes() == before


def test_weights_need_an_architecture(tmp_path: Path, scenes: Path) -> None:
    with pytest.raises(ConfigError, match="pretrained needs model"):
        train([str(scenes)], tmp_path / "run", replace(QUICK, pretrained="x"))


def test_some_are_held_out_where_no_validation_is_given(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs", 20)
    config = replace(TINY, epochs=1, batch_size=4, held_out=0.2)
    result = train([str(source)], tmp_path / "run", config)
    assert "image_retrieval_recall@10" in result
    counts = [held_out_images(n, None) for n in (1, 2, 20, 199, 200, 600, 10_000, 1_000_000)]
    assert counts == [0, 0, 0, 0, 20, 50, 500, 1000]


def test_mirroring_follows_the_captions(tmp_path: Path, scenes: Path) -> None:
    assert not can_mirror(scan([str(scenes)]).records)
    assert can_mirror(scan([str(write_pairs(tmp_path / "pairs", 3))]).records)


@pytest.mark.parametrize(
    ("caption", "mirrors"),
    [
        ("a bright room with leftover bread, copyright reserved", True),
        ("about thirty: 三十左右", True),
        ("the LEFT door", False),
        ("the leftmost of three", False),
        ("a right-hand glove", False),
        ("狗在猫的左边", False),
        ("在left边", False),
    ],
)
def test_only_whole_words_say_left_and_right(caption: str, mirrors: bool) -> None:
    assert can_mirror([Record("a", "a", "a", captions=(caption,))]) is mirrors


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A trainer over 12 images whose neighbours share captions, in parts of 2; not begun."""
    folder = tmp_path_factory.mktemp("trainer")
    for i in range(12):
        (folder / f"{i:02}.jpg").write_bytes(jpeg(i))
        (folder / f"{i:02}.txt").write_text(f"word{i}\nword{(i + 1) % 12}\nmore of {i}")
    records = scan([str(folder)], need_captions=True).records
    encoder = new_model("pico", [c for r in records for c in r.captions])
    config = replace(TINY, batch_size=8, part_size=2, captions_per_image=1, arithmetic="auto")
    pairs, _ = load_pairs(encoder, records, folder / "c.npy", crops=True, label="decode")
    held, _ = load_pairs(encoder, records[:4], folder / "v.npy", crops=False, label="decode")
    run = folder / "run"
    run.mkdir()
    return Trainer(config, encoder, pairs=pairs, held_out=held, run=run)


def test_of_equal_validations_the_lower_loss_and_then_the_later_is_best(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among few images every score is 1: the first validation must not win for that."""
    trainer.state = State()
    best = []
    for step, (score, loss) in enumerate(
        [(1.0, 0.5), (1.0, 0.4), (1.0, 0.6), (1.0, 0.4), (0.9, 0.1)], start=1
    ):
        found = ({"validation_loss": loss}, score)
        monkeypatch.setattr(trainer, "_measure", lambda _, found=found: found)
        trainer.state.step = step
        best.append(trainer.validate()["best_step"])
    assert best == [1, 2, 2, 4, 4]


def test_validation_looks_beyond_the_first_ten(
    trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.state, trainer.learner.arithmetic = State(), {}
    report = trainer.validate()
    assert report["image_retrieval_recall@10"] == 1  # of four images
    assert 0 < trainer.state.best < 1
    assert trainer.state.best_loss == report["validation_loss"] > 0


def test_arithmetic_is_tried_on_as_much_as_is_encoded_at_once(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def fastest_arithmetic(
        _: object, run: Callable[[], torch.Tensor], *__: object, **___: object
    ) -> None:
        sizes.append(len(run()))

    monkeypatch.setattr("mmalign.training.learner.fastest_arithmetic", fastest_arithmetic)
    trainer.learner.choose_arithmetic(trainer.pairs, next(trainer.sampler.draws(0)))
    assert sizes == [2, 2]


def test_no_caption_of_an_image_is_its_negative(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = trainer.pairs
    draw = next(pairs.sampler(8, 2, 0).draws())
    batch = pairs.batch(draw)
    seen: list[torch.Tensor] = []

    def spy(one: torch.Tensor, *_: object, pair_ids: tuple[torch.Tensor, torch.Tensor]) -> Any:
        seen.append(share_an_id(*pair_ids))
        return one.sum()

    monkeypatch.setattr("mmalign.kernels.contrastive_loss", spy)
    objective = trainer.learner.objective
    monkeypatch.setattr(objective, "config", replace(trainer.config, caption_loss=1.0))
    vectors = torch.zeros(8, 2, 16)
    objective(vectors[:, 0], vectors, batch)
    sets = [
        set(pairs.caption_ids_P[pairs.caption_starts[r] : pairs.caption_starts[r + 1]])
        for r in draw.rows_B
    ]
    drawn = batch.caption_ids_BC.numpy()
    for c in range(2):
        of_image = [[drawn[j, c] in sets[i] for j in range(8)] for i in range(8)]
        assert seen[c].tolist() == of_image
        either = [
            [of_image[i][j] or drawn[i, c - 1] in sets[j] for j in range(8)] for i in range(8)
        ]
        assert seen[2 + c].tolist() == either


def test_tokens_are_kept_without_padding_in_two_bytes(trainer: Trainer) -> None:
    pairs = trainer.pairs
    captions = [c for r in pairs.pixels.records for c in r.captions]
    wanted = trainer.encoder.tokenizer(captions)
    assert pairs.tokens_X.dtype == np.uint16
    assert len(pairs.tokens_X) == int((wanted != 0).sum())
    assert torch.equal(pairs.tokens(np.arange(len(captions))), wanted)
    counts = [(wanted == token).any(dim=1).sum() for token in range(len(pairs.token_counts()))]
    counts[0] = torch.tensor(0)
    assert pairs.token_counts().tolist()[1:] == [int(c) for c in counts[1:]]


def test_a_sigmoid_loss_starts_gently_where_a_model_has_no_bias(
    small_clip: str, tmp_path: Path
) -> None:
    config = replace(QUICK, preset="tiny", model=small_clip, loss="siglip")
    towers = _new_encoder(config, []).towers
    assert float(towers.logit_bias.detach()) == -10
    assert float(towers.logit_scale.detach()) == pytest.approx(10)
    towers = _new_encoder(replace(config, loss="infonce"), []).towers
    assert float(towers.logit_scale.detach()) == pytest.approx(1 / 0.07, rel=1e-3)


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
    assert pairs.caption_ids_P.tolist() == [0, 1, 2, 0]  # the same in every process


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


@pytest.mark.slow
def test_choosing_an_arithmetic_changes_no_weights(run: Path) -> None:
    encoder = load_model(run)
    encoder.towers.train()
    before = {k: v.clone() for k, v in encoder.towers.state_dict().items()}
    pixels = torch.randint(0, 255, (8, 3, 64, 64), dtype=torch.uint8)
    chosen = fastest_arithmetic(
        encoder.towers, lambda: encoder.image_vectors(pixels), torch.device("cpu"), is_image=True
    )
    assert isinstance(chosen, Arithmetic)
    assert all(torch.equal(v, before[k]) for k, v in encoder.towers.state_dict().items())
    assert all(p.grad is None for p in encoder.towers.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("part_size", [5, 32])
def test_a_batch_in_parts(part_size: int, tmp_path: Path) -> None:
    """Parts train as a batch does, up to the batch norms, which see a part at a time."""
    source = [str(write_pairs(tmp_path / "pairs", 8))]
    config = replace(QUICK, epochs=2, batch_size=8, part_size=part_size)
    train(source, tmp_path / "run", config)
    train(source, tmp_path / "whole", replace(config, part_size=None))
    last, truth = (
        json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[-1])
        for run in ("run", "whole")
    )
    assert last["step"] == truth["step"]
    assert last["loss"] == pytest.approx(truth["loss"], rel=0.2)


@pytest.mark.slow
def test_reading_the_data_takes_no_time_of_the_training(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a training by the clock begins without its warm-up."""
    begins: list[float] = []

    def rate(progress: float, peak: float, warmup: float) -> float:
        begins.append(progress)
        return learning_rate(progress, peak, warmup)

    def slowly(*arguments: Any, **options: Any) -> Any:
        time.sleep(1)  # twice: for the training and for the validation pairs
        return load_pairs(*arguments, **options)

    monkeypatch.setattr("mmalign.training.learner.learning_rate", rate)
    monkeypatch.setattr("mmalign.training.train.load_pairs", slowly)
    train(
        [str(scenes)],
        tmp_path / "run",
        replace(QUICK, epochs=None, minutes=2 / 60),
        val=[str(scenes)],
    )
    assert begins[0] < 0.5
    assert begins[-1] > begins[0]


@pytest.mark.slow
def test_a_store_outlives_further_training(
    run: Path, store: Path, scenes: Path, tmp_path: Path
) -> None:
    """Weights that a store was made with stay beside better ones, and are found by identity."""
    before = load_model(run).identity
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    config = replace(QUICK, epochs=12)
    train([str(scenes)], folder, config, resume=True)
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


def test_settings_stand_in_place_of_a_configuration(scenes: Path, tmp_path: Path) -> None:
    result = train(
        scenes, tmp_path / "run", val=scenes, preset="pico", epochs=1, batch_size=4,
        validations=1, arithmetic="float32",
    )  # fmt: skip
    assert result["epoch"] == 1
    further = train((), tmp_path / "run", resume=True, epochs=2)
    assert further["epoch"] == 2
    with pytest.raises(ConfigError, match="unknown key 'epoch': did you mean 'epochs'"):
        train(scenes, tmp_path / "other", epoch=2)
    with pytest.raises(UsageError, match="give a config or settings, not both: epochs"):
        train(scenes, tmp_path / "other", QUICK, epochs=2)
    assert not (tmp_path / "other").exists()
