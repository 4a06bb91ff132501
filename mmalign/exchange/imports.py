"""`mmalign import`: vectors made by clip-retrieval, checked, normalised and named, into a store.

Shapes: N rows, D dimensions.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmalign.arrays import Floats
from mmalign.encoding.modalities import model_card
from mmalign.errors import IdentityError
from mmalign.exchange.parts import Part, find_parts, read_part, read_records
from mmalign.progress import bar, say
from mmalign.store import ModelCard, Row, Writer, add_failures, meta_json, open_store, pair_vectors
from mmalign.store.ids import hashes
from mmalign.values import json_value

NAMES = ("key", "image_path", "url")


@dataclass(frozen=True)
class ImportReport:
    """What `import_parts` did."""

    added: int
    present: int
    failed: int
    """Rows without a usable image vector; failures.jsonl lists them."""
    renamed: int
    """Rows that got another id, because an earlier row has theirs."""
    captions_left_out: int
    """Captions without a usable vector; meta keeps them as `captions_without_vector`."""
    rows: int


@dataclass(frozen=True)
class _Entry:
    """The contents of a metadata row."""

    id: str
    uri: str
    captions: list[str]
    """Only the first may have a vector."""
    meta: dict[str, Any]
    part_and_row: str
    """Numbers of its part and row."""


def import_parts(folder: str | Path, out: str | Path, model: str | Path) -> ImportReport:
    """Import vectors made by clip-retrieval; run again to continue with rows the store lacks.

    Args:
        folder: Holds img_emb/ and metadata/, and text_emb/ if there are captions.
        out: The store; created if it does not exist.
        model: A run folder or open_clip name. The folder does not say which model made the
            vectors, so the caller vouches for this one; only the dimensions can be checked.

    Raises:
        DataError: The folder does not have this layout, or its files are inconsistent.
        IdentityError: The model has other dimensions, or the store belongs to another model.
    """
    from mmalign.model import keep_weights, load_model  # An export needs no torch.

    parts = find_parts(Path(folder))
    encoder = load_model(model)
    if parts[0].dim != encoder.dim:
        raise IdentityError(
            f"{parts[0].images}: {parts[0].dim} dimensions, but {encoder.identity} makes "
            f"{encoder.dim}: give the model that made these vectors"
        )
    say(
        f"using {encoder.identity} as given: the vectors have its {encoder.dim} dimensions, but "
        "the folder does not say which model made them"
    )
    keep_weights(encoder)
    importer = _Importer(Path(out), model_card(encoder), parts)
    with importer.writer, bar("import", sum(part.rows for part in parts), "rows") as progress:
        for part in parts:
            row = 0
            for records, images_ND, texts_ND in read_part(part):
                entries = [_entry(r, f"{part.number}/{row + i}") for i, r in enumerate(records)]
                importer.add_rows(entries, images_ND, texts_ND)
                row += len(entries)
                progress.update(len(entries))
    return importer.report()


def _entry(record: dict[str, Any], part_and_row: str) -> _Entry:
    id, uri = _id_and_uri(record, part_and_row)
    values = {name: value for name, value in record.items() if not _is_nothing(value)}
    caption = str(values.pop("caption", ""))
    all_captions = values.pop("captions", None)
    others = (
        [str(c) for c in all_captions if c != caption] if isinstance(all_captions, list) else []
    )
    meta = values.pop("meta", "{}")
    with contextlib.suppress(TypeError, ValueError):
        meta = json_value(json.loads(meta))
    meta = meta if isinstance(meta, dict) else {"meta": meta}
    used_names = [name for name in NAMES if str(values.get(name)) in (id, uri)]
    meta |= {name: value for name, value in values.items() if name not in used_names}
    return _Entry(id, uri, [caption, *others], meta, part_and_row)


def _id_and_uri(record: dict[str, Any], part_and_row: str) -> tuple[str, str]:
    """Return the id and the uri of a row, from the best values it has."""
    values = [record.get(name) for name in NAMES]
    key, path, url = ("" if _is_nothing(value) else str(value) for value in values)
    # An image from a tar archive has its key as its path.
    is_path = "/" in path or "." in path
    return key or path or url or part_and_row, (
        path if is_path else url or path or key or part_and_row
    )


def _is_nothing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


class _UniqueIds:
    """Gives each row an id that is unique in the folder.

    The first row with an id keeps it. Ids are kept as hashes: 8 bytes per row.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        found = []
        for part in parts:
            row = 0
            for records in read_records(part, NAMES):
                ids = [_id_and_uri(r, f"{part.number}/{row + i}")[0] for i, r in enumerate(records)]
                found.append(hashes(ids))
                row += len(ids)
        self.known = np.sort(np.concatenate(found)) if found else hashes([])
        self.repeated = set(self.known[1:][self.known[1:] == self.known[:-1]].tolist())
        self.used: set[str] = set()

    def of(self, entry: _Entry) -> Iterator[str]:
        """Yield candidate ids for a row, best first; no other row has any of them."""
        qualified_id = f"{entry.part_and_row}/{entry.id}"
        for name in (entry.id, entry.uri, qualified_id, f"{entry.uri}#{entry.part_and_row}"):
            if name == entry.id and int(hashes([name])[0]) not in self.repeated:
                yield name
            elif name not in self.used and (name == entry.id or not self._is_used(name)):
                self.used.add(name)
                yield name

    def _is_used(self, name: str) -> bool:
        (wanted_hash,) = hashes([name])
        at = int(np.searchsorted(self.known, wanted_hash))
        return at < len(self.known) and bool(self.known[at] == wanted_hash)


class _Importer:
    """Adds rows to a store, each under a unique id, and counts them."""

    def __init__(self, out: Path, card: ModelCard, parts: Sequence[Part]) -> None:
        self.names = _UniqueIds(parts)
        self.writer = Writer(out, card)
        self.store = open_store(out)
        self.failed_uris = {failure["uri"] for failure in self.store.failures()}
        self.failures: list[dict[str, Any]] = []
        self.added = self.present = self.renamed = self.left_out = 0

    def add_rows(self, entries: list[_Entry], images_ND: Floats, texts_ND: Floats | None) -> None:
        """Add rows with usable vectors that the store lacks; note unusable vectors as failures."""
        images_N = _normalise(images_ND)
        for row in np.flatnonzero(~images_N).tolist():
            self._fail(entries[row], "the image vector is zero or not finite", embedded=False)
        texts_ND = images_ND[:0] if texts_ND is None else texts_ND
        texts_N = _normalise(texts_ND)
        rows = np.flatnonzero(images_N).tolist()
        for row, name in zip(rows, self._choose_ids([entries[r] for r in rows]), strict=True):
            entry, text_1D = entries[row], images_ND[:0]
            if not name:
                self.present += 1
                continue
            if entry.uri in self.failed_uris:
                self._fail(entry, None, embedded=True)
            if entry.captions[0] and len(texts_N):
                text_1D = texts_ND[[row]][texts_N[[row]]]
                if not len(text_1D):
                    self._fail(entry, "the text vector is zero or not finite", embedded=True)
            self._add(name, entry, images_ND[row], text_1D)

    def _choose_ids(self, entries: list[_Entry]) -> list[str]:
        """Return the id of each row, or an empty string if the store already has the row."""
        options = [self.names.of(entry) for entry in entries]
        names = [next(option) for option in options]
        numbers = self.store.find(names)
        stored = self.store.rows(numbers[numbers >= 0], ("uri",))
        uris = dict(
            zip(numbers[numbers >= 0].tolist(), (row["uri"] for row in stored), strict=True)
        )
        for i in np.flatnonzero(numbers >= 0).tolist():
            uri = uris[int(numbers[i])]
            # The store has a different row with this id.
            while uri not in (None, entries[i].uri):
                names[i] = next(options[i])
                numbers_found = self.store.find([names[i]])
                uri = (
                    self.store.rows(numbers_found, ("uri",))[0]["uri"]
                    if numbers_found[0] >= 0
                    else None
                )
            names[i] = names[i] if uri is None else ""
        return names

    def _add(self, name: str, entry: _Entry, image_D: Floats, text_1D: Floats) -> None:
        captions = entry.captions[: len(text_1D)]
        without_vector = [c for c in entry.captions[len(text_1D) :] if c]
        meta = (
            {**entry.meta, "captions_without_vector": without_vector}
            if without_vector
            else entry.meta
        )
        meta_text = meta_json(meta)
        self.writer.add(
            Row(name, entry.uri, tuple(captions), pair_vectors(image_D, text_1D), meta_text)
        )
        self.added += 1
        self.renamed += name != entry.id
        self.left_out += len(without_vector)

    def _fail(self, entry: _Entry, reason: str | None, *, embedded: bool) -> None:
        failure = {"id": entry.id, "uri": entry.uri, "reason": reason, "embedded": embedded}
        self.failures.append(failure)

    def report(self) -> ImportReport:
        """Write the list of failures, and print and return a summary."""
        place = self.writer.store
        add_failures(place, self.failures)
        rows = len(open_store(place))
        unusable = sum(1 for failure in self.failures if failure["reason"])
        failed = sum(1 for failure in self.failures if not failure["embedded"])
        if unusable:
            say(f"{unusable} vectors cannot be used; listed in {place / 'failures.jsonl'}")
        if self.renamed:
            say(
                f"{self.renamed} rows had the id of another row; their new id is made from their "
                "path, or from their part and row"
            )
        if self.left_out:
            say(f"{self.left_out} captions have no vector; they are in the metadata")
        done = f"{self.added} added, {self.present} already there, {failed} failed"
        say(f"{done}: {rows} rows in {place}")
        return ImportReport(self.added, self.present, failed, self.renamed, self.left_out, rows)


def _normalise(vectors_ND: Floats) -> NDArray[np.bool_]:
    """Scale vectors to unit norm in place; return a mask of the usable ones, shape (N,)."""
    norms_N = np.sqrt(np.einsum("nd,nd->n", vectors_ND, vectors_ND, dtype=np.float64))
    usable_N: NDArray[np.bool_] = np.isfinite(norms_N) & (norms_N > 0)
    vectors_ND /= np.where(usable_N, norms_N, 1)[:, None]
    return usable_N
