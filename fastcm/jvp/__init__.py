"""Derivatives along a direction: value, gradient and tangent in one pass."""

from fastcm.jvp.attention import attention as attention
from fastcm.jvp.attention import attention_dual as attention_dual
from fastcm.jvp.difference import finite_difference as finite_difference
from fastcm.jvp.mode import JVPMode as JVPMode
from fastcm.jvp.mode import jvp as jvp
from fastcm.jvp.rules import NotCovered as NotCovered
