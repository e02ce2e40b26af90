"""Where batches come from: `datasets` reads and checks, `loading` finds, `sources` draws rows.

Data beyond memory: `rows` of data sets that read one at a time, `shards` of files. docs/data.md
says what can be given. Imports the maths, `ops` for the noise of pairs, and `runs` for digests.
"""

from fastcm.data.batches import Batches as Batches
from fastcm.data.datasets import Dataset as Dataset
from fastcm.data.datasets import array_file as array_file
from fastcm.data.datasets import to_unit as to_unit
from fastcm.data.images import digits as digits
from fastcm.data.images import image_folder as image_folder
from fastcm.data.images import photographs as photographs
from fastcm.data.loading import load as load
from fastcm.data.loading import pairs as pairs
from fastcm.data.rows import Rows as Rows
from fastcm.data.shards import Shards as Shards
from fastcm.data.shards import shards as shards
from fastcm.data.sources import DeviceData as DeviceData
from fastcm.data.sources import Source as Source
from fastcm.data.sources import as_source as as_source
from fastcm.data.writing import write_shards as write_shards
