"""What drawn scenes are said to hold is what they hold."""

import numpy as np
import pytest

from bench import combine
from bench.drawn import SEED, Asked, combinations, scene_of, short_captions
from mmalign.data.scenes import Group, Scene, sample

STARS = Group("star", "red", "striped", "small", 2)
CROSS = Group("cross", "blue", "solid", "large", 1)
SCENE = Scene(STARS, CROSS, "left")


def asked(**values: str) -> Asked:
    return Asked(tuple(values.items()))


@pytest.mark.parametrize(
    ("query", "count", "en", "zh"),
    [
        (asked(colour="red", shape="star"), 1, "a red star", "红色星形"),
        (asked(texture="striped", shape="cross"), 2, "two striped crosses", "两个条纹十字形"),
        (asked(size="small", colour="blue", shape="moon"), 1, "a small blue moon", "小的蓝色月牙"),
    ],
)
def test_a_combination_is_said_as_captions_say_it(
    query: Asked, count: int, en: str, zh: str
) -> None:
    assert (query.text("en", count), query.text("zh", count)) == (en, zh)


def test_a_whole_group_is_said_as_in_a_complete_caption() -> None:
    whole = asked(size="small", colour="red", texture="striped", shape="star")

    assert whole.text("en", 2) == STARS.en()
    assert whole.text("zh", 2) == STARS.zh()


def test_a_combination_fits_if_one_group_has_all_of_it() -> None:
    assert asked(colour="red", shape="star").within(SCENE)
    assert asked(texture="solid", shape="cross").within(SCENE)
    assert not asked(colour="red", shape="cross").within(SCENE)


def test_combinations_are_all_different() -> None:
    texts = [query.text("en") for query in combinations("colour", "texture", "shape")]

    assert len(set(texts)) == 8 * 4 * 8


def test_the_scene_of_a_number_is_the_one_that_is_drawn() -> None:
    drawn = sample(SEED, 5)["json"]

    scene = scene_of(SEED, 5)
    assert drawn == {"captions": scene.captions(), "captions_zh": scene.captions_zh()}


def test_short_captions_name_both_groups() -> None:
    for seed in range(20):
        one, two, both = short_captions(SCENE, np.random.default_rng(seed), "en")

        assert both == f"{one} and {two}"
        assert sorted(("star" in text, "cross" in text) for text in (one, two)) == [
            (False, True),
            (True, False),
        ]


def test_an_attribute_is_said_by_itself() -> None:
    said = [combine.attribute("colour", "red", "en"), combine.attribute("shape", "star", "en")]

    assert said == ["red", "a star"]
    assert combine.attribute("texture", "striped", "zh") == "条纹"
    assert combine.WITHOUT["zh"].format("星形", "心形") == "没有心形的星形"


def test_pictures_to_be_changed_have_groups_that_differ() -> None:
    assert combine.is_plain(SCENE)
    assert not combine.is_plain(Scene(STARS, Group("moon", "red", "solid", "small", 1), "above"))
