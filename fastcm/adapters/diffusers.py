"""Models of the diffusers library: as networks, from its folders, and back into them.

diffusers is imported by `load` and `save` alone, when they are called.
"""

from fastcm.adapters.families import FAMILIES as FAMILIES
from fastcm.adapters.loading import DiffusersModel as DiffusersModel
from fastcm.adapters.loading import load as load
from fastcm.adapters.network import DiffusersNetwork as DiffusersNetwork
from fastcm.adapters.saving import Saved as Saved
from fastcm.adapters.saving import save as save
