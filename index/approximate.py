"""FAISS finds candidates, the stored vectors score them; the only file that imports faiss.

Shapes: N vectors, M queries, Q queries without a result yet, D dimensions, K rows,
R candidates, P gathered vectors, L lists, B rows of a block.
"""

# The type stubs of FAISS are out of date.
# mypy: disable-error-code="attr-defined, call-arg, arg-type, assignment, no-any-return"

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from mmalign import files, kernels
from mmalign.arrays import Bools, Floats, Ints
from mmalign.errors import StoreError, VectorError
from mmalign.index import mapped
from mmalign.index.exact import Exact
from mmalign.index.quantizer import CoarseQuantizer, query_metric_and_root
from mmalign.index.spec import TUNED_KS, Index, IndexSpec, OperatingPoint
from mmalign.index.vectors import VectorReader
from mmalign.progress import bar

# K-means for the lists: maximum training rows, rows per list, iterations. Codes are trained on
# CODE_ROWS rows, with the same number of iterations: they have only 16 centroids.
KMEANS_ROWS, ROWS_PER_LIST, KMEANS_ITERATIONS = 131_072, 32, 8
CODE_ROWS = 16_384
# Of a graph: efConstruction, and the largest efSearch.
EF_CONSTRUCTION, MAX_EF_SEARCH = 40, 2_000
# Candidates gathered at once, counted in float16 values.
GATHERED_VALUES = 1 << 21
# Candidates requested from FAISS at once: it allocates several times that much memory.
CANDIDATES_PER_CALL = 1 << 18
# Filtered search is exact where the allowed vectors hold at most this many values in total.
EXACT_VALUES = 1 << 23
# Other filtered searches try several numbers of neighbours. First k, if the filter is expected to
# remove fewer than MAX_EXPECTED_REMOVED of them (a count, not a share). Then as many as are needed
# for ALLOWED_MARGIN * k allowed ones, on average, among the nearer neighbours (see `search`). Then
# NEIGHBOURS_GROWTH times as many, and so on, up to MAX_NEIGHBOURS_FACTOR times the largest tuned k.
MAX_EXPECTED_REMOVED, ALLOWED_MARGIN = 0.5, 1.3
NEIGHBOURS_GROWTH, MAX_NEIGHBOURS_FACTOR = 4, 10
# One candidate of the index, or one step in a graph, costs as much as this many exact comparisons.
CANDIDATE_COST = 20


class Approximate(Index):
    """A FAISS index with the vectors it was built from.

    Safe to use from several threads: search parameters are passed with each call.
    """

    def __init__(
        self,
        faiss_index: Any,
        vectors: VectorReader,
        points: Mapping[str, Sequence[OperatingPoint]],
        rows: int,
    ) -> None:
        """Combine a FAISS index with its vectors.

        Args:
            faiss_index: Its ids are vector numbers.
            vectors: At least those of the index.
            points: Search parameters by query modality, for ascending k.
            rows: Vectors that the index covers, deleted ones included.
        """
        self.faiss = faiss_index
        self.vectors = vectors
        self.points = points
        self.rows = rows
        self.indexed = int(faiss_index.ntotal)
        self.exact = Exact(vectors.first_rows(rows), max_code_bytes=0, owners=vectors.owners)

    def search(
        self,
        queries_MD: Floats,
        k: int,
        allow_N: Bools | None = None,
        *,
        query_modality: str = "text",
    ) -> tuple[Floats, Ints]:
        """See `Index.search`.

        Filtered search keeps the recall of the operating points or is exact. FAISS is queried
        without the filter, for k neighbours or more. The first k that are allowed are the result if
        they are among the nearer neighbours: the first k and half of the others. If they never are,
        the query is far from the allowed rows, and is compared with all of them.

        Neighbours are rows. Where rows have several vectors, the candidates of a query may belong
        to fewer than k rows. Then the search is widened.

        Raises:
            StoreError: The index is damaged.
        """
        queries_MD = np.ascontiguousarray(queries_MD, dtype=np.float32)
        self._check(queries_MD)
        if allow_N is not None:
            allow_N = allow_N[: self.rows]
        allowed = self.indexed if allow_N is None else int(np.count_nonzero(allow_N))
        if allow_N is not None and allowed * self.vectors.dim <= EXACT_VALUES:
            return self.exact.search(queries_MD, k, allow_N)
        scores_MK = np.full((len(queries_MD), k), -np.inf, np.float32)
        rows_MK = np.full((len(queries_MD), k), -1, np.int64)
        remaining_Q = np.arange(len(queries_MD))
        for point in self._attempts(k, allowed, query_modality):
            scores, rows = self.search_at(queries_MD[remaining_Q], point)
            found = rows >= 0 if allow_N is None else (rows >= 0) & allow_N[rows]
            # The nearer neighbours: the first k and half of the others. Their recall is higher than
            # that of all neighbours, which was tuned. If point.k == k, they are all neighbours.
            is_done_Q = found[:, : (k + point.k) // 2].sum(axis=1) >= min(k, allowed)
            order = np.argsort(~found, axis=1, kind="stable")[:, :k]
            scores_MK[remaining_Q] = np.take_along_axis(scores, order, axis=1)
            rows_MK[remaining_Q] = np.take_along_axis(rows, order, axis=1)
            remaining_Q = remaining_Q[~is_done_Q]
            if not len(remaining_Q) or (allow_N is None and self.indexed < self.rows):
                # Without `allow_N`, exact search cannot know which rows are deleted.
                return scores_MK, rows_MK
        scores_MK[remaining_Q], rows_MK[remaining_Q] = self.exact.search(
            queries_MD[remaining_Q], k, allow_N
        )
        return scores_MK, rows_MK

    def _attempts(self, k: int, allowed: int, query_modality: str) -> Iterator[OperatingPoint]:
        """Yield operating points to try in turn, while they cost less than exact search.

        They retrieve unfiltered neighbours: the fewer rows are allowed, the more are needed.
        """
        allowed_share = allowed / max(self.indexed, 1)
        if (1 - allowed_share) * k < MAX_EXPECTED_REMOVED:
            yield self.point(k, query_modality)
        if allowed_share == 1 and self.vectors.owners is not None:
            yield from self._wider_points(self.point(k, query_modality))
        max_neighbours = MAX_NEIGHBOURS_FACTOR * max(TUNED_KS)
        neighbours = math.ceil(2 * ALLOWED_MARGIN * k / max(allowed_share, 1e-9)) - k
        while allowed_share < 1 and neighbours <= max_neighbours:
            point = self.interpolated_point(neighbours, query_modality)
            graph = not isinstance(_ivf_or_graph(self.faiss), faiss.IndexIVF)
            visited = max(point.candidates, point.nprobe_or_ef) if graph else point.candidates
            if visited * CANDIDATE_COST > allowed:
                return
            yield point
            neighbours *= NEIGHBOURS_GROWTH

    def _wider_points(self, point: OperatingPoint) -> Iterator[OperatingPoint]:
        """Yield points that search twice as much each time, while they cost less than exact."""
        while 2 * point.candidates * CANDIDATE_COST <= self.indexed:
            wider = min(2 * point.nprobe_or_ef, max(point.nprobe_or_ef, self.max_nprobe_or_ef))
            point = OperatingPoint(point.k, wider, 2 * point.candidates)
            yield point

    def search_at(self, queries_MD: Floats, point: OperatingPoint) -> tuple[Floats, Ints]:
        """Search with given parameters, without a filter; k rows come back."""
        queries_MD = np.ascontiguousarray(queries_MD, dtype=np.float32)
        rows_MR = self.candidates(queries_MD, point)
        if self.vectors.owners is None:
            return self.rescore(queries_MD, rows_MR, point.k)

        def find(numbers_Q: Ints, count: int) -> tuple[Floats, Ints]:
            return self.rescore(queries_MD[numbers_Q], rows_MR[numbers_Q], count)

        return self.vectors.owners.search(find, len(queries_MD), point.k, rows_MR.shape[1])

    @property
    def max_nprobe_or_ef(self) -> int:
        """Return the nprobe of all lists, or an efSearch that visits nearly all of a graph."""
        ivf = _ivf_or_graph(self.faiss)
        return (
            int(ivf.nlist) if isinstance(ivf, faiss.IndexIVF) else min(self.indexed, MAX_EF_SEARCH)
        )

    def point(self, k: int, query_modality: str) -> OperatingPoint:
        """Return parameters tuned for at least k neighbours, or scaled up to k."""
        points = self.points.get(query_modality) or next(iter(self.points.values()))
        return next((p for p in points if p.k >= k), points[-1]).scaled_to(k)

    def interpolated_point(self, k: int, query_modality: str) -> OperatingPoint:
        """Return parameters for k neighbours, interpolated if k lies between two tuned points."""
        points = self.points.get(query_modality) or next(iter(self.points.values()))
        lower = next((p for p in reversed(points) if p.k <= k), None)
        upper = next((p for p in points if p.k >= k), None)
        if lower is None or upper is None or lower == upper:
            return self.point(k, query_modality)
        # Both grow roughly as a power of k.
        fraction = math.log(k / lower.k) / math.log(upper.k / lower.k)

        def interpolate(low: int, high: int) -> int:
            return math.ceil(low * (high / low) ** fraction)

        candidates = interpolate(lower.candidates, upper.candidates)
        return OperatingPoint(
            k, interpolate(lower.nprobe_or_ef, upper.nprobe_or_ef), max(k, candidates)
        )

    def candidates(self, queries_MD: Floats, point: OperatingPoint) -> Ints:
        """Return the rows that FAISS scores best, (M, R); they are to be scored exactly.

        If it finds fewer than R for a query, the others are -1.

        Raises:
            StoreError: The index is damaged.
        """
        self._check(queries_MD)
        parameters = _parameters(self.faiss, point.nprobe_or_ef)
        count = min(point.candidates, self.indexed)
        at_once = max(1, CANDIDATES_PER_CALL // max(1, count))
        try:
            parts = [
                self.faiss.search(queries_MD[first : first + at_once], count, params=parameters)[1]
                for first in range(0, max(1, len(queries_MD)), at_once)
            ]
        except (RuntimeError, MemoryError) as error:
            raise StoreError(f"the index cannot be searched: {_reason(error)}") from None
        rows_MR = np.concatenate(parts)
        if len(rows_MR) and not -1 <= rows_MR.min() <= rows_MR.max() < self.rows:
            raise StoreError(f"the index returns rows beyond the {self.rows} that it covers")
        return rows_MR

    def _check(self, queries_MD: Floats) -> None:
        if queries_MD.ndim != 2 or queries_MD.shape[1] != self.vectors.dim:
            shape = f"(queries, {self.vectors.dim})"
            raise VectorError(f"queries must have shape {shape}, not {queries_MD.shape}")

    def rescore(self, queries_MD: Floats, rows_MR: Ints, k: int) -> tuple[Floats, Ints]:
        """Score candidates exactly and keep the k best."""
        at_once = max(1, GATHERED_VALUES // max(1, rows_MR.shape[1] * self.vectors.dim))
        # One buffer for all blocks: repeated allocation would fragment the memory.
        buffer_rows = min(at_once, len(queries_MD)) * rows_MR.shape[1]
        buffer_PD = torch.empty(buffer_rows, self.vectors.dim, dtype=torch.float16)
        parts = []
        for first in range(0, len(queries_MD), at_once):
            rows = rows_MR[first : first + at_once]
            vectors = self.vectors.gather(np.maximum(rows, 0).ravel(), buffer_PD)
            parts.append(
                kernels.best_candidates(
                    torch.from_numpy(queries_MD[first : first + at_once]),
                    torch.from_numpy(vectors).view(*rows.shape, -1),
                    torch.from_numpy(rows),
                    k,
                )
            )
        scores, found = zip(*parts, strict=True)
        return torch.cat(scores).numpy(), torch.cat(found).numpy()


def build(
    vectors: VectorReader,
    spec: IndexSpec,
    quantizer: CoarseQuantizer | None = None,
    *,
    seed: int = 0,
    shown: bool | None = None,
) -> Any:
    """Build a FAISS index over the live rows; its ids are row numbers.

    Args:
        vectors: Read in blocks.
        spec: Kind and code.
        quantizer: The coarse quantizer of an IVF; see `cluster`.
        seed: Seed of the training sample.
        shown: Whether to show a progress bar; None: if bars are shown on stderr.

    Raises:
        VectorError: A vector holds NaN or infinity, or is zero.
    """
    factory = spec.factory(vectors.live, vectors.dim)
    index = faiss.index_factory(vectors.dim, factory, faiss.METRIC_INNER_PRODUCT)
    sample = vectors.gather(vectors.sample_rows(CODE_ROWS, seed)).astype(np.float32)
    if spec.kind == "hnsw":
        index.hnsw.efConstruction = EF_CONSTRUCTION
        index.train(sample)
        index = faiss.IndexIDMap(index)
    else:
        quantizer = quantizer or cluster(vectors, spec, seed=seed)
        rotation = faiss.downcast_VectorTransform(index.chain.at(0))
        rotation.init(seed)
        ivf = _ivf_or_graph(index)
        # A quantizer that already has its centroids is not trained again.
        ivf.quantizer.add(rotation.apply(quantizer.centroids_LD))
        if isinstance(ivf, faiss.IndexIVFPQFastScan):
            ivf.pq.cp.min_points_per_centroid, ivf.pq.cp.niter = (
                1,
                KMEANS_ITERATIONS,
            )  # see `cluster`
        index.train(sample)
    del sample
    if quantizer is not None:
        _fill_lists(index, vectors, quantizer, shown)
        return index
    with bar("index", vectors.live, "vectors", shown=shown) as progress:
        for rows_B, block_BD in vectors.blocks():
            index.add_with_ids(block_BD, rows_B)
            progress.update(len(rows_B))
    return index


def _fill_lists(
    index: Any, vectors: VectorReader, quantizer: CoarseQuantizer, shown: bool | None
) -> None:
    """Assign every vector to its list and encode it.

    FAISS cannot assign by the query metric. It also takes twice as long as this function, which
    rotates and compares vectors in torch. Codes are kept in a temporary file until all vectors are
    assigned, as fast-scan packs 32 rows of a list into a block.
    """
    ivf = _ivf_or_graph(index)
    code_bytes = ivf.code_size
    rotation = faiss.downcast_VectorTransform(index.chain.at(0))
    rotation_DD = torch.from_numpy(faiss.vector_to_array(rotation.A)).view(rotation.d_out, -1).T
    row_numbers = np.zeros(vectors.live, np.int64)
    list_numbers = np.zeros(vectors.live, np.int64)
    with (
        files.scratch_file() as file,
        bar("index", vectors.live, "vectors", shown=shown) as progress,
    ):
        first = 0
        for rows_B, block_BD in vectors.blocks():
            part = slice(first, first + len(rows_B))
            row_numbers[part], list_numbers[part] = rows_B, quantizer.assign(block_BD)
            coded = np.empty((len(rows_B), code_bytes), np.uint8)
            rotated = (torch.from_numpy(block_BD) @ rotation_DD).numpy()
            ivf.encode_vectors(
                len(rows_B), faiss.swig_ptr(rotated), faiss.swig_ptr(list_numbers[part]),
                faiss.swig_ptr(coded),
            )  # fmt: skip
            with files.name_in_errors(files.scratch_folder()):
                file.write(coded.data)
            first = part.stop
            progress.update(len(rows_B))
        file.flush()
        codes = np.memmap(file, np.uint8, "r", shape=(vectors.live, code_bytes))
        order = np.argsort(list_numbers, kind="stable")
        ends = np.cumsum(np.bincount(list_numbers, minlength=ivf.nlist))
        for list_number, positions in enumerate(np.split(order, ends[:-1])):
            if len(positions):
                _append_packed(ivf, list_number, row_numbers[positions], codes[positions])
    ivf.ntotal = index.ntotal = len(row_numbers)


def _append_packed(ivf: Any, list_number: int, ids: Ints, codes: NDArray[np.uint8]) -> None:
    """Add rows to an empty list."""
    packer = faiss.downcast_InvertedLists(ivf.invlists).packer
    blocks = -(-len(ids) // packer.nvec)
    flat = np.zeros((blocks * packer.nvec, codes.shape[1]), np.uint8)
    flat[: len(codes)] = codes
    packed = np.zeros((blocks, packer.block_size), np.uint8)
    for i in range(blocks):
        packer.pack_all(faiss.swig_ptr(flat[i * packer.nvec :]), faiss.swig_ptr(packed[i]))
    ivf.invlists.add_entries(list_number, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(packed))


def cluster(
    vectors: VectorReader, spec: IndexSpec, queries_MD: Floats | None = None, seed: int = 0
) -> CoarseQuantizer:
    """Train the coarse quantizer of an IVF by k-means on a random sample.

    Args:
        vectors: The vectors to be assigned.
        spec: Number of lists, and the metric.
        queries_MD: Queries for the query metric.
        seed: Seed of the sample.
    """
    count = spec.lists(vectors.live)
    rows = vectors.sample_rows(min(KMEANS_ROWS, ROWS_PER_LIST * count), seed)
    sample = vectors.gather(rows).astype(np.float32)
    metric_DD = None
    kmeans = faiss.Clustering(vectors.dim, count)
    kmeans.niter, kmeans.seed, kmeans.spherical = KMEANS_ITERATIONS, seed, True
    nearest = faiss.IndexFlatIP(vectors.dim)
    if spec.metric == "queries" and queries_MD is not None:
        metric_DD, root_DD = query_metric_and_root(queries_MD)
        sample = sample @ root_DD
        kmeans.spherical, nearest = False, faiss.IndexFlatL2(vectors.dim)
    # FAISS warns on stderr if it considers the rows too few; here recall is measured instead.
    kmeans.min_points_per_centroid, kmeans.max_points_per_centroid = 1, ROWS_PER_LIST
    kmeans.train(sample, nearest)
    centroids = faiss.vector_to_array(kmeans.centroids).reshape(count, vectors.dim)
    if metric_DD is not None:
        centroids = np.linalg.solve(root_DD, centroids.T).T.astype(np.float32)
    return CoarseQuantizer(np.ascontiguousarray(centroids), metric_DD)


def serialized_bytes(index: Any) -> int:
    """Return the serialized size of the index in bytes."""
    count = 0

    def add(part: bytes) -> None:
        nonlocal count
        count += len(part)

    faiss.write_index(index, faiss.PyCallbackIOWriter(add, 1 << 20))
    return count


def save(index: Any, path: Path) -> None:
    """Write the FAISS file atomically; the lists of an IVF go into a separate file."""
    ivf = _ivf_or_graph(index)
    if not isinstance(ivf, faiss.IndexIVF):
        files.write_through(path, lambda name: faiss.write_index(index, files.utf8_name(name)))
        return
    lists = faiss.downcast_InvertedLists(ivf.invlists)
    list_sizes: list[tuple[int, int]] = []
    files.write_through(lists_path(path), lambda name: list_sizes.extend(_write_lists(lists, name)))
    ivf.own_invlists, ivf.invlists = False, None
    writer = faiss.VectorIOWriter()
    faiss.write_index(index, writer)
    ivf.invlists, ivf.own_invlists = lists, True
    # Its last four bytes say that there are no lists; replace them by the table of the lists.
    header = faiss.vector_to_array(writer.data).tobytes()[: -len(mapped.NO_LISTS)]
    lists_table = mapped.lists_table(list_sizes, ivf.code_size)
    file_reference = mapped.file_reference(lists_path(path).name, lists_path(path).stat().st_size)
    files.write_bytes(path, header + lists_table + file_reference)


def lists_path(path: Path) -> Path:
    """Return the path of the file with the lists of an index."""
    return path.with_suffix(".lists")


def _write_lists(lists: Any, name: str) -> Iterator[tuple[int, int]]:
    """Write packed codes and ids, list by list; yield the rows and the capacity of each."""
    with open(name, "wb") as file:
        for list_number in range(lists.nlist):
            rows = lists.list_size(list_number)
            blocks = -(-rows // lists.n_per_block)
            capacity = blocks * lists.n_per_block
            ids = np.full(capacity, -1, np.int64)
            if rows:
                codes = faiss.rev_swig_ptr(lists.get_codes(list_number), blocks * lists.block_size)
                ids[:rows] = faiss.rev_swig_ptr(lists.get_ids(list_number), rows)
                file.write(codes.tobytes())
                file.write(ids.tobytes())
            yield rows, capacity


def load(path: Path, indexed: int, dim: int) -> Any:
    """Open a FAISS file by memory-mapping it.

    Raises:
        StoreError: It cannot be read, or does not match its description.
    """
    try:
        if lists_path(path).exists():
            lists = lists_path(path)
            content = mapped.with_lists_at(
                path.read_bytes(), lists.name, str(lists), lists.stat().st_size
            )
            index = faiss.deserialize_index(
                np.frombuffer(content, np.uint8), faiss.IO_FLAG_READ_ONLY
            )
            # By default FAISS starts 32 threads for each query, to read its lists ahead. A query
            # whose lists are in memory then takes 2.5 ms instead of 1, and there is little to gain
            # with lists on a disk, as a query reads few pages.
            faiss.downcast_InvertedLists(_ivf_or_graph(index).invlists).prefetch_nthread = 0
        else:
            index = faiss.read_index(files.utf8_name(path), faiss.IO_FLAG_MMAP_IFC)
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        raise StoreError(f"{path}: index cannot be read: {_reason(error)}") from None
    if index.ntotal != indexed:
        raise StoreError(f"{path}: holds {index.ntotal} vectors, but index.json says {indexed}")
    if index.d != dim:
        raise StoreError(f"{path}: holds vectors of {index.d} dims, but the store's have {dim}")
    return index


def _reason(error: Exception) -> str:
    """Return the message of FAISS, without its source locations."""
    return str(error).rsplit("Error:", 1)[-1].strip()


def set_threads(count: int) -> None:
    """Set the number of threads of FAISS; its default may differ from torch's."""
    faiss.omp_set_num_threads(count)


def _ivf_or_graph(index: Any) -> Any:
    """Return the IVF or the graph inside a rotation or an id map."""
    while isinstance(index, faiss.IndexPreTransform | faiss.IndexIDMap):
        index = faiss.downcast_index(index.index)
    return index


def _parameters(index: Any, nprobe_or_ef: int) -> Any:
    """Return search parameters of the type that the index needs."""
    ivf = _ivf_or_graph(index)
    if isinstance(ivf, faiss.IndexIVF):
        inner = faiss.SearchParametersIVF(nprobe=min(nprobe_or_ef, ivf.nlist))
    else:
        inner = faiss.SearchParametersHNSW(efSearch=nprobe_or_ef)
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=inner)
    return inner
