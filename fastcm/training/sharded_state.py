"""What one of several processes saves of a sharded training, and what it takes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastcm.runs.shards import Part, Place, Select
from fastcm.sharding import dtensors

Groups = Mapping[str, Mapping[str, Tensor]]
Mine = tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Place]]]


def divided(groups: Groups, *, first: bool) -> Mine:
    """What this process writes of a checkpoint's tensors, and where it lies; see `joint.save`.

    Of a DTensor its shard, unless that is another process's replica. What all hold alike the first
    process writes; a group without any DTensor is not divided, and has no places.
    """
    mine: dict[str, dict[str, Tensor]] = {}
    places: dict[str, dict[str, Place]] = {}
    for group, tensors in groups.items():
        if not any(map(dtensors.is_dtensor, tensors.values())):
            mine[group] = dict(tensors)
            continue
        mine[group], places[group] = {}, {}
        for name, tensor in tensors.items():
            start, shard = 0, tensor.detach()
            if dtensors.is_dtensor(tensor):
                start, shard = dtensors.first_element(tensor), dtensors.local(tensor)
                writes = dtensors.is_first_replica(tensor) and shard.numel() > 0
            else:
                writes = first
            if writes or (first and tensor.numel() == 0):
                mine[group][name] = shard
                places[group][name] = Place(start, tuple(tensor.shape))
    return mine, places


def wanted(groups: Groups, parameters: Sequence[Tensor]) -> Select:
    """What this process needs of a checkpoint: its shard, as a DTensor, of what is sharded here.

    Args:
        groups: the live tensors by group and name.
        parameters: of the optimizer, in its order: state of their shape is sharded like them.
    """

    def select(group: str, name: str, shape: torch.Size) -> Part | None:
        like = groups.get(group, {}).get(name)
        if group == "optimizer":
            number = name.partition(".")[0]
            if number.isdecimal() and int(number) < len(parameters):
                like = parameters[int(number)]
        if like is None or not dtensors.is_dtensor(like) or like.shape != shape:
            return None
        shard, start, model = dtensors.local(like), dtensors.first_element(like), like
        return Part(
            start,
            start + shard.numel(),
            lambda flat: dtensors.like(model, flat.view(shard.shape).to(shard.device)),
        )

    return select
