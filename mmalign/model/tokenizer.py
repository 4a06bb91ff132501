"""A byte-level BPE trained on the captions at hand, so that no language is second-class.

Byte-level pieces can spell any text: there is no unknown character, in Chinese or any other script.
"""

from collections.abc import Iterable, Sequence

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from mmalign.model.encoder import Tokenizer

PAD = "[pad]"


class BytePairs(Tokenizer):
    """Lower-cased byte-level BPE; texts longer than `context` tokens are cut."""

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

    def to_json(self) -> str:
        """The `tokenizers` library's own JSON; the context length is its truncation setting."""
        return str(self.backend.to_str())

    @property
    def size(self) -> int:
        """Number of different tokens, the padding included."""
        return int(self.backend.get_vocab_size())


def train(captions: Iterable[str], vocabulary: int, context: int) -> BytePairs:
    """Learn the pieces from captions; at most `vocabulary` of them, fewer from few captions."""
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    return BytePairs(backend, context)


def from_json(text: str) -> BytePairs:
    """Rebuild a trained tokenizer."""
    backend = Backend.from_str(text)
    return BytePairs(backend, int((backend.truncation or {})["max_length"]))
