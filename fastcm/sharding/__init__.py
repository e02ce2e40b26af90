"""Networks of which every process holds a part (FSDP2), and networks that have no values yet.

`dtensors` is what a shard is, `spread` makes shards of a network, and `materialise` gives a network
on the meta device its values, whole or shard by shard. Imports the networks and `runs`, whose files
values come from.
"""

from fastcm.sharding.materialise import Init as Init
from fastcm.sharding.materialise import is_hollow as is_hollow
from fastcm.sharding.materialise import materialise as materialise
from fastcm.sharding.spread import spread as spread
