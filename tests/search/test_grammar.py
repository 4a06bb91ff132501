"""The query language: how texts are read, what reading costs, and that writing undoes it."""

import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from mmalign import Query
from mmalign.search import grammar
from mmalign.search.grammar import Condition, Reading, Term, read

FIELDS = ("price", "label", "date", "颜色")


def text(content: str, weight: float = 1.0) -> Term:
    return Term(content, weight=weight)


def out(content: str) -> Term:
    return Term(content, excluded=True)


@pytest.mark.parametrize(
    "words",
    [
        "a red dress", "t-shirt", "24-70mm f/2.8", "16:9", "http://x.org/a?b=1", "C:/pictures",
        "black+white", "wow!", "红色的连衣裙", "T恤-红色", "price", "price:", "price: 3",
        "size:large", "price:>", "price:>=", "price:..", "price:/x", "row:", "@home",
        "meet me @home", "0:cats", "2:", "2:30pm", "-dash", "cats +", "cats -", "!", "+ +",
        "note:this", "x" * 300,
    ],
)  # fmt: skip
def test_words_stay_words(words: str) -> None:
    assert read(words, FIELDS) == Reading((text(words),))


@pytest.mark.parametrize(
    ("asked", "terms"),
    [
        ("cats + dogs", (text("cats"), text("dogs"))),
        ("red dress - 0.5:stripes", (text("red dress"), text("stripes", -0.5))),
        ("2:red dress ! dog + hat", (text("red dress", 2), out("dog"), text("hat"))),
        ("- stripes", (text("stripes", -1),)),
        ("! stripes", (out("stripes"),)),
        ("+ cats", (text("cats"),)),
        ("cats + + dogs", (text("cats +"), text("dogs"))),
        ("cats + - dogs", (text("cats +"), text("dogs", -1))),
        ("t-shirt - v-neck", (text("t-shirt"), text("v-neck", -1))),
        ("2:红裙子 ＋ 条纹", (text("红裙子", 2), text("条纹"))),
        ("裙子 － 0.5：狗 ！ 帽子", (text("裙子"), text("狗", -0.5), out("帽子"))),
        ("红裙子\u3000＋\u3000条纹", (text("红裙子"), text("条纹"))),
        ("２:cats", (text("cats", 2),)),
        ("row:photos/7.jpg", (Term("photos/7.jpg", "row"),)),
        ('row:"a b" - 2:row：c', (Term("a b", "row"), Term("c", "row", -2))),
        ("row:7 stripes", (Term("7", "row"), text("stripes"))),
        ('"red dress" beach', (text('"red dress" beach'),)),
        ("“红 裙子” 海边", (text('"红 裙子" 海边'),)),
        ('5" nails', (text("5 nails"),)),
        ('"a + b" + c', (text('"a + b"'), text("c"))),
    ],
)  # fmt: skip
def test_terms(asked: str, terms: tuple[Term, ...]) -> None:
    assert read(asked, FIELDS) == Reading(terms)


@pytest.mark.parametrize(
    ("asked", "conditions", "words"),
    [
        ("price:3", (Condition("price", "=", "3"),), ""),
        ("price:>3 red", (Condition("price", ">", "3"),), "red"),
        ("red price:>=3 hat", (Condition("price", ">=", "3"),), "red hat"),
        ("price：＜＝3", (Condition("price", "<=", "3"),), ""),
        ("price:2..5", (Condition("price", "..", "2", "5"),), ""),
        ("price:..5", (Condition("price", "<=", "5"),), ""),
        ("price:5..", (Condition("price", ">=", "5"),), ""),
        ("date:2024-01..2025-12-31", (Condition("date", "..", "2024-01", "2025-12-31"),), ""),
        ('label:"evening dress"', (Condition("label", "=", "evening dress"),), ""),
        ('label:"a..b"', (Condition("label", "=", "a..b"),), ""),
        ("Label:Dress", (Condition("label", "=", "Dress"),), ""),
        ("颜色:红 裙子", (Condition("颜色", "=", "红"),), "裙子"),
        ("cats ! label:red", (Condition("label", "=", "red", excluded=True),), "cats"),
        ("- price:2..5 cats", (Condition("price", "..", "2", "5", excluded=True),), "cats"),
        ("cats + label:red", (Condition("label", "=", "red"),), "cats"),
        ("2:price:3 cats", (Condition("price", "=", "3"),), "cats"),
    ],
)
def test_filters(asked: str, conditions: tuple[Condition, ...], words: str) -> None:
    assert read(asked, FIELDS) == Reading((text(words),) if words else (), conditions)


def test_a_filter_is_one_only_on_a_field_of_the_store() -> None:
    assert read("price:3") == Reading((text("price:3"),))
    assert read("row:3", ["row"]) == Reading((Term("3", "row"),))
    assert read("LABEL:x", ["label", "LABEL"]).conditions[0].field == "LABEL"


def test_a_path_is_one_only_where_files_are_allowed() -> None:
    asked = '@cat.jpg + 2:@"my dog.png" - grass'
    files = (Term("cat.jpg", "file"), Term("my dog.png", "file", 2), text("grass", -1))
    assert read(asked, files=True) == Reading(files)
    assert {term.kind for term in read(asked).terms} == {"text"}
    assert read("meet me @home", files=True) == Reading((text("meet me @home"),))


def test_quotes_behind_minus_only_hold_words_together() -> None:
    query = Query.parse('"red hat" dress - "a + b" ! "x - y"')
    assert query.phrases == ("red hat",)
    assert query.items == (("red hat dress", 1.0), ("a + b", -1.0))
    assert query.excluded == ("x - y",)


def test_parts_as_plain_values() -> None:
    query = Query.parse('2:"red  hat" dress ! dog price:2..5', fields=FIELDS)
    assert query.read_as == {
        "text": 'price:2..5 2:"red hat" dress ! dog',
        "parts": [
            {"kind": "filter", "content": "price:2..5", "weight": None, "excluded": False},
            {"kind": "text", "content": "red hat dress", "weight": 2.0, "excluded": False},
            {"kind": "text", "content": "dog", "weight": 1.0, "excluded": True},
            {"kind": "phrase", "content": "red hat", "weight": None, "excluded": False},
        ],
    }


def test_the_guide_shows_the_grammar_of_the_module() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "search.md").read_text(encoding="utf-8")
    rules = [line.split(";")[0].strip() for line in (grammar.__doc__ or "").splitlines()]
    rules = [rule for rule in rules if " = " in rule]
    assert len(rules) == 9
    assert [rule for rule in rules if f"\n{rule} ;" not in guide] == []


# ---------------------------------------------------------------- any text

PIECES = [
    "+", "-", "!", "＋", "－", "！", " ", " ", " ", "\u3000", "\n", "\0", '"', '"', "“", "”", "＂",
    ":", "：", "0", "1", "2", "2:", ".", "..", "a", "红", "x y", "price", "label:", "row:", "@",
    ">", ">=", "<", "＝", "=", "/", "! ", " - ", "\ud800", "é", "(", "\\", "'",
]  # fmt: skip


def drawn(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(PIECES, k=rng.randint(0, 16))) for _ in range(count)]


@pytest.mark.parametrize("files", [False, True])
def test_reading_what_was_written_gives_the_same(files: bool) -> None:
    seen = set()
    for asked in drawn(1, 20_000):
        reading = read(asked, FIELDS, files=files)
        assert read(str(reading), FIELDS, files=files) == reading, asked
        seen |= {term.kind for term in reading.terms} | {c.sign for c in reading.conditions}
        if not asked.strip().strip('"“”＂'):
            continue
        query = Query.parse(asked, fields=FIELDS, files=files)
        assert Query.parse(str(query), fields=FIELDS, files=files) == query, asked
    assert seen == {"text", "row", "=", ">", ">=", "<", "<=", ".."} | ({"file"} if files else set())


def steps(call: Callable[[], Any]) -> int:
    """How many lines of Python a call runs."""
    count = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize(
    "piece",
    ["a", "a ", "+ ", "a + ", '"', '" ', '"a" ', '"a"', 'x"', "2:", "2:a + ", "price:",
     "price:2.. ", "..", "@a ", "row:a ", "! price:3 ", "- ", "：", "“"],
)  # fmt: skip
def test_work_grows_with_the_length(piece: str) -> None:
    short, long = (
        steps(lambda n=n: read(piece * n, FIELDS, files=True))  # type: ignore[misc]
        for n in (500, 1_000)
    )
    assert long <= 2.1 * short + 50
    # The work of regular expressions is not counted: if it grew faster, this would take long.
    read(piece * 100_000, FIELDS, files=True)
