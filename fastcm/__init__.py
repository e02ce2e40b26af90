"""Training, distilling and sampling few-step generative models.

The wings, each of which imports only those before it: the maths (`rng`, `paths`,
`parameterization`, `schedules`, `losses`, `ema`), `ops`, `networks`, `objectives`, `runs`, `data`,
`optim`, `planning`, `sampling`, `training`, `evaluation`, `adapters`, `hub`, `cli`.
docs/architecture.md is a walk through them.
"""

import sys

from fastcm import evaluation as evaluation
from fastcm import jvp as jvp
from fastcm import losses as losses
from fastcm import networks as networks
from fastcm import ops as ops
from fastcm import rng as rng
from fastcm import sampling as sampling
from fastcm import schedules as schedules
from fastcm.data import Dataset as Dataset
from fastcm.ema import EMA as EMA
from fastcm.ema import CurriculumEMA as CurriculumEMA
from fastcm.ema import DelayedEMA as DelayedEMA
from fastcm.ema import HalfLifeEMA as HalfLifeEMA
from fastcm.ema import LastPhase as LastPhase
from fastcm.ema import PowerEMA as PowerEMA
from fastcm.ema import WarmupEMA as WarmupEMA
from fastcm.evaluation import pictures as pictures
from fastcm.hub import from_pretrained as from_pretrained
from fastcm.hub import push_to_hub as push_to_hub
from fastcm.hub import save_pretrained as save_pretrained
from fastcm.objectives import Batch as Batch
from fastcm.objectives import ConsistencyDistillation as ConsistencyDistillation
from fastcm.objectives import ConsistencyFlowMatching as ConsistencyFlowMatching
from fastcm.objectives import ConsistencyTraining as ConsistencyTraining
from fastcm.objectives import ContinuousConsistency as ContinuousConsistency
from fastcm.objectives import EasyConsistency as EasyConsistency
from fastcm.objectives import FlowMatching as FlowMatching
from fastcm.objectives import Loss as Loss
from fastcm.objectives import MeanFlow as MeanFlow
from fastcm.objectives import PairDistillation as PairDistillation
from fastcm.objectives import Shortcut as Shortcut
from fastcm.objectives import Stepwise as Stepwise
from fastcm.optim import AdamW as AdamW
from fastcm.optim import RAdam as RAdam
from fastcm.parameterization import Parameterization as Parameterization
from fastcm.parameterization import Rescaled as Rescaled
from fastcm.paths import Linear as Linear
from fastcm.paths import TrigFlow as TrigFlow
from fastcm.paths import VarianceExploding as VarianceExploding
from fastcm.paths import VariancePreserving as VariancePreserving
from fastcm.rng import NoiseKey as NoiseKey
from fastcm.runs import CheckpointError as CheckpointError
from fastcm.runs import posthoc as posthoc
from fastcm.sampling import Sampler as Sampler
from fastcm.sampling import editing as editing
from fastcm.sampling import export_sampler as export_sampler
from fastcm.training import NonFiniteError as NonFiniteError
from fastcm.training import Trainer as Trainer
from fastcm.training import warmup_cosine as warmup_cosine

__version__ = "0.1.0"

# Modules of wings that go by a short name, in import statements too.
for _module in (editing, pictures, posthoc):
    sys.modules[f"{__name__}.{_module.__name__.rpartition('.')[2]}"] = _module
