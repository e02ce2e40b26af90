"""From data to weights: the step, and the loop around it.

`trainer` is the loop. `step` draws a batch, `gradients` evaluates the objective, `update` applies
the result, and all of it may be one CUDA graph. `settings` is what a run was asked to do, `state`
what changes from step to step, and these two are all that the rest knows: `checkpoint` and
`configuration` turn them into what is saved, `saving` and `writer` save beside the training,
`logging` and `finite` read numbers late, `reports` tells them, `interrupt` turns a signal into an
orderly end, `profiler` watches some steps and `shares` makes a table of the trace. `parallel` makes
several processes one: with `mean_gradients`, or with `sharded`, `sharded_update` and
`sharded_state` where each holds a part of the weights. `blocks` are what a network repeats. Imports
everything below, but neither sampling nor evaluation.
"""

from fastcm.training.finite import NonFiniteError as NonFiniteError
from fastcm.training.gradients import Gradients as Gradients
from fastcm.training.lr import constant as constant
from fastcm.training.lr import warmup_cosine as warmup_cosine
from fastcm.training.profiler import Profiler as Profiler
from fastcm.training.shares import Shares as Shares
from fastcm.training.shares import shares as shares
from fastcm.training.trainer import Trainer as Trainer
