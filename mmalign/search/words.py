"""Text -> the words it is found by, the same for captions and queries. Pure.

Latin, Cyrillic and others: a word is a run of letters and digits. Chinese and Japanese are written
without spaces: their words are the pairs of neighbouring characters, and single characters.
"""

import re
import unicodedata
from itertools import pairwise

# Kana, Han characters, and the iteration mark.
_CJK = "\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
_RUNS = re.compile(rf"([{_CJK}]+)|[^\W_{_CJK}]+")


def indexed_words(text: str) -> list[str]:
    """Return the words of a caption, repeated ones too.

    >>> indexed_words("Ｒed T-shirt 红裙子")
    ['red', 't', 'shirt', '红', '裙', '子', '红裙', '裙子']
    """
    words: list[str] = []
    for run, is_cjk in _runs(text):
        words += [*run, *_pairs(run)] if is_cjk else [run]
    return words


def asked_words(text: str) -> list[str]:
    """Return the words of a query, each once: of several Chinese characters the pairs.

    >>> asked_words("red 红裙子 red"), asked_words("狗")
    (['red', '红裙', '裙子'], ['狗'])
    """
    words: dict[str, None] = {}
    for run, is_cjk in _runs(text):
        words |= dict.fromkeys(_pairs(run) if is_cjk and len(run) > 1 else [run])
    return list(words)


def said_by(text: str) -> dict[str, list[str]]:
    """Return each word or Chinese character of a query, and the words any of which has it in it.

    A Chinese character says little by itself: it counts as part of a pair that it stands in.

    >>> said_by("red 红裙子"), said_by("狗")
    ({'red': ['red'], '红': ['红裙'], '裙': ['红裙', '裙子'], '子': ['裙子']}, {'狗': ['狗']})
    """
    said: dict[str, list[str]] = {}
    for run, is_cjk in _runs(text):
        if not is_cjk or len(run) == 1:
            said.setdefault(run, []).append(run)
            continue
        for character, pairs in zip(run, pairwise(["", *_pairs(run), ""]), strict=True):
            said.setdefault(character, []).extend(filter(None, pairs))
    return said


def _runs(text: str) -> list[tuple[str, bool]]:
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return [(found[0], bool(found[1])) for found in _RUNS.finditer(text.casefold())]


def _pairs(run: str) -> list[str]:
    return [run[i : i + 2] for i in range(len(run) - 1)]
