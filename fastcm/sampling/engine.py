"""One batch of samples: noise, network and algorithm, launched or as CUDA graphs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, Literal, SupportsIndex, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fastcm import graphs, ops, rng
from fastcm.networks.conditions import Null, each
from fastcm.networks.modes import to_eval, to_training
from fastcm.networks.protocol import Network
from fastcm.parameterization import Parameterization
from fastcm.precision import Autocast, Precision, half_of
from fastcm.rng import NoiseKey
from fastcm.sampling import loops
from fastcm.sampling.few import FewSamples, moves_of
from fastcm.sampling.functions import SOLVERS, SolverName
from fastcm.sampling.graph_cache import CALLS_TO_DECIDE, GraphCache
from fastcm.sampling.guidance import Evaluator, Weight
from fastcm.sampling.held import few_of_cpu
from fastcm.sampling.levels import levels
from fastcm.sampling.loops import Method
from fastcm.sampling.steps import Churn, ode_steps

Graph = Literal["auto", "on", "off"]
Result = TypeVar("Result")

WHOLE = 8
"""Evaluations up to which a batch is one graph; of more, each evaluation is replayed."""


EVALUATIONS = {"heun": 2, "midpoint": 2, "rk4": 4}
"""Of each step of the ODE but the last, where it is not one."""


class Engine:
    """Computes one batch of samples at a time. See `Sampler` for the arguments."""

    def __init__(
        self,
        net: nn.Module,
        p: Parameterization,
        times: Sequence[float],
        *,
        method: Method,
        solver: SolverName,
        churn: Churn | None,
        null_condition: Null,
        guide: nn.Module | None,
        guidance_rescale: float | None,
        device: torch.device,
        precision: Precision,
        compile: bool,
        graph: Graph,
        log: Callable[[str], None],
    ) -> None:
        self._net = net
        self._levels = levels(p, times)
        self._steps = ode_steps(p, times, solver, churn) if method == "ode" else []
        self._method, self._solver = method, solver
        self._null = each(lambda v: v.to(device) if isinstance(v, Tensor) else v, null_condition)
        self._rescale = guidance_rescale
        self._device = device
        self._lock = graphs.device_lock(device)
        self.eager: Network = _precise(net, device, precision)
        self._network: Network = torch.compile(self.eager) if compile else self.eager
        self._guides = [] if guide is None else [guide]
        self.eager_guide = None if guide is None else _precise(guide, device, precision)
        self._guide: Network | None = self.eager_guide
        if compile and self.eager_guide is not None:
            self._guide = torch.compile(self.eager_guide)
        halves = {
            _half(network) for network in (self.eager, self.eager_guide) if network is not None
        }
        self._input_dtype = halves.pop() if len(halves) == 1 else None
        self._few: Callable[[tuple[int, ...]], FewSamples] | None = None
        moves = moves_of(method, self._levels, self._steps, solver)
        if moves is not None and device.type == "cpu":
            self._few = lru_cache(256)(partial(FewSamples, moves))
        self._cache: GraphCache | None = None
        possible = graphs.available(device)
        if graph == "on" and not possible:
            raise ValueError(f"graph='on' needs a GPU, the sampler is on {device}")
        if graph != "off" and possible:
            self._cache = GraphCache(
                device, moved=lambda: Addresses(net, *self._guides), must=graph == "on", log=log
            )
        self.launches = self._cache is None
        self.has_few_shapes = compile or not self.launches
        calls = EVALUATIONS.get(solver, 1) if method == "ode" else 1
        evaluations = calls * (len(times) - 1) + 1
        self._is_whole = evaluations <= WHOLE
        decide = CALLS_TO_DECIDE if self._cache is not None else 1
        self.calls_to_prepare = decide if self._is_whole else -(-decide // evaluations)

    def __call__(
        self,
        out: Tensor,
        shape: tuple[int, ...],
        seed: int,
        first_sample: int,
        cond: Any,
        weights: tuple[Weight, ...] | None,
    ) -> None:
        """Compute samples of `shape`, the first of which go to `out`; under no_grad.

        Args:
            out: ``[at most B, ...]``.
            shape: ``[B, ...]``.
            seed, first_sample: of the noise, in the range of a `NoiseKey`'s.
            cond: B rows, or None.
            weights: of the guidance, one per time, numbers or B rows, or None.
        """
        if self._cache is None:
            out.copy_(self.run(shape, seed, first_sample, cond, weights)[: len(out)])
            return
        key = host_key(seed, first_sample)
        with self._lock, self._cache.side():
            if self._is_whole:
                fixed, given = apart(weights)
                work = partial(self._run, self._network, self._guide, shape, fixed)
                x = self._cache((shape, fixed), work, key, cond, given)
            else:
                at = key.to(self._device, non_blocking=True)
                guide = None if self._guide is None else self._replayed_guide
                x = self._run(self._replayed, guide, shape, weights, at, cond)
            out.copy_(x[: len(out)])

    def run(
        self,
        shape: tuple[int, ...],
        seed: int,
        first_sample: int,
        cond: Any,
        weights: tuple[Weight, ...] | None,
    ) -> Tensor:
        """Samples of `shape`, launched one kernel after another; see `__call__`."""
        with self._lock:
            if self._few is not None and weights is None and few_of_cpu(shape[0]):
                x = self._in_eval(self._few(shape), self._network, seed, first_sample, cond)
                if x is not None:
                    return x
                self._few = None  # native code cannot read what this network returns
            key = host_key(seed, first_sample).to(self._device, non_blocking=True)
            return self._run(self._network, self._guide, shape, weights, key, cond)

    def _replayed(self, x: Tensor, t: Tensor, cond: Any, s: Tensor | None = None) -> Tensor:
        assert self._cache is not None
        F = self._cache("network", partial(_of_two_times, self._network), x, t, cond, s)
        return F.clone() if self._guides else F  # graphs share memory: the guide's is next

    def _replayed_guide(self, x: Tensor, t: Tensor, cond: Any, s: Tensor | None = None) -> Tensor:
        assert self._cache is not None and self._guide is not None
        return self._cache("guide", partial(_of_two_times, self._guide), x, t, cond, s)

    def _run(
        self,
        net: Network,
        guide: Network | None,
        shape: tuple[int, ...],
        weights: tuple[Weight | None, ...] | None,
        key_tensor: Tensor,
        cond: Any,
        given: Tensor | None = None,
    ) -> Tensor:
        """With weights, of which those that are None are the rows of `given`."""
        left = iter(() if given is None else given.unbind())
        whole = None if weights is None else [next(left) if w is None else w for w in weights]
        noise_key = NoiseKey.wrap(key_tensor)
        z = ops.noise(shape, noise_key, stream=rng.SAMPLE)
        return self._in_eval(self.solve, net, guide, z, noise_key, cond, whole)

    def _in_eval(self, work: Callable[..., Result], *arguments: Any) -> Result:
        in_training = to_eval(self._net)
        for module in self._guides:
            in_training += to_eval(module)
        try:
            return work(*arguments)
        finally:
            to_training(in_training)

    def solve(
        self,
        net: Network,
        guide: Network | None,
        z: Tensor,
        key: NoiseKey,
        cond: Any,
        weights: Sequence[Weight] | None,
    ) -> Tensor:
        """Samples from noise z, by `net` and `guide` in place of the networks."""
        guide, rescale = (None, None) if weights is None else (guide, self._rescale)
        evaluate = Evaluator(
            net,
            z,
            cond=cond,
            weights=weights,
            null_condition=self._null,
            guide=guide,
            input_dtype=self._input_dtype,
            rescale=rescale,
        )
        if self._method == "flow-map":
            return loops.flow_map(evaluate, z, self._levels)
        if self._method == "ode":
            solver = SOLVERS[self._solver]
            return loops.ode(evaluate, z, key, self._steps, self._levels[0], solver)
        return loops.multistep(evaluate, z, key, self._levels)


def _precise(net: nn.Module, device: torch.device, precision: Precision) -> Network:
    """The network in the precision that was asked for, or in that of its weights."""
    half = torch.bfloat16 if precision == "bf16" else half_of(net)
    return net if half is None else Autocast(net, device.type, half)


def _half(net: Network) -> torch.dtype | None:
    return net.dtype if isinstance(net, Autocast) else None


def _of_two_times(net: Network, x: Tensor, t: Tensor, cond: Any, s: Tensor | None) -> Tensor:
    return net(x, t, cond) if s is None else net(x, t, cond, s=s)


def apart(
    weights: tuple[Weight, ...] | None,
) -> tuple[tuple[float | None, ...] | None, Tensor | None]:
    """The weights that are numbers, None for the others, and these as ``[K, B]``."""
    if weights is None:
        return None, None
    given = [w for w in weights if isinstance(w, Tensor)]
    fixed = tuple(None if isinstance(w, Tensor) else w for w in weights)
    return fixed, torch.stack(given) if given else None


class Addresses:
    """Called, says whether parameters or buffers lie elsewhere than at the last call."""

    def __init__(self, *nets: nn.Module) -> None:
        modules = [module for net in nets for module in net.modules()]
        # the dictionaries, not what is in them: a parameter may be replaced
        self._held = [d for m in modules for d in (m._parameters, m._buffers) if d]
        self._last: list[int] = []

    def __call__(self) -> bool:
        now = [q.data_ptr() for held in self._held for q in held.values() if q is not None]
        moved, self._last = now != self._last, now
        return moved


def batches(n: int, largest: int, *, few_shapes: bool) -> Iterator[tuple[int, int, int]]:
    """Cut n samples into batches: (first, end, size), where size >= end - first is computed.

    Args:
        largest: size of all but the last ones.
        few_shapes: sizes are `largest` or powers of two. Up to 32 the rest is padded to the next
            one; above, where more than a quarter would be padding, it is cut in two.
    """
    at = 0
    while at < n:
        count = size = min(n - at, largest)
        if few_shapes and count < largest:
            size = min(1 << (count - 1).bit_length(), largest)
            if size > 32 and size > 1.25 * count:
                count = size = 1 << (count.bit_length() - 1)
        yield at, at + count, size
        at += count


def is_one_batch(n: int, largest: int, *, few_shapes: bool) -> bool:
    """Whether `batches` makes one of n samples, without padding."""
    return 0 < n <= largest and (not few_shapes or n == largest or n & (n - 1) == 0)


def full_shape(n: int | Sequence[int], shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape of n samples, or the whole one that was given."""
    if not isinstance(n, int) and isinstance(n, SupportsIndex):
        n = operator.index(n)
    if not isinstance(n, int):
        if not isinstance(n, Sequence):
            raise TypeError(f"n must be an int or a shape (n, ...), got {n!r}")
        whole = tuple(n)
        if len(whole) < 2 or min(whole) < 0:
            raise ValueError(f"shape must be [n, ...] of rank >= 2, got {whole}")
        return whole
    if n < 0:
        raise ValueError(f"n must be >= 0, got {n}")
    if shape is None:
        raise ValueError("give Sampler(shape=...) or call it with the whole shape (n, ...)")
    return (n, *shape)


def host_key(seed: int, first_sample: int) -> Tensor:
    """The tensor of a `NoiseKey` on the host, of numbers that are valid."""
    return torch.from_numpy(np.array((seed, 0, first_sample), np.int64))  # torch.tensor takes 2 us


def of_samples(weights: tuple[Weight, ...], start: int, end: int, size: int) -> tuple[Weight, ...]:
    """The weights of samples start .. end - 1, the last one repeated up to `size` of them."""
    return tuple(padded(w[start:end], size) if isinstance(w, Tensor) else w for w in weights)


def padded(rows: Any, size: int) -> Any:
    """A tensor or condition with the last of its rows repeated up to `size` of them."""
    return each(lambda x: _padded(x, size - len(x)), rows)


def _padded(rows: Tensor, missing: int) -> Tensor:
    return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows
