"""How good samples are, and how they look: `metrics`, `plots`, `pictures`.

Imports everything below the command line. Plots and pictures need the packages of the demo, and
are not imported here.
"""

from fastcm.evaluation.metrics import ConsistencyGap as ConsistencyGap
from fastcm.evaluation.metrics import consistency_gap as consistency_gap
from fastcm.evaluation.metrics import frechet as frechet
from fastcm.evaluation.metrics import sliced_wasserstein as sliced_wasserstein
