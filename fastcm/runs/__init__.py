"""What a training leaves on the disk: `files` and `checkpoint` write it, complete or not at all.

`shards` are the files of tensors that several processes hold, `joint` has them write a checkpoint
together, and `consolidate` makes a plain one of it.

`description` says what a run was, so that another can be compared with it; `posthoc` makes
averages of the weights afterwards. Imports the maths.
"""

from fastcm.runs import posthoc as posthoc
from fastcm.runs.files import CheckpointError as CheckpointError
