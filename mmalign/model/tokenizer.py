"""A BPE over characters, trained on the captions at hand, that can spell any text.

The common Chinese characters are always single tokens, whatever language the captions are in, so
that a Chinese query is not cut short by a model that was trained on English. Any other character
that no caption had is spelled in bytes.
"""

import json
from collections.abc import Iterable, Sequence
from functools import cache

import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from torch import Tensor

from mmalign.model.encoder import Tokenizer

PAD = "[pad]"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# Words, numbers and runs of signs, each with the space before it.
PIECES = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
# What NFKC leaves of CJK punctuation; the full-width forms of ASCII become ASCII.
CJK_PUNCTUATION = "、。〈〉《》「」『』【】〔〕〖〗—‘’“”·～〇"


@cache
def common_characters() -> tuple[str, ...]:
    """Return the 3,755 characters of GB2312 level 1 and CJK punctuation, each a token always."""
    # Level 1 fills the rows 16 to 55 of the table, all but the last five cells.
    cells = [bytes([0xA0 + row, 0xA0 + cell]) for row in range(16, 56) for cell in range(1, 95)]
    level_1 = [cell.decode("gb2312") for cell in cells[:3755]]
    return (*level_1, *CJK_PUNCTUATION)


class BytePairs(Tokenizer):
    """Lower-cased BPE that falls back to bytes; texts longer than `context` tokens are cut."""

    def __init__(self, backend: Backend, context: int) -> None:
        self.backend = backend
        self.context = context
        backend.enable_truncation(context)
        backend.enable_padding(pad_id=0, pad_token=PAD)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return ids (B, T), padded with 0 to the longest text; an empty one is a pad."""
        ids = [e.ids for e in self.backend.encode_batch(list(texts))]
        tokens = torch.tensor(ids, dtype=torch.int64)
        return tokens if tokens.shape[1] else tokens.new_zeros(len(ids), 1)

    def cut(self, texts: Sequence[str]) -> list[str]:
        """See `Tokenizer`."""
        # No character has more tokens than bytes, and one is for the space at the beginning.
        long = [t for t in texts if len(t.encode()) >= self.context]
        encoded = self.backend.encode_batch(long)
        return [text for text, e in zip(long, encoded, strict=True) if e.overflowing]

    def to_json(self) -> str:
        """The `tokenizers` library's own JSON; the context length is its truncation setting."""
        return str(self.backend.to_str())

    @property
    def size(self) -> int:
        """Number of different tokens, the padding included."""
        return int(self.backend.get_vocab_size())


def train(captions: Iterable[str], vocabulary: int, context: int) -> BytePairs:
    """Learn the pieces from captions: at most `vocabulary` tokens beside the common characters."""
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
        vocab_size=vocabulary + len(characters),
        special_tokens=[PAD, *BYTES],
        initial_alphabet=list(characters),
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    # As tokens of the model alone: a text that holds the characters `[pad]` is spelled like others.
    trained = json.loads(backend.to_str()) | {"added_tokens": []}
    return BytePairs(Backend.from_str(json.dumps(trained)), context)


def from_json(text: str) -> BytePairs:
    """Rebuild a trained tokenizer.

    Raises:
        ValueError: The text is none.
    """
    try:
        backend = Backend.from_str(text)
    except Exception as error:  # the library raises it bare
        raise ValueError(f"tokenizer.json: {error}") from error
    return BytePairs(backend, int((backend.truncation or {})["max_length"]))
