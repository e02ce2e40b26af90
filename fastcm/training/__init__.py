"""The training step and the loop around it."""

from fastcm.training.finite import NonFiniteError as NonFiniteError
from fastcm.training.gradients import Gradients as Gradients
from fastcm.training.lr import constant as constant
from fastcm.training.lr import warmup_cosine as warmup_cosine
from fastcm.training.trainer import Trainer as Trainer
