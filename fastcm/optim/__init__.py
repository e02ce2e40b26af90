"""Optimizers: clip, update, averages and low-precision copies in one sweep."""

from fastcm.optim.adam import AdamW as AdamW
from fastcm.optim.adam import RAdam as RAdam
