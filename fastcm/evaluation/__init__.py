"""How good samples are, and how they look: `metrics`, `plots`, `pictures`.

In features of networks that others trained: `inception`, `dinov2`, `images`, `reference`.

Imports everything below the command line. Plots and pictures need the packages of the demo, which
are imported when something is drawn.
"""

from fastcm.evaluation.dinov2 import DINOv2 as DINOv2
from fastcm.evaluation.gaussians import Estimate as Estimate
from fastcm.evaluation.gaussians import Gaussian as Gaussian
from fastcm.evaluation.images import FeatureNetwork as FeatureNetwork
from fastcm.evaluation.images import image_features as image_features
from fastcm.evaluation.inception import Inception as Inception
from fastcm.evaluation.manifolds import precision_recall as precision_recall
from fastcm.evaluation.metrics import ConsistencyGap as ConsistencyGap
from fastcm.evaluation.metrics import consistency_gap as consistency_gap
from fastcm.evaluation.metrics import frechet as frechet
from fastcm.evaluation.metrics import sliced_wasserstein as sliced_wasserstein
from fastcm.evaluation.reference import Comparison as Comparison
from fastcm.evaluation.reference import Reference as Reference
from fastcm.evaluation.reference import compare as compare
