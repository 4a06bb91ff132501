"""The output of `mmalign info`: as values, and as ten readable lines."""

import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mmalign.errors import shell_command
from mmalign.modality import TEXT, find

if TYPE_CHECKING:
    from mmalign.store import Store
    from mmalign.store.groups import Shard
    from mmalign.store.manifest import Manifest

# Number of captions, from the start, in which scripts are counted.
COUNTED = 20_000
SHOWN = 3
# First words of the Unicode names of letters, and the common names of the scripts. Kana identify
# Japanese, as it shares its Chinese characters with Chinese.
SCRIPTS = {
    "LATIN": "Latin", "CJK": "Chinese", "HIRAGANA": "Japanese", "KATAKANA": "Japanese",
    "HANGUL": "Korean", "CYRILLIC": "Cyrillic", "ARABIC": "Arabic", "DEVANAGARI": "Devanagari",
    "GREEK": "Greek", "HEBREW": "Hebrew", "THAI": "Thai",
}  # fmt: skip


def described(store: "Store") -> dict[str, Any]:
    """Return a summary of a store as values."""
    from mmalign.index import describe

    manifest, folder = store.manifest, store.index_folder
    vectors = {name: _live_vectors(store, name) for name in store.modalities}
    return {
        "rows": len(store),
        "deleted": manifest.physical_rows - manifest.rows,
        "generation": manifest.generation,
        "format": manifest.format,
        "model": {k: getattr(manifest.model, k) for k in ("identity", "source", "dim")},
        "towers": {tower.modality: tower.identity for tower in manifest.model.towers},
        "next": _next(manifest),
        "precision": _precisions(manifest.shards),
        "dim": manifest.model.dim,
        "vectors": vectors,
        "captions": vectors.get(TEXT.name, 0),
        "shards": len(manifest.shards),
        "failures": len(store.failures()),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "index": describe(folder) if folder else None,
    }


def _live_vectors(store: "Store", modality: str) -> int:
    owners = store.owners(modality)
    return len(owners) if store.live is None else int(store.live[owners].sum())


def _next(manifest: "Manifest") -> dict[str, Any] | None:
    """Return the model whose vectors are being built, and how many rows have them."""
    if manifest.next is None:
        return None
    done = sum(s.rows - s.deleted_rows for s in manifest.shards if s.next)
    return {"identity": manifest.next.identity, "source": manifest.next.source, "rows": done}


def _precisions(shards: Iterable["Shard"]) -> dict[str, int]:
    """Count live rows by the arithmetic that their vectors were computed in."""
    counts: Counter[str] = Counter()
    for shard in shards:
        counts[shard.precision or "unknown"] += shard.rows - shard.deleted_rows
    return dict(counts)


def in_words(store: "Store", values: dict[str, Any]) -> list[str]:
    """Return readable lines: rows, captions by script, model, index, failures, size."""
    deleted = values["deleted"]
    compact = shell_command("compact", store.path)
    more = f", {deleted:,} more are deleted; {compact} frees their space" if deleted else ""
    name = values["model"]["identity"].rsplit("-", 1)[0]
    vectors = ", ".join(f"{count:,} {_installed(m)}" for m, count in values["vectors"].items())
    lines = [
        f"rows      {values['rows']:,}{more}",
        f"captions  {values['captions']:,}{_by_share(scripts(_captions(store)))}",
        f"vectors   {vectors}",
        f"model     {name}, {values['dim']} dimensions",
        f"          from {values['model']['source'] or 'an unknown source'}",
    ]
    if values["next"]:
        following = values["next"]
        done = f"{following['rows']:,} of {values['rows']:,} rows"
        lines.append(f"next      vectors of {following['identity']}: {done} have them")
    if values["index"] is None:
        build = shell_command("index", store.path)
        lines.append(f"index     none: every row is compared; {build} builds one")
    else:
        lines += [
            f"index     {modality}s: {_index(part)}"
            for modality, part in values["index"]["modalities"].items()
        ]
    lines.append(f"failures  {values['failures']:,}{_reasons(store)}")
    shards = values["shards"]
    lines.append(
        f"size      {_bytes(values['bytes'])} in {shards:,} shard{'s' * (shards != 1)}, "
        f"generation {values['generation']}"
    )
    return lines


def _installed(modality: str) -> str:
    return modality if find(modality) else f"{modality} (a modality that is not installed here)"


def scripts(captions: Iterable[str]) -> Counter[str]:
    """Count captions by the script that most of their letters belong to.

    >>> sorted(scripts(["a dog", "一只狗", "犬がいる", "12"]).items())
    [('Chinese', 1), ('Japanese', 1), ('Latin', 1), ('other', 1)]
    """
    return Counter(map(_script, captions))


def _script(caption: str) -> str:
    found = Counter(
        SCRIPTS.get(unicodedata.name(letter, "?").split()[0], "other")
        for letter in caption
        if letter.isalpha()
    )
    if found["Japanese"]:
        return "Japanese"
    return found.most_common(1)[0][0] if found else "other"


def _captions(store: "Store") -> list[str]:
    found: list[str] = []
    for batch in store.batches(("captions",)):
        for captions in batch.column(0).to_pylist():
            found += captions
            if len(found) >= COUNTED:
                return found
    return found


def _by_share(counts: Counter[str]) -> str:
    whole = counts.total()
    return "".join(f", {name} {count / whole:.0%}" for name, count in counts.most_common(SHOWN))


def _index(part: dict[str, Any]) -> str:
    if part["kind"] == "exact":
        return f"exact search over {part['rows']:,}"
    return f"{part['name']} over {part['rows']:,}, measured recall {part['recall']:.3f}"


def _reasons(store: "Store") -> str:
    counts = Counter(f["reason"].split(":")[0] for f in store.failures())
    told = ", ".join(f"{reason} {count:,}" for reason, count in counts.most_common(SHOWN))
    rest = counts.total() - sum(count for _, count in counts.most_common(SHOWN))
    return f": {told}{f', others {rest:,}' if rest else ''}" if told else ""


def _bytes(count: float) -> str:
    """Format an amount of memory.

    >>> _bytes(950), _bytes(4527242), _bytes(3.2e10)
    ('950 bytes', '4.5 MB', '32.0 GB')
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
