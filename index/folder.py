"""An index on disk: for each modality a spec, its measured recall, and a FAISS file if need be.

index.json     what was built, from which rows, and how well it finds them
image.faiss    only where the image vectors got an IVF index
text.faiss     likewise
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmalign import files
from mmalign.errors import StoreError
from mmalign.index import ivf
from mmalign.index.exact import Exact, Extended
from mmalign.index.spec import Floats, Index, Shards, Spec, choose, neighbour_recall

K = 10


def build_index(
    folder: Path, modality: str, shards: Shards, *, dim: int, queries_MD: Floats, recall: float
) -> dict[str, Any]:
    """Build, tune and write the index of one modality; return its part of index.json.

    Args:
        folder: An existing folder for the FAISS file.
        modality: "image" or "text": what the vectors are of.
        shards: The vectors, each (rows, D) float16.
        dim: Dimensions.
        queries_MD: Queries of the other modality; half of them tune, the other half measure.
        recall: Share of the true ten nearest neighbours to be found, between 0 and 1.
    """
    rows = sum(len(s) for s in shards)
    spec = choose(rows, dim)
    description: dict[str, Any] = {"recall_wanted": recall, "queries": 0}
    if spec.kind == "exact":
        return description | {"spec": asdict(spec), "recall": 1.0}
    index = ivf.build(shards, spec)
    half = len(queries_MD) // 2
    if half:
        true = Exact(shards).search(queries_MD, K)[1]
        index = ivf.tune(index, queries_MD[:half], true[:half], recall)
        found = index.search(queries_MD[half:], K)[1]
        measured: float | None = neighbour_recall(found, true[half:])
        description["queries"] = len(queries_MD) - half
    else:
        # Nothing to measure with: look into a tenth of the lists and claim nothing.
        index, measured = ivf.Ivf(index.index, max(1, spec.lists // 10)), None
    ivf.save(index, folder / f"{modality}.faiss")
    return description | {"spec": asdict(ivf.with_probes(spec, index)), "recall": measured}


def describe(folder: Path) -> dict[str, Any]:
    """Read index.json."""
    try:
        return json.loads((folder / "index.json").read_bytes())  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise StoreError(f"{folder / 'index.json'}: index cannot be read: {error}") from None


def open_index(folder: Path | None, modality: str, shards: Shards) -> Index:
    """Open the index of one modality over the store's vectors; rows it does not cover are exact.

    A folder of None means exact search.
    """
    if folder is None:
        return Exact(shards)
    spec = Spec(**describe(folder)["modalities"][modality]["spec"])
    if spec.kind == "exact":
        return Exact(shards)
    return Extended(ivf.load(folder / f"{modality}.faiss", spec), shards)


def write_description(folder: Path, content: dict[str, Any]) -> None:
    """Write index.json with the hashes of the files beside it; it makes the folder an index."""
    hashes = {p.name: files.sha256(p) for p in sorted(folder.glob("*.faiss"))}
    files.write_json(folder / "index.json", {"format": 1, **content, "sha256": hashes})
