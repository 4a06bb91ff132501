"""Relevance: texts of what a store holds are accepted, others are rejected, and it says which."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from many_threads import together
from store_samples import flip
from topic_store import CARD, KNOWN, ROWS, TOPICS, Drawn, drawn, text_vector, write, write_takes

from mmalign import Query, Searcher, open_store
from mmalign.cli.main import main
from mmalign.errors import ModelError
from mmalign.search import calibrate, questions, relevance
from mmalign.search.build import build_index
from mmalign.search.lexical import open_lexical
from mmalign.search.phrases import PER_LANGUAGE, every_phrase, phrases, told_by
from mmalign.search.relevance import Relevance
from mmalign.search.snapshot import Snapshot
from mmalign.store import Row, Writer, pair_vectors, verify


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write(tmp_path_factory.mktemp("relevance") / "drawn.store")
    build_index(path)
    return path


@pytest.fixture
def indexed(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "drawn.store"))


def searcher_of(path: Path) -> Searcher:
    encoder: Any = Drawn()
    return Searcher(open_store(path), encoder)


@pytest.fixture(autouse=True)
def encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Items are encoded by drawing them."""

    def encode(encoder: Any, items: list[Any]) -> list[np.ndarray]:
        return [text_vector(i) if isinstance(i, str) else np.asarray(i) for i in items]

    monkeypatch.setattr("mmalign.search.searcher.encode_items", encode)


def part_of(path: Path) -> dict[str, Any]:
    folder = open_store(path).index_folder
    assert folder is not None
    return json.loads((folder / "index.json").read_text())["relevance"]


@pytest.mark.parametrize("words", ["topic {}", "东西 {}"])
def test_what_the_store_holds_is_accepted_and_what_it_lacks_is_rejected(
    built: Path, words: str
) -> None:
    searcher = searcher_of(built)
    present = [searcher.search(words.format(n)).nothing_found for n in range(KNOWN)]
    absent = [searcher.search(words.format(n)).nothing_found for n in range(KNOWN, TOPICS)]
    assert np.mean(present) <= 0.1
    assert np.mean(absent) >= 0.95


def test_hits_carry_relevance_that_falls_with_their_score(built: Path) -> None:
    hits = searcher_of(built).search("topic 3", 40)
    values = [hit.relevance for hit in hits]
    assert all(value is not None and 0 <= value <= 1 for value in values)
    assert values == sorted(values, reverse=True)  # type: ignore[type-var]
    assert hits.nothing_found is False
    assert hits[-1].level == "unlikely"
    assert {hit.level for hit in hits} <= set(relevance.LEVELS)


def test_the_nearest_come_though_nothing_is_found(built: Path) -> None:
    hits = searcher_of(built).search(f"topic {KNOWN + 5}", 3)
    assert hits.nothing_found is True
    assert [hit.level for hit in hits] == ["unlikely"] * 3


def test_a_later_page_says_of_its_hits_what_the_first_page_would(built: Path) -> None:
    searcher = searcher_of(built)
    both = searcher.search("topic 4", 12)
    page = searcher.search("topic 4", 6, offset=6)
    assert [(h.id, h.relevance, h.level) for h in page] == [
        (h.id, h.relevance, h.level) for h in both[6:]
    ]
    assert page.nothing_found is both.nothing_found is False
    assert searcher.search("topic 4", 5, offset=1000).nothing_found is False


def test_under_a_filter_without_the_topic_nothing_is_found(built: Path) -> None:
    pytest.importorskip("duckdb")
    searcher = searcher_of(built)
    others = ", ".join(f"'id{n}'" for n in range(ROWS) if n % KNOWN != 4)
    assert searcher.search("topic 4", where=f"id in ({others})").nothing_found is True
    assert searcher.search("topic 4", where="id = 'id4'").nothing_found is False
    assert searcher.search("topic 4", where="id = 'none'").nothing_found is True


def test_only_texts_that_are_added_have_relevance(built: Path) -> None:
    searcher = searcher_of(built)
    vector = drawn(3, 7, 0.5)
    for query in (
        vector,
        mixed((vector, 1.0), ("topic 3", 1.0)),
        mixed(("topic 3", 1.0), ("topic 4", -1.0)),
    ):
        hits = searcher.search(query)
        assert hits.nothing_found is None
        assert hits[0].relevance is hits[0].level is None
    assert searcher.search("topic 3", to="text").nothing_found is None
    assert searcher.search(mixed(("topic 3", 1.0), ("topic 3", 0.5))).nothing_found is False


def mixed(*items: tuple[Any, float]) -> Any:
    return Query(tuple(items))


def test_queries_with_phrases_are_judged_and_listings_are_not(built: Path) -> None:
    searcher = searcher_of(built)
    words = open_store(built).rows([4], ("captions",))[0]["captions"][0]
    for topic, nothing in ((4, False), (5, True)):
        query = Query(((f"topic {topic}", 1.0),), phrases=(words,))
        assert searcher.search(query).nothing_found is nothing
    listing = Query((), phrases=(words,), k=1)
    assert searcher.search(listing).nothing_found is None
    assert searcher.search(listing, offset=ROWS)[:] == ()
    assert searcher.search(listing, offset=ROWS).nothing_found is None
    assert searcher.search(Query((), phrases=("not a caption",))).nothing_found is True


def test_rows_of_an_excluded_topic_are_left_out_and_nothing_is_judged(built: Path) -> None:
    searcher = searcher_of(built)
    for items in ((), (("topic 3", 1.0),)):
        hits = searcher.search(Query(items, excluded=("topic 4",)), ROWS)
        topics = {hit.row % KNOWN for hit in hits}
        assert 4 not in topics
        assert 3 in topics
        assert ROWS > len(hits) > 0.75 * ROWS
        assert hits[0].relevance is hits.nothing_found is None


def test_what_was_measured_is_written_with_intervals(built: Path) -> None:
    languages = part_of(built)["languages"]
    assert set(languages) == {"all", "other", "zh"}
    for part in languages.values():
        for share in (part["rejected"], part["likely"], part["without_image"]["accepted"]):
            assert 0 <= share["low"] <= share["share"] <= share["high"] <= 1
        assert part["rejected"]["low"] <= relevance.MAX_ERROR
        assert part["auc"]["low"] <= part["auc"]["area"] <= part["auc"]["high"]


@pytest.mark.parametrize("damage", ["flip", "remove", "cut"])
def test_without_its_file_search_goes_on_and_says_so_once(
    indexed: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    before = searcher_of(indexed).search("topic 3")
    folder = open_store(indexed).index_folder
    assert folder is not None
    file = folder / relevance.FILE
    if damage == "flip":
        flip(file)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        file.unlink()
    searcher = searcher_of(indexed)
    capfd.readouterr()
    found = together(lambda: searcher.search("topic 3"))
    said = capfd.readouterr().err
    assert said.count("warning") == said.count("hits have no relevance") == 1
    assert str(file) in said
    assert "mmalign index" in said
    for hits in found:
        assert hits.nothing_found is None
        assert [hit.id for hit in hits] == [hit.id for hit in before]


def test_damage_of_its_file_is_found_by_verify(indexed: Path) -> None:
    folder = open_store(indexed).index_folder
    assert folder is not None
    assert not verify(indexed)
    flip(folder / relevance.FILE)
    assert relevance.FILE in str(verify(indexed))


def test_an_index_from_before_has_no_relevance_and_that_is_no_fault(
    indexed: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    store = open_store(indexed)
    folder = store.index_folder
    assert folder is not None
    content = json.loads((folder / "index.json").read_text())
    del content["relevance"]
    monkeypatch.setattr("mmalign.search.snapshot.describe", lambda _: content)
    capfd.readouterr()
    assert searcher_of(indexed).search("topic 3").nothing_found is None
    assert capfd.readouterr().err == ""


def test_a_calibration_of_an_earlier_version_is_not_used(
    indexed: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = open_store(indexed).index_folder
    assert folder is not None
    content = json.loads((folder / "index.json").read_text())
    for part in content["relevance"]["languages"].values():
        part["scale"] = part.pop("short")
        del part["long"]
    monkeypatch.setattr("mmalign.search.snapshot.describe", lambda _: content)
    capfd.readouterr()
    assert searcher_of(indexed).search("topic 3").nothing_found is None
    said = capfd.readouterr().err
    assert "calibrated by an earlier version" in said
    assert "mmalign index" in said


def test_many_threads_read_one_calibration(built: Path) -> None:
    searcher = searcher_of(built)
    alone = [(hit.id, hit.relevance) for hit in searcher_of(built).search("topic 3")]
    for hits in together(lambda: searcher.search("topic 3")):
        assert [(hit.id, hit.relevance) for hit in hits] == alone


def test_a_store_without_captions_goes_by_phrases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "bare.store", captions=False)
    monkeypatch.setattr("mmalign.search.build.model_of", lambda *_: Drawn())
    build_index(path)
    assert "uncalibrated: no captions" in capfd.readouterr().err
    assert part_of(path)["how"] == "uncalibrated: no captions"
    searcher = searcher_of(path)
    assert searcher.search("topic 3")[0].level == "likely"
    # Phrases are of no topic here, so one of them is nothing special.
    some = [searcher.search(phrase.text) for phrase in phrases()[:60]]
    assert 0.2 < np.mean([hits[0].level == "unlikely" for hits in some]) < 0.8
    # How many of them are there is not known.
    assert {hits.nothing_found for hits in some} == {None}


def test_without_captions_and_model_there_is_an_index_and_no_relevance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def gone(*_: object) -> None:
        raise ModelError("run: no such model")

    path = write(tmp_path / "bare.store", captions=False)
    monkeypatch.setattr("mmalign.search.build.model_of", gone)
    build_index(path)
    assert "no such model" in capfd.readouterr().err
    assert part_of(path) is None
    assert searcher_of(path).search("topic 3").nothing_found is None


def test_a_phrase_is_there_if_captions_name_its_thing_with_what_is_said_of_it() -> None:
    captions = ["Two dogs, one is RED", "a boxy hat", "A black cat"]
    there, not_there = ({p.text for p in part} for part in told_by(captions, "other"))
    assert {"dog", "a photo of a dog", "a red dog", "two of them: dog", "a black cat"} <= there
    # No caption has a black dog, and a boxy hat is no box.
    assert not {"a black dog", "a red cat", "box"} & there
    assert "a small box" in not_there
    assert not {"dog", "a blue dog", "cat"} & not_there
    # One row may name it several times.
    assert not told_by(captions, "other", [7, 7, 7], 2)[0]
    assert told_by(["a dog", "the dog"], "other", [1, 2], 2)[0]
    there, not_there = ({p.text for p in part} for part in told_by(["一只红色的狗"], "zh"))
    assert there == {"狗", "一张狗的照片", "红色的狗"}
    assert "一个小小的猫" in not_there


class Short(Drawn):
    """The first things of the bank are topics."""

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        return np.stack([short_vector(text) for text in texts])


def short_vector(text: str) -> np.ndarray:
    topics = [n for n, thing in enumerate(THINGS) if thing in text.split()]
    return drawn(topics[0], len(text), 1.5) if topics else text_vector(text)


THINGS = [p.text for p in every_phrase("other") if p.text == p.thing and " " not in p.text]


def test_short_queries_are_accepted_as_often_as_captions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short texts lie apart from captions: they are not judged by these alone."""
    monkeypatch.setattr(
        "mmalign.search.searcher.encode_items", lambda _, items: [*map(short_vector, items)]
    )
    rejected = {}
    for name in ("captions", "both"):
        path = tmp_path / f"{name}.store"
        with Writer(path, CARD, 100) as writer:
            for number in range(ROWS):
                topic = number % KNOWN
                words = (f"seen today: one {THINGS[topic]}, number {number}",)
                vectors = drawn(topic, 1000 + number, 0.5)[None]
                image = drawn(topic, 100_000 + number, -0.5)
                writer.add(Row(f"id{number}", f"{number}.jpg", words, pair_vectors(image, vectors)))
        if name == "both":
            monkeypatch.setattr("mmalign.search.build.model_of", lambda *_: Short())
        build_index(path)
        rejected[name] = np.mean(
            [searcher_of(path).search(thing).nothing_found for thing in THINGS[:KNOWN]]
        )
    assert rejected["both"] <= 0.1
    assert rejected["captions"] == 0
    told = part_of(path)["languages"]["other"]["phrases"]
    assert told["present"]["rejected"]["low"] <= relevance.MAX_ERROR
    assert told["absent"]["rejected"]["low"] > told["present"]["rejected"]["high"]


def test_few_rows_are_not_calibrated(tmp_path: Path) -> None:
    with Writer(tmp_path / "few.store", CARD) as writer:
        for number in range(questions.MIN_ROWS - 1):
            image = drawn(number, 1, -0.5)
            vectors = pair_vectors(image, image[None])
            writer.add(Row(f"id{number}", f"{number}.jpg", (f"a {number}",), vectors))
    store = open_store(tmp_path / "few.store")
    assert calibrate.calibrate(store, open_lexical(store, None), lambda _: np.zeros(0)) is None


def test_relevance_is_never_learned_to_fall_with_a_sign() -> None:
    rng = np.random.default_rng(0)
    present = np.c_[rng.normal(1, 1, 500), rng.normal(-2, 1, 500), rng.normal(0, 1, 500)]
    absent = rng.normal(0, 1, (500, 3))
    ones = np.ones((500, 1))
    weights = calibrate.logistic_weights(np.c_[present, ones], np.c_[absent, ones])
    assert weights[0] > 0.5
    assert weights[1] == 0
    assert min(weights[:3]) >= 0


def test_area_and_its_interval_on_known_distributions() -> None:
    rng = np.random.default_rng(0)
    # Two normal distributions one standard deviation apart: Phi(1 / sqrt 2).
    area, low, high = calibrate.area(rng.normal(1, 1, 4000), rng.normal(0, 1, 4000))
    assert abs(area - 0.7602) < 0.015
    assert low < 0.7602 < high
    assert calibrate.area(np.zeros(10), np.zeros(10))[0] == 0.5


def test_the_bank_has_as_many_phrases_of_each_language() -> None:
    bank = phrases()
    assert len(set(bank)) == len(bank) == 2 * PER_LANGUAGE
    assert sum(phrase.language == "zh" for phrase in bank) == PER_LANGUAGE
    assert all(relevance.language(phrase.text) == phrase.language for phrase in bank)


def command(path: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> Result:
    monkeypatch.setattr("mmalign.search.model.model_of", lambda *_: Drawn())
    return CliRunner().invoke(main, ["search", str(path), *words])


def test_the_command_shows_levels_and_ends_with_1_if_nothing_is_found(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    present = command(built, monkeypatch, "topic 3", "-k", "3", "--table")
    assert (present.exit_code, present.stderr) == (0, "")
    assert present.stdout.splitlines()[0].split()[2] in {"likely", "maybe"}
    absent = command(built, monkeypatch, f"topic {KNOWN + 5}", "-k", "3", "--table")
    assert (absent.exit_code, absent.stderr) == (1, "nothing found: these are only the nearest\n")
    assert [line.split()[2] for line in absent.stdout.splitlines()] == ["unlikely"] * 3


def test_json_says_whether_anything_was_found(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, nothing in (("topic 3", False), (f"topic {KNOWN + 5}", True)):
        done = command(built, monkeypatch, text, "--json")
        answer = json.loads(done.stdout)
        assert done.exit_code == int(nothing)
        assert answer["nothing_found"] is nothing
        assert {"relevance", "level"} <= set(answer["hits"][0])


def long_captions(path: Path, named: Callable[[int], str] = "thing {}".format) -> Path:
    """Write a store all of whose captions are long and in English."""
    with Writer(path, CARD, 100) as writer:
        for number in range(ROWS):
            topic = number % KNOWN
            words = (f"today we have seen one {named(topic)} here",)
            vectors = drawn(topic, 1000 + number, 0.5)[None]
            image = drawn(topic, 100_000 + number, -0.5)
            writer.add(Row(f"id{number}", f"{number}.jpg", words, pair_vectors(image, vectors)))
    return path


def calibrated(path: Path) -> Relevance:
    known = Snapshot(open_store(path)).relevance
    assert known is not None
    return known


def test_short_texts_are_not_rejected_where_nothing_tells_how_they_score(tmp_path: Path) -> None:
    path = long_captions(tmp_path / "long.store")
    # No model encodes short queries, and no caption is one.
    build_index(path)
    known = calibrated(path)
    assert known.scales["other"].short is None
    absent, scores = text_vector("of no topic"), np.array([-0.2], np.float32)
    assert known.judge(absent, scores, "x" * 25).levels_K == ("unlikely",)
    assert known.judge(absent, scores, "x" * 24).levels_K == ("maybe",)


def test_captions_of_a_narrow_subject_give_short_queries_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = long_captions(tmp_path / "narrow.store")
    monkeypatch.setattr("mmalign.search.build.model_of", lambda *_: Drawn())
    build_index(path)
    assert calibrated(path).scales["other"].short is not None
    assert part_of(path)["languages"]["other"]["phrases"]["present"]["phrases"] > 100


def test_a_text_of_unknown_words_has_to_be_more_familiar(tmp_path: Path) -> None:
    topics = [n % KNOWN for n in range(ROWS)]
    path = write_takes(tmp_path / "known.store", topics, lambda _, topic: f"thing {topic}")
    build_index(path)
    known = calibrated(path)
    vectors = [text_vector(f"topic {n}") for n in range(KNOWN)]
    scores = np.array([0.5], np.float32)

    def rejected(unknown: float) -> float:
        judged = [known.judge(vector, scores, "topic", unknown) for vector in vectors]
        return float(np.mean([part.nothing for part in judged]))

    assert rejected(0) <= rejected(0.3) <= rejected(1)
    assert rejected(0) < rejected(1) < 0.5


def test_words_count_only_in_a_language_of_the_captions(tmp_path: Path) -> None:
    path = long_captions(tmp_path / "english.store")
    build_index(path)
    known = calibrated(path)
    assert known.reads_words("a dog")
    assert not known.reads_words("一只狗")


def test_words_of_rows_that_came_after_the_index_are_known(indexed: Path) -> None:
    def unknown(text: str) -> float:
        snapshot = Snapshot(open_store(indexed))
        assert snapshot.relevance is not None
        return snapshot._unknown(snapshot.relevance, text)

    assert unknown("thing 4") == 0
    assert unknown("a pangolin") == 1
    with Writer(indexed, CARD) as writer:
        vectors = pair_vectors(drawn(1, 1, -0.5), drawn(1, 1, 0.5)[None])
        writer.add(Row("new", "new.jpg", ("A pangolin",), vectors))
    assert unknown("a pangolin") == 0


@pytest.mark.parametrize("language", relevance.SHORT)
def test_runs_of_words_are_short_parts_of_their_caption(language: str) -> None:
    rng = np.random.default_rng(0)
    captions = ["", " ", "dog.", "a red dog, on the beach!", "一只红色的狗，在沙滩上。", "x" * 99]
    for caption in captions * 50:
        run = questions.run_of(caption, language, rng)
        assert relevance.is_short(run)
        assert "".join(run.split()) in "".join(caption.split())
