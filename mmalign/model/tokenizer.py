"""A character-level BPE trained on the given captions that can encode any text.

The common Chinese characters are always single tokens, whatever the language of the captions, so
that a model trained on English does not truncate a Chinese query early. Any other character that
no caption had is encoded as bytes.

Chinese, Japanese and Thai put no spaces between words, so BPE alone would create tokens for whole
phrases, which a query words differently. Tokens of these scripts are limited to the length of a
word.
"""

import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from torch import Tensor

from mmalign.model.encoder import Tokenizer

PAD = "[pad]"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# Words, numbers and runs of symbols, each with the space before it.
PIECES = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
# CJK punctuation that NFKC keeps; the full-width forms of ASCII become ASCII.
CJK_PUNCTUATION = "、。〈〉《》「」『』【】〔〕〖〗—‘’“”·～〇"
# Scripts without spaces: a word has about two Chinese characters, or four of Thai, Lao, Burmese,
# Khmer or kana.
CHINESE = re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
SYLLABLES = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff]")
WORD_CHINESE, WORD_SYLLABLES = 2, 4
# Phrases take up most merges of a small Chinese corpus, so more are learned than kept.
MERGES_LEARNED = 4


@cache
def common_characters() -> tuple[str, ...]:
    """Return GB2312 level 1 (3,755 characters) and CJK punctuation, each always a token."""
    # Level 1 fills rows 16 to 55 of the table, except the last five cells.
    cells = [bytes([0xA0 + row, 0xA0 + cell]) for row in range(16, 56) for cell in range(1, 95)]
    level_1 = [cell.decode("gb2312") for cell in cells[:3755]]
    return (*level_1, *CJK_PUNCTUATION)


class BytePairs(Tokenizer):
    """Lower-cased BPE that falls back to bytes; truncates texts to `context` tokens."""

    def __init__(self, backend: Backend, context: int) -> None:
        self.backend = backend
        self.context = context
        backend.enable_truncation(context)
        backend.enable_padding(pad_id=0, pad_token=PAD)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return ids (B, T), padded with 0 to the longest text; an empty text is one pad token."""
        ids = [e.ids for e in self.backend.encode_batch(list(texts))]
        tokens = torch.tensor(ids, dtype=torch.int64)
        return tokens if tokens.shape[1] else tokens.new_zeros(len(ids), 1)

    def cut(self, texts: Sequence[str]) -> list[str]:
        """See `Tokenizer`."""
        # No character has more tokens than bytes, plus one for the space at the start.
        long = [t for t in texts if len(t.encode()) >= self.context]
        encoded = self.backend.encode_batch(long)
        return [text for text, e in zip(long, encoded, strict=True) if e.overflowing]

    def to_json(self) -> str:
        """Return the `tokenizers` library's JSON; the context length is its truncation setting."""
        return str(self.backend.to_str())

    @property
    def size(self) -> int:
        """Return the number of different tokens, padding included."""
        return int(self.backend.get_vocab_size())


def train(captions: Iterable[str], vocabulary: int, context: int) -> BytePairs:
    """Train on captions: at most `vocabulary` tokens besides the common characters."""
    backend = Backend(models.BPE(byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
            normalizers.Prepend(" "),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    characters = common_characters()
    trainer = trainers.BpeTrainer(
        vocab_size=MERGES_LEARNED * vocabulary + len(characters),
        special_tokens=[PAD, *BYTES],
        initial_alphabet=list(characters),
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    # As ordinary model tokens: a text that contains `[pad]` is encoded like any other.
    trained = json.loads(backend.to_str()) | {"added_tokens": []}
    trained["model"] |= _words_of(trained["model"], vocabulary + len(characters))
    return BytePairs(Backend.from_str(json.dumps(trained)), context)


def _words_of(model: dict[str, Any], size: int) -> dict[str, Any]:
    """Return the vocabulary and merges without phrases: the first merges, up to `size` tokens."""
    pairs = [pair for pair in model["merges"] if _is_word("".join(pair))]
    merged = {"".join(pair) for pair in model["merges"]}
    tokens = [t for t in sorted(model["vocab"], key=model["vocab"].__getitem__) if t not in merged]
    pairs = pairs[: max(0, size - len(tokens))]
    tokens = list(dict.fromkeys([*tokens, *("".join(pair) for pair in pairs)]))
    return {"vocab": {token: number for number, token in enumerate(tokens)}, "merges": pairs}


def _is_word(token: str) -> bool:
    chinese, syllables = len(CHINESE.findall(token)), len(SYLLABLES.findall(token))
    return chinese / WORD_CHINESE + syllables / WORD_SYLLABLES <= 1


def from_json(text: str) -> BytePairs:
    """Rebuild a trained tokenizer.

    Raises:
        ValueError: The text is not a tokenizer.
    """
    try:
        backend = Backend.from_str(text)
    except Exception as error:  # the library raises it bare
        raise ValueError(f"tokenizer.json: {error}") from error
    return BytePairs(backend, int((backend.truncation or {})["max_length"]))
