"""Training methods, one file each."""

from fastcm.networks.protocol import Network as Network
from fastcm.objectives.base import Batch as Batch
from fastcm.objectives.base import Loss as Loss
from fastcm.objectives.base import Objective as Objective
from fastcm.objectives.consistency_distillation import (
    ConsistencyDistillation as ConsistencyDistillation,
)
from fastcm.objectives.consistency_flow_matching import (
    ConsistencyFlowMatching as ConsistencyFlowMatching,
)
from fastcm.objectives.consistency_training import ConsistencyTraining as ConsistencyTraining
from fastcm.objectives.continuous_consistency import (
    ContinuousConsistency as ContinuousConsistency,
)
from fastcm.objectives.easy_consistency import EasyConsistency as EasyConsistency
from fastcm.objectives.flow_matching import FlowMatching as FlowMatching
from fastcm.objectives.mean_flow import MeanFlow as MeanFlow
from fastcm.objectives.pair_distillation import PairDistillation as PairDistillation
from fastcm.objectives.shortcut import Shortcut as Shortcut
from fastcm.objectives.stepwise import Stepwise as Stepwise
