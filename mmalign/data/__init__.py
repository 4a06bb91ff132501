"""Turn sources into decoded, augmented, batched pairs; every skipped sample has a reason.

samples.py   what a sample is before it is decoded
catalog.py   `scan`: sources in, records and skips out
spilled.py   samples on disk while a source is scanned
places.py    local paths and URLs: opened and listed in the same way
kinds.py     which files are images, by extension and by content
gone.py      whether something no longer exists
folders.py   images in a folder
tars.py      WebDataset tars, local or remote
sidecars.py  files beside an image that describe it
tables.py    tables with a column of images or their paths
columns.py   which columns hold the image, captions and id
delimited.py, json_rows.py, arrow_tables.py    rows of a format
row_images.py    images inside tables, each group of rows read once
decode.py    bytes -> RGB pixels of a wanted size, with limits
budget.py    one memory budget for all threads that decode
colours.py   colour profiles
exif.py      what a camera writes into an image
raw.py       the preview in a camera's raw file
device.py    JPEGs decoded and resized on a GPU
pixels.py    decoded images by row: a memory-mapped cache, or decoded on request
augment.py   random crops, flips and colours of a whole batch at once
batches.py   which rows make the next batch; prefetching in threads
"""

from mmalign.data.augment import Augment as Augment
from mmalign.data.augment import Augmentation as Augmentation
from mmalign.data.batches import Draw as Draw
from mmalign.data.batches import Sampler as Sampler
from mmalign.data.batches import in_batches as in_batches
from mmalign.data.batches import in_threads as in_threads
from mmalign.data.batches import read_ahead as read_ahead
from mmalign.data.catalog import Catalog as Catalog
from mmalign.data.catalog import Sources as Sources
from mmalign.data.catalog import as_sources as as_sources
from mmalign.data.catalog import count_found as count_found
from mmalign.data.catalog import count_skipped as count_skipped
from mmalign.data.catalog import expand_sources as expand_sources
from mmalign.data.catalog import nothing_usable as nothing_usable
from mmalign.data.catalog import read_image as read_image
from mmalign.data.catalog import refuse_own_sources as refuse_own_sources
from mmalign.data.catalog import report_skips as report_skips
from mmalign.data.catalog import scan as scan
from mmalign.data.catalog import stream as stream
from mmalign.data.decode import MAX_PIXELS as MAX_PIXELS
from mmalign.data.decode import THUMBNAIL_SIDE as THUMBNAIL_SIDE
from mmalign.data.decode import decoded as decoded
from mmalign.data.decode import fit_image as fit_image
from mmalign.data.decode import image_meta as image_meta
from mmalign.data.decode import image_of as image_of
from mmalign.data.decode import open_image as open_image
from mmalign.data.decode import thumbnail as thumbnail
from mmalign.data.device import decode_on as decode_on
from mmalign.data.device import suits_device as suits_device
from mmalign.data.folders import fingerprint as fingerprint
from mmalign.data.gone import is_gone as is_gone
from mmalign.data.kinds import is_image_content as is_image_content
from mmalign.data.kinds import is_taken_suffix as is_taken_suffix
from mmalign.data.pixels import Pixels as Pixels
from mmalign.data.pixels import decode_all as decode_all
from mmalign.data.pixels import decode_stream as decode_stream
from mmalign.data.pixels import read_and_decode as read_and_decode
from mmalign.data.places import canonical_place as canonical_place
from mmalign.data.samples import Record as Record
from mmalign.data.samples import SampleProblem as SampleProblem
from mmalign.data.samples import Skip as Skip
from mmalign.data.samples import Stamps as Stamps
from mmalign.data.spilled import SpilledRecords as SpilledRecords
from mmalign.data.spilled import fallback_id as fallback_id
from mmalign.data.spilled import is_derived_id as is_derived_id

__all__ = [
    "MAX_PIXELS",
    "THUMBNAIL_SIDE",
    "Augment",
    "Catalog",
    "Draw",
    "Pixels",
    "Record",
    "SampleProblem",
    "Sampler",
    "Skip",
    "SpilledRecords",
    "Stamps",
    "canonical_place",
    "count_found",
    "count_skipped",
    "decode_all",
    "decode_on",
    "decode_stream",
    "decoded",
    "expand_sources",
    "fallback_id",
    "fingerprint",
    "fit_image",
    "image_meta",
    "in_threads",
    "is_derived_id",
    "is_gone",
    "is_image_content",
    "is_taken_suffix",
    "nothing_usable",
    "open_image",
    "read_ahead",
    "read_and_decode",
    "read_image",
    "refuse_own_sources",
    "report_skips",
    "scan",
    "stream",
    "suits_device",
    "thumbnail",
]
