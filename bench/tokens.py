"""How many tokens queries of one language take with a tokenizer trained on captions of another.

    python -m bench tokens SRC... [--learn captions] [--ask captions_zh] [--longest 40]

Our presets' tokenizers learn the captions under one key; the captions under the other are queries.
"""

import argparse

import numpy as np

from bench import measure
from mmalign.data import scan
from mmalign.model import PRESETS
from mmalign.model.tokenizer import train


def captions(sources: list[str], key: str) -> list[str]:
    """List the different captions under a key."""
    records = scan(sources, caption_keys=(key,)).records
    return list(dict.fromkeys(c for r in records for c in r.captions))


def main(words: list[str]) -> None:
    """Train each preset's tokenizer and count the tokens of the queries."""
    parser = argparse.ArgumentParser(prog="python -m bench tokens")
    parser.add_argument("sources", nargs="+", metavar="SRC")
    parser.add_argument("--learn", default="captions", help="Caption key to learn from.")
    parser.add_argument("--ask", default="captions_zh", help="Caption key of the queries.")
    parser.add_argument("--longest", type=int, default=40, help="Characters of a query, at most.")
    options = parser.parse_args(words)
    learned = captions(options.sources, options.learn)
    queries = [c for c in captions(options.sources, options.ask) if len(c) <= options.longest]
    for name, preset in PRESETS.items():
        tokenizer = train(learned, preset.vocabulary, preset.context)
        cut = len(tokenizer.cut(queries))
        tokenizer.backend.no_truncation()
        tokenizer.backend.no_padding()
        counts = np.array([len(e.ids) for e in tokenizer.backend.encode_batch(queries)])
        row = {
            "preset": name,
            "learned": len(learned),
            "queries": len(queries),
            "context": preset.context,
            "share_whole": round(1 - cut / len(queries), 5),
            "mean_tokens": round(float(counts.mean()), 2),
            "p99_tokens": int(np.quantile(counts, 0.99)),
            "most_tokens": int(counts.max()),
        }
        measure.append("tokens", row)
