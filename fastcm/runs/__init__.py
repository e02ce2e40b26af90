"""What a training leaves on the disk: `files` and `checkpoint` write it, complete or not at all.

`description` says what a run was, so that another can be compared with it; `posthoc` makes
averages of the weights afterwards. Imports the maths.
"""

from fastcm.runs import posthoc as posthoc
from fastcm.runs.files import CheckpointError as CheckpointError
