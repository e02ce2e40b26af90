"""The sampler object: a network, its path and times, called with a number and a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, SupportsIndex, get_args

import torch
from torch import Tensor, nn

from fastcm.networks.conditions import Null, check_rows, each, rows_of
from fastcm.networks.guidance import check_rescale
from fastcm.networks.protocol import check_signature
from fastcm.parameterization import Parameterization, check_velocity
from fastcm.paths import Path
from fastcm.precision import Precision, check_not_double, check_precision
from fastcm.progress import Progress
from fastcm.rng import check_key
from fastcm.runs.description import parameterization_from
from fastcm.sampling.engine import (
    Engine,
    Graph,
    batches,
    full_shape,
    is_one_batch,
    of_samples,
    padded,
)
from fastcm.sampling.functions import (
    SOLVERS,
    SolverName,
    as_parameterization,
    check_descending,
)
from fastcm.sampling.guidance import Guidance, Weight, check_labels, guidance_weights
from fastcm.sampling.loading import network_of_run
from fastcm.sampling.loops import Method
from fastcm.sampling.steps import Churn
from fastcm.schedules import Grid, UniformGrid, sampling_times

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Sampler:
    """Draws samples from a trained network.

    On a GPU the whole loop is one CUDA graph (beyond 8 evaluations: each evaluation is one), kept
    where it is faster than launching kernel by kernel. Weights may change in place at any time, as
    those of an average in training do. Threads may share a sampler; they take turns.

    Args:
        net: ``net(x, t, cond) -> F``; evaluated in eval mode, without gradient.
        path: the path, or path and prediction type.
        steps: number of network evaluations of the multi-step sampler, or of Euler steps.
        times: the descending evaluation times, instead of steps.
        method: "multistep" (one step with steps=1), "ode", or "flow-map" for a network of two
            times.
        solver: of the ODE: "euler" (the default), "heun", "midpoint", "rk4", "ddim" or "dpmpp_2m";
            see `fastcm.sampling.ode`.
        churn: fresh noise before the steps of the ODE; see `fastcm.sampling.Churn`.
        grid: where the times of `steps` lie.
        shape: of one sample; needed to call the sampler with a number.
        null_condition: what stands for "no condition" under guidance.
        guide: under guidance, the network that stands in for the unconditional one (autoguidance):
            of the same path and prediction, with the same `cond`; see
            `fastcm.sampling.guidance.Evaluator`.
        guidance_rescale: share in [0, 1] in which a guided output gets back the standard deviation
            of the conditional one, over each sample; see `fastcm.networks.guidance.guided`.
        batch_size: samples that are computed at once, at most.
        precision: "fp32", or "bf16": the network sees bfloat16, under autocast; the arithmetic
            around it stays float32. One with weights in half precision sees that in any case.
        compile: run the network under torch.compile.
        graph: "auto", "on" (even if slower; an error where there can be none) or "off".
        device: default that of the network's parameters or buffers.
        log: receives a line about each graph.

    With graphs or compile, batches are padded to 1, 2, 4, 8, ... samples, so that few shapes occur;
    a sample does not depend on what it is padded with.

    Raises:
        TypeError: path is none, steps or batch_size is no int, a network is not callable as above.
        ValueError: steps < 1, times not descending or outside the path, an unknown method, solver,
            precision or graph, guidance_rescale not in [0, 1], graph="on" without a GPU.
    """

    def __init__(
        self,
        net: nn.Module,
        path: Path | Parameterization,
        *,
        steps: int | None = None,
        times: Sequence[float] | None = None,
        method: Method = "multistep",
        solver: SolverName | None = None,
        churn: Churn | None = None,
        grid: Grid = UniformGrid(),
        shape: Sequence[int] | None = None,
        null_condition: Null = None,
        guide: nn.Module | None = None,
        guidance_rescale: float | None = None,
        batch_size: int = 512,
        precision: Precision = "fp32",
        compile: bool = False,
        graph: Graph = "auto",
        device: torch.device | str | None = None,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        if steps is not None and times is not None:
            raise ValueError("give steps or times, not both")
        for name, value, known in (
            ("method", method, get_args(Method)),
            ("solver", solver or "euler", SOLVERS),
            ("graph", graph, ("auto", "on", "off")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if method != "ode":
            for name, given in (("solver", solver), ("churn", churn)):
                if given is not None:
                    raise ValueError(f"{name} has a meaning only with method='ode', got {method!r}")
        check_precision(precision)
        check_rescale(guidance_rescale)
        for name, number in (("steps", steps), ("batch_size", batch_size)):
            if number is not None and not isinstance(number, SupportsIndex):
                raise TypeError(f"{name} must be an int, got {number!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        for name, module in (("net", net), ("guide", guide)):
            if module is not None:
                check_signature(name, module, two_times=method == "flow-map")
                check_not_double(name, module)
        self.parameterization = as_parameterization(path)
        if method == "flow-map":
            check_velocity(self.parameterization)
        self.times = (
            sampling_times(grid, 1 if steps is None else steps, self.parameterization.path)
            if times is None
            else [float(t) for t in times]
        )
        check_descending(self.parameterization.path, self.times, fresh_noise=method == "multistep")
        if device is None:
            held = chain(net.parameters(), net.buffers())
            device = next((q.device for q in held), torch.device("cpu"))
        self.device = torch.empty(0, device=device).device  # with its index
        self.net = net.to(self.device)
        self.guide = None if guide is None else guide.to(self.device)
        self.method = method
        self.solver: SolverName = solver or "euler"
        self.churn = churn
        self.shape = None if shape is None else tuple(shape)
        self.null_condition = null_condition
        self.guidance_rescale = guidance_rescale
        self.batch_size = batch_size
        self.engine = Engine(
            self.net,
            self.parameterization,
            self.times,
            method=method,
            solver=self.solver,
            churn=churn,
            null_condition=null_condition,
            guide=self.guide,
            guidance_rescale=guidance_rescale,
            device=self.device,
            precision=precision,
            compile=compile,
            graph=graph,
            log=log,
        )

    @classmethod
    def from_run(
        cls,
        directory: str | FilePath,
        *,
        ema: int = 0,
        net: nn.Module | None = None,
        device: torch.device | str = "cpu",
        mesh: DeviceMesh | None = None,
        **options: object,
    ) -> Sampler:
        """The sampler of a run directory's last good checkpoint.

        Args:
            directory: written by `Trainer` or ``fastcm train``.
            ema: which average of the weights; -1 takes the raw weights.
            net: of the run's architecture, with what it leaves out, if not of `fastcm.networks`.
            device: where to sample.
            mesh: of processes over which the network is sharded (FSDP2), each of which reads what
                it holds. All call this together, and the sampler as often, with whatever numbers.
            **options: steps, times, method, ... of the constructor.

        Raises:
            FileNotFoundError, ValueError: no run there; no net where it is needed, or another's.
        """
        net, state = network_of_run(directory, ema=ema, net=net, device=device, mesh=mesh)
        options = {"shape": state["shape"], "null_condition": state["null_condition"], **options}
        if mesh is not None:
            options = {"graph": "off", **options}
        p = parameterization_from(state["parameterization"])
        return cls(net, p, device=device, **options)  # type: ignore[arg-type]

    def __call__(
        self,
        n: int | Sequence[int],
        *,
        seed: int = 0,
        first_sample: int = 0,
        cond: Any = None,
        guidance: Guidance | None = None,
    ) -> Tensor:
        """Draw samples.

        Args:
            n: how many, or the whole shape ``[n, ...]``.
            seed: 0 <= seed < 2**63.
            first_sample: index of the first; samples do not depend on how they are batched.
            cond: n rows of conditioning: a tensor, or containers of such, or None.
            guidance: weight of guidance, one per time, or a function w(t); a weight is a number,
                or a tensor ``[n]`` of one per sample (``[times, n]`` for all times).

        Returns:
            ``[n, ...]`` float32, in the scale of the data (images: -1..1, not clamped).

        Raises:
            ValueError, TypeError: n < 0, seed or first_sample out of range, unknown sample shape,
                cond of another length or with labels beyond the network's classes, guidance that
                does not fit, or without guide, cond or null_condition.
        """
        shape = self._checked(n, seed, first_sample, cond)
        tracked = torch.is_grad_enabled()
        # what torch.no_grad() does, without frames that a short call would notice
        torch._C._set_grad_enabled(False)
        try:
            return self._drawn(shape, seed, first_sample, cond, guidance)
        finally:
            torch._C._set_grad_enabled(tracked)

    def _drawn(
        self, shape: tuple[int, ...], seed: int, first_sample: int, cond: Any, guidance: Any
    ) -> Tensor:
        """Samples of a shape that can be asked for; without gradient."""
        n = shape[0]
        weights = None if guidance is None else self._weights(guidance, n)
        few_shapes = self.engine.has_few_shapes
        if self.engine.launches and is_one_batch(n, self.batch_size, few_shapes=few_shapes):
            rows = None if cond is None else self._here(cond)
            return self.engine.run(shape, seed, first_sample, rows, weights)
        out = torch.empty(shape, dtype=torch.float32, device=self.device)
        for start, end, size in batches(n, self.batch_size, few_shapes=few_shapes):
            rows = rows_of(cond, slice(start, end))
            rows = None if rows is None else padded(self._here(rows), size)
            some = None if weights is None else of_samples(weights, start, end, size)
            index, whole = first_sample + start, (size, *shape[1:])
            self.engine(out[start:end], whole, seed, index, rows, some)
        return out

    def stream(
        self,
        total: int,
        *,
        batch: int | None = None,
        seed: int = 0,
        first_sample: int = 0,
        cond: Any = None,
        guidance: Guidance | None = None,
        progress: bool = True,
    ) -> Iterator[Tensor]:
        """Draw many samples, a batch at a time.

        Args:
            total: how many.
            batch: samples in each of the tensors but the last; default `batch_size`.
            seed, first_sample, guidance: see `__call__`.
            cond: `total` rows, or a function of (index, count) that returns the rows of samples
                index .. index + count - 1, counted as `first_sample` is.
            progress: show a bar where there is a terminal.

        Returns:
            An iterator over tensors ``[batch, ...]`` float32.

        Raises:
            ValueError, TypeError: see `__call__`; batch < 1.
        """
        batch = self.batch_size if batch is None else batch
        if batch < 1:
            raise ValueError(f"batch must be >= 1, got {batch}")
        self._checked(total, seed, first_sample, None if callable(cond) else cond)
        weights = None if guidance is None else self._weights(guidance, total)

        def draw() -> Iterator[Tensor]:
            with Progress("sampling", total, show=progress) as bar:
                for at in range(0, total, batch):
                    count, index = min(batch, total - at), first_sample + at
                    some = slice(at, at + count)
                    rows = cond(index, count) if callable(cond) else rows_of(cond, some)
                    w = None if weights is None else of_samples(weights, at, at + count, count)
                    yield self(count, seed=seed, first_sample=index, cond=rows, guidance=w)
                    bar.advance(count)

        return draw()

    def prepare(
        self,
        *sizes: int,
        cond: Any = None,
        guidance: Guidance | None = None,
    ) -> Sampler:
        """Compile and capture for batches of these sizes now, the largest first.

        The graphs of smaller batches then live in the memory of the largest one's.

        Args:
            sizes: numbers of samples.
            cond: one row, as an example of the conditioning that will come.
            guidance: see `__call__`; a weight of one sample, ``[1]``, as an example.
        """
        weights = None if guidance is None else self._weights(guidance, 1)
        for size in sorted(set(sizes), reverse=True):
            rows = None if cond is None else padded(rows_of(cond, slice(1)), size)
            for _ in range(self.engine.calls_to_prepare):
                w = None if weights is None else of_samples(weights, 0, 1, size)
                self(size, cond=rows, guidance=w)
        return self

    def _weights(self, guidance: Guidance, n: int) -> tuple[Weight, ...]:
        like = torch.empty(n, 1, dtype=torch.float32, device=self.device)
        return guidance_weights(guidance, self.times, like)

    def _here(self, cond: Any) -> Any:
        """On the sampler's device; a copy to a GPU is not waited for."""
        return each(lambda x: x.to(self.device, non_blocking=self.device.type == "cuda"), cond)

    def _checked(
        self, n: int | Sequence[int], seed: int, first_sample: int, cond: Any
    ) -> tuple[int, ...]:
        """The shape of n samples, if they can be asked for."""
        shape = full_shape(n, self.shape)
        check_key(seed, first_sample=first_sample)
        if first_sample + shape[0] > 2**32:
            raise ValueError(f"first_sample + n must be <= 2**32, got {first_sample} + {shape[0]}")
        if cond is not None:
            check_rows(cond, shape[0])
            check_labels(cond, self.net)
        return shape
