"""What a step will take, before it is taken: FLOPs, bytes, time and memory, without a device.

`step` plans one. `counting` runs an objective on the meta device (`meta`), where `ledger`
enters what operators compute, move and keep; `formulae` are the bytes of everything else;
`ceilings` are given or measured; `sizes` are networks by name, `render` a plan as text. `memory`
asks whether a step fits into memory.
"""

from fastcm.planning.ceilings import Ceilings as Ceilings
from fastcm.planning.ceilings import measure as measure
from fastcm.planning.counting import Counts as Counts
from fastcm.planning.counting import count as count
from fastcm.planning.memory import shortage as shortage
from fastcm.planning.render import markdown as markdown
from fastcm.planning.step import Plan as Plan
from fastcm.planning.step import plan as plan
