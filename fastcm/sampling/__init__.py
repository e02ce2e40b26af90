"""From noise to samples: as functions of tensors, and as `Sampler`, which batches and captures.

`functions` are the algorithms, checked and then run by `loops`; `levels` and `steps` hold what is
known of the times before the first evaluation, `solvers` the formulas of the ODE, `guidance` the
evaluation of the network; `search` finds times; `sampler` cuts a request into batches, `engine`
computes one of them. `editing` and `export` build on these. Imports the maths, `ops`, `networks`,
`runs`, and what it shares with training: `graphs`, `precision`, `progress`.
"""

from fastcm.networks.conditions import append_weight as append_weight
from fastcm.networks.conditions import split_weight as split_weight
from fastcm.sampling import editing as editing
from fastcm.sampling.export import export_sampler as export_sampler
from fastcm.sampling.functions import SOLVERS as SOLVERS
from fastcm.sampling.functions import Constraint as Constraint
from fastcm.sampling.functions import SolverName as SolverName
from fastcm.sampling.functions import flow_map as flow_map
from fastcm.sampling.functions import multistep as multistep
from fastcm.sampling.functions import ode as ode
from fastcm.sampling.functions import one_step as one_step
from fastcm.sampling.guidance import Guidance as Guidance
from fastcm.sampling.guidance import predict as predict
from fastcm.sampling.sampler import Sampler as Sampler
from fastcm.sampling.search import search_times as search_times
from fastcm.sampling.steps import Churn as Churn
