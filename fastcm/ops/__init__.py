"""The arithmetic around the network: noise, boundary map, Euler step, sampler update, loss.

`functions`, `loss` and `normals` are the public operators, which validate and then take one way:
a kernel, native code or the plain `reference`, as `dispatch` says. Imports the maths (`rng`,
`losses`) and the kernels, nothing else.
"""

from fastcm.ops.functions import boundary as boundary
from fastcm.ops.functions import euler_step as euler_step
from fastcm.ops.functions import sampler_update as sampler_update
from fastcm.ops.loss import consistency_loss as consistency_loss
from fastcm.ops.normals import integers as integers
from fastcm.ops.normals import noise as noise
from fastcm.ops.normals import noising as noising
from fastcm.ops.normals import uniform as uniform
from fastcm.ops.reference import Denoised as Denoised
from fastcm.ops.reference import Noised as Noised
