"""Scan any mix of sources into one list of records, with a reason for everything left out."""

import glob
import os
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from mmalign import files
from mmalign.data import folders, places, tables, tars
from mmalign.data.columns import ReadOptions, listed
from mmalign.data.kinds import PICTURE_SUFFIXES, SOURCE_SUFFIXES, suffix
from mmalign.data.samples import (
    DEFAULT_CAPTION_KEY,
    Affected,
    Record,
    SampleProblem,
    ScanResults,
    Skip,
)
from mmalign.data.spilled import UniqueIds
from mmalign.errors import DataError, UsageError, nearest
from mmalign.modality import IMAGE
from mmalign.progress import bar, say

Sources = str | Path | Sequence[str | Path]
"""One source or several: paths, patterns or URLs."""
MAX_SILENT_SKIPS = 0.01
# The maximum number of tables whose columns are listed.
MAX_TABLES = 3
# The number of samples whose metadata is searched for possible captions.
MAX_DESCRIBED = 1_000
PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")
SHEETS = (".xlsx", ".xls", ".ods", ".numbers")
HINTS = {end: "unpack it first" for end in PACKED} | {end: "save it as .csv" for end in SHEETS}


@dataclass(frozen=True)
class Catalog:
    """All records of the sources, in a fixed order, and everything that was left out."""

    records: list[Record]
    skips: list[Skip]


def as_sources(sources: Sources) -> tuple[str, ...]:
    """Return sources as a tuple of strings; a single source need not be in a list.

    >>> as_sources("photos"), as_sources([Path("a.tar"), "b.tar"])
    (('photos',), ('a.tar', 'b.tar'))
    """
    if isinstance(sources, str | Path):
        return (os.fspath(sources),)
    return tuple(os.fspath(source) for source in sources)


def scan(
    sources: Sources,
    *,
    caption_keys: Sequence[str] = (DEFAULT_CAPTION_KEY,),
    image_column: str | None = None,
    need_captions: bool = False,
) -> Catalog:
    """List the images of folders, tars (braces, globs), tables, and fsspec URLs of these.

    Args:
        sources: One or several paths, patterns or URLs.
        caption_keys: Keys of the .json (or columns of the table) that hold captions; several are
            joined. The default key also reads `caption`, `text`, `title` and the .txt file.
        image_column: The table column that holds images or their paths; by default the first of the
            usual names.
        need_captions: Leave out samples without a caption (training, evaluation).

    Returns:
        A catalog whose record ids are unique: `<name of the source>/<key>`, or the whole uri where
        two sources would give two files the same id.

    Raises:
        DataError: A source does not exist, is of no known kind, or no source holds a usable sample.
    """
    sources = as_sources(sources)
    records: list[Record] = []
    skips: list[Skip] = []
    fields: dict[str, None] = {}
    for found in _stream(sources, ReadOptions(caption_keys, image_column)):
        if isinstance(found, Skip):
            skips.append(found)
        elif found.modality != IMAGE.name:
            reason = f"not an image: {found.modality}"
            skips.append(Skip(found.id, found.uri, reason, "extension"))
        elif need_captions and not found.captions:
            skips.append(Skip(found.id, found.uri, "no caption"))
            if len(skips) < MAX_DESCRIBED:
                fields.update(dict.fromkeys(found.meta))
        else:
            records.append(found)
    if need_captions:
        # A caption problem explains the missing caption; one line per sample is enough.
        without_caption_uris = {s.uri for s in skips if s.reason == "no caption"}
        explained = {
            s.uri: replace(s, affects="sample")
            for s in skips
            if s.sample_is_used and s.uri in without_caption_uris
        }
        skips = [
            s
            for s in skips
            if s.uri not in explained or not (s.sample_is_used or s.uri in without_caption_uris)
        ]
        skips += explained.values()
    if not records:
        raise nothing_usable(sources, skips, caption_keys, image_column, list(fields))
    return Catalog(records, skips)


def stream(
    sources: Sequence[str], caption_keys: Sequence[str], image_column: str | None = None
) -> Generator[Record | Skip, None, None]:
    """Yield samples of all modalities, one by one: memory does not grow with their number.

    If no sample has a caption, the available columns and other files are reported at the end.
    """
    sample_count = with_captions = 0
    fields: dict[str, None] = {}
    other_files: list[Skip] = []
    options = ReadOptions(caption_keys, image_column)
    with closing(_stream(sources, options)) as scanned:
        for found in scanned:
            if isinstance(found, Record):
                sample_count += 1
                with_captions += bool(found.captions)
                if not with_captions and sample_count < MAX_DESCRIBED:
                    fields.update(dict.fromkeys(found.meta))
            else:
                # A caption that cannot be read still counts as found.
                with_captions += found.sample_is_used
                if (
                    not with_captions
                    and found.affects == "extension"
                    and len(other_files) < MAX_DESCRIBED
                ):
                    other_files.append(found)
            yield found
    if sample_count and not with_captions and caption_keys:
        say(f"no captions found: {_looked_for(sources, options, list(fields), other_files)}")


def _stream(sources: Sequence[str], options: ReadOptions) -> Generator[Record | Skip, None, None]:
    with closing(UniqueIds()) as names, bar("scan", unit="samples") as progress:
        for number, place in enumerate(expand_sources(sources)):
            for found in map(_printable, _scan_one(place, options)):
                progress.update()
                if isinstance(found, Skip):
                    yield names.without_repeats(found, number)
                else:
                    yield names.with_unique_id(found)


def _looked_for(
    sources: Sequence[str], options: ReadOptions, fields: Sequence[str], others: Sequence[Skip]
) -> str:
    """Say where captions were searched for; list available columns, metadata, other files."""
    told = f"looked for under {', '.join(options.caption_keys)} (see --caption-key)"
    found = [place for place in expand_sources(sources) if tables.is_table(place)]
    for place in found[:MAX_TABLES]:
        with suppress(DataError):
            told += f"; {place} has the columns {listed(tables.column_names(place, options))}"
    if fields and not found:
        told += f"; the metadata of the images has the fields {listed(fields)}"
    return told + (f"; other files: {_by_extension(others)}" if others else "")


def expand_sources(sources: Sequence[str]) -> list[str]:
    """Expand braces and globs to existing paths; a URL without a glob is returned unchanged."""
    from braceexpand import braceexpand

    found: list[str] = []
    for source in sources:
        source_path = places.local_path(os.path.expanduser(source))
        try:
            # A backslash is an escape only where it does not separate folders.
            patterns = (
                [source_path]
                if _is_there(source_path)
                else braceexpand(source_path, escape=os.sep == "/")
            )
            for pattern in patterns:
                matches = _matches(pattern)
                if not matches:
                    raise DataError(f"{source}: no such file or folder{_near(pattern)}")
                found += matches
        except ValueError as error:
            raise DataError(f"{source}: {error}") from None
    return found


def refuse_own_sources(out: Path | str, sources: Sequence[str], *, option: str = "--out") -> None:
    """Refuse an output folder that is a source, lies in a source folder, or contains a source.

    A hidden folder in a source is allowed, as a scan passes over it.

    Args:
        out: The folder.
        sources: As `scan` takes them.
        option: What names the folder on the command line.

    Raises:
        UsageError: It is, lies in, or contains a source.
        DataError: A source does not exist.
    """
    folder = os.path.realpath(out)
    for place in expand_sources(sources):
        if places.is_url(place):
            continue
        source = os.path.realpath(place)
        if _is_same(folder, source):
            how = "is a source"
        elif _lies_in(folder, source):
            if any(part.startswith(".") for part in os.path.relpath(folder, source).split(os.sep)):
                continue
            how = f"is inside the source {place}"
        elif _lies_in(source, folder):
            how = f"contains the source {place}"
        else:
            continue
        raise UsageError(f"{option} {out}: {how}; use another {option}")


def _lies_in(path: str, folder: str) -> bool:
    return any(_is_same(str(parent), folder) for parent in Path(path).parents)


def _is_same(one: str, other: str) -> bool:
    """Return whether two names refer to one file or folder, despite letter case and links."""
    try:
        return one == other or os.path.samefile(one, other)
    except OSError:
        return False


def _is_there(place: str) -> bool:
    return not places.is_url(place) and os.path.exists(place)


def _matches(pattern: str) -> list[str]:
    if places.is_url(pattern):
        return _expand_url(pattern)
    if os.path.exists(pattern):
        return [os.path.abspath(pattern)]
    found = [os.path.abspath(hit) for hit in sorted(glob.glob(pattern))]
    # img2dataset writes a table and statistics beside each tar.
    tars = {hit.removesuffix(".tar") for hit in found if hit.endswith(".tar")}
    tables_beside = {tar + end for tar in tars for end in (".parquet", "_stats.json")}
    return [hit for hit in found if hit not in tables_beside]


def _expand_url(url: str) -> list[str]:
    try:
        fs, path = places.file_system(url)
        with places.foreign_errors():
            # An earlier listing may be out of date.
            fs.invalidate_cache()
            return sorted(map(fs.unstrip_protocol, fs.glob(path))) if "*" in path else [url]
    except OSError as error:
        raise DataError(f"{url}: cannot be opened: {places.reason(error)}") from None


def read_image(record: Record) -> bytes:
    """Read the encoded image of a record, wherever it is stored."""
    if record.row >= 0:
        return tables.read_cell(record.path, record.row, record.column)
    try:
        return places.read(record.path, record.offset, record.length)
    except OSError as error:
        raise SampleProblem(f"cannot be read: {places.reason(error)}") from None


def count_skipped(skips: Iterable[Skip], *kinds: Affected) -> int:
    """Count the samples or files that skips of some kinds represent."""
    return sum(s.count for s in skips if s.affects in kinds)


def count_found(records: int, skips: Iterable[Skip]) -> int:
    """Count the samples and files that a scan found, given its number of records."""
    return records + count_skipped(skips, "sample", "extension")


def report_skips(
    skips: Sequence[Skip], *, found: int, used: int, where: Path | str | None = None
) -> None:
    """Report what was left out and why: a warning above 1 %, an error if nothing is used.

    Args:
        skips: Each is counted by what it affects.
        found: How many samples and files the scan found, see `count_found`.
        used: How many samples are used.
        where: The file that lists the skips.

    Raises:
        DataError: Not one sample is used.
        AssertionError: A sample was counted twice or not at all, which is a bug in mmalign.
    """
    of = {kind: [s for s in skips if s.affects == kind] for kind in get_args(Affected)}
    failed, passed_over = count_skipped(skips, "sample"), count_skipped(skips, "extension")
    if found != used + failed + passed_over:
        ends = f"{used} used, {failed} failed, {passed_over} passed over"
        raise AssertionError(f"{found} samples were found, and became {ends}: a bug in mmalign")
    total = used + failed
    if failed and not used:
        first = f"; the first is {of['sample'][0].uri}: {of['sample'][0].reason}"
        raise DataError(f"none of the {total} samples can be used: {_reasons(of['sample'])}{first}")
    told = []
    if failed:
        told.append(f"{failed} of {total} samples skipped ({_reasons(of['sample'])})")
    if of["captions"]:
        told.append(
            f"captions of {len(of['captions'])} samples not used ({_reasons(of['captions'])})"
        )
    if of["place"]:
        told.append(
            f"{len(of['place'])} files or folders not read completely ({_reasons(of['place'])})"
        )
    if told:
        few = MAX_SILENT_SKIPS * total
        loud = bool(of["place"]) or failed > few or len(of["captions"]) > few
        listed = f"; listed in {where}" if where else ""
        say(f"{'warning: ' if loud else ''}{'; '.join(told)}{listed}")
    if passed_over:
        say(f"{passed_over} other files passed over ({_by_extension(of['extension'])})")
    if of["nothing"]:
        say(f"{len(of['nothing'])} samples given twice, used once")


def _scan_one(place: str, options: ReadOptions) -> ScanResults:
    remote = places.is_url(place)
    if not remote and os.path.isdir(place):
        inside = tables.tables_in(place)
        if inside:
            return tables.scan_folder(place, inside, options)
        return folders.scan(place, options.caption_keys)
    is_tar, is_table = suffix(place) == ".tar", tables.is_table(place)
    if is_tar or is_table:
        if not remote:
            try:
                places.refuse_special(os.stat(place).st_mode)
            except OSError as error:
                raise DataError(f"{place}: cannot be read: {places.reason(error)}") from None
        return tars.scan(place, options.caption_keys) if is_tar else tables.scan(place, options)
    if remote:
        return folders.scan(place, options.caption_keys)
    kinds = ", ".join(tables.SUFFIXES)
    hint = HINTS.get(suffix(place), f"give a folder, a .tar, or a table ({kinds})")
    if suffix(place) in PICTURE_SUFFIXES:
        hint = f"it is an image: give the folder that contains it, {os.path.dirname(place)}"
    raise DataError(f"{place}: not a source: {hint}")


def _printable(found: Record | Skip) -> Record | Skip:
    """Escape the parts of a name that are not UTF-8, so that it can be stored and shown."""
    try:
        found.uri.encode()
        return found
    except UnicodeEncodeError:
        names = (files.in_utf8(name) for name in (found.id, found.uri))
        id_, uri = (name.encode(errors="backslashreplace").decode() for name in names)
        return replace(found, id=id_, uri=uri)


def _reasons(skips: Sequence[Skip]) -> str:
    counts: Counter[str] = Counter()
    for s in skips:
        counts[s.reason.split(":")[0].split(" (")[0]] += s.count
    return ", ".join(f"{n} {reason}" for reason, n in counts.most_common(6))


def _by_extension(skips: Sequence[Skip]) -> str:
    counts: Counter[str] = Counter()
    for s in skips:
        counts[s.reason.rpartition(": ")[2]] += s.count
    return ", ".join(f"{n} {extension}" for extension, n in counts.most_common(10))


def nothing_usable(
    sources: Sequence[str],
    skips: Sequence[Skip],
    keys: Sequence[str],
    image_column: str | None = None,
    fields: Sequence[str] = (),
) -> DataError:
    """Create the error for sources without a usable sample.

    Args:
        sources: The sources as given.
        skips: The reasons why no sample is usable.
        keys: The keys that were searched for captions.
        image_column: The column that was searched for the images of tables.
        fields: The metadata fields of the samples.
    """
    where = ", ".join(sources)
    if len(skips) == 1 and skips[0].count == 1 and skips[0].affects != "extension":
        return DataError(f"{skips[0].uri}: {skips[0].reason}")
    others = [s for s in skips if s.affects == "extension"]
    samples = [s for s in skips if s.affects != "extension"]
    if not samples:
        among = f" among {_by_extension(others)}{_give(sources, others)}" if others else ""
        return DataError(f"{where}: no images found{among}")
    message = f"{where}: no usable sample: {_reasons(samples)}"
    unread = [s for s in samples if s.affects == "place"]
    if unread:
        message += f"; {unread[0].uri}: {unread[0].reason}"
    if any(s.reason == "no caption" for s in samples):
        options = ReadOptions(keys, image_column)
        message += f"; captions were {_looked_for(sources, options, fields, others)}"
    return DataError(message)


def _give(sources: Sequence[str], others: Sequence[Skip]) -> str:
    """Describe how to pass files found in a folder that are sources of their own."""
    for place in expand_sources(sources):
        ends = {suffix(s.uri) for s in others} & SOURCE_SUFFIXES
        for end in sorted(ends, key=lambda end: (end != ".tar", end)):
            if not places.is_url(place) and glob.glob(f"{glob.escape(place)}/*{end}"):
                return f": give '{place}/*{end}'"
    return ""


def _near(pattern: str) -> str:
    parent = Path(pattern).parent
    if places.is_url(pattern):
        return ""
    if not parent.is_dir():
        return f" ({parent} does not exist)"
    message = nearest(Path(pattern).name, [p.name for p in parent.iterdir()])
    return f": {message}" if message.startswith("did") else ""
