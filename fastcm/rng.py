"""Counter-based noise: a pure function of (seed, step, stream, sample, element).

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in plain torch
integer arithmetic, so that it runs, compiles and agrees word for word on every device. The
counter of one block of four elements of one sample is

    c0 = element // 4    c1 = global sample index    c2 = step low    c3 = stream << 24 | step high

which makes the noise independent of device, block size, batch split and world size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

NOISE = 0
TIME = 1
DATA = 2
CONDITION = 3
LEVEL = 4
SHARDS = 5
LATENT = 6
SAMPLE = 16
"""First of the sampler's streams: evaluation j draws from ``SAMPLE + j``."""

NUM_STREAMS = 256
MASK32 = 0xFFFFFFFF

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def check_key(seed: int, step: int = 0, first_sample: int = 0) -> None:
    """Raise TypeError or ValueError unless a `NoiseKey` can be made of these."""
    _check("seed", seed, 2**63)
    _check("step", step, 2**56)
    _check("first_sample", first_sample, 2**32)


def _check(name: str, value: int, end: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not 0 <= value < end:
        raise ValueError(f"{name} must be in [0, 2**{end.bit_length() - 1}), got {value}")


class NoiseKey:
    """Where in the random sequence a run stands: a device tensor of (seed, step, first sample).

    The numbers live on the device so that a captured or compiled step reads the current ones;
    ``advance_`` moves to the next step without touching the host.

    Args:
        seed: 0 <= seed < 2**63.
        step: 0 <= step < 2**56.
        first_sample: global index of the first sample of a batch, 0 <= first_sample < 2**32.
        device: where the key lives; default CPU.

    Raises:
        TypeError: an argument is not an int.
        ValueError: an argument is outside its range.
    """

    __slots__ = ("tensor",)

    def __init__(
        self,
        seed: int,
        step: int = 0,
        first_sample: int = 0,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        check_key(seed, step, first_sample)
        self.tensor = torch.tensor(
            [seed, step, first_sample], dtype=torch.int64, device=device or "cpu"
        )

    @classmethod
    def wrap(cls, tensor: Tensor) -> NoiseKey:
        """The key whose state is `tensor` (int64 ``[3]``: seed, step, first sample), not copied."""
        key = object.__new__(cls)
        key.tensor = tensor
        return key

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    @property
    def step(self) -> Tensor:
        """The step as a 0-d int64 tensor on the device: a view, it follows ``advance_``."""
        return self.tensor[1]

    def to(self, device: torch.device | str) -> NoiseKey:
        """This key on `device` (the same storage if it is there already)."""
        return NoiseKey.wrap(self.tensor.to(device))

    def advance_(self, steps: int = 1) -> NoiseKey:
        """Move to a later step in place, on the device."""
        self.tensor[1].add_(steps)
        return self

    def __repr__(self) -> str:
        seed, step, first = self.tensor.tolist()
        return f"NoiseKey(seed={seed}, step={step}, first_sample={first}, device={self.device})"


pytree.register_pytree_node(
    NoiseKey,
    lambda key: ([key.tensor], None),
    lambda children, _: NoiseKey.wrap(next(iter(children))),
    serialized_type_name="fastcm.NoiseKey",
    to_dumpable_context=lambda context: context,
    from_dumpable_context=lambda context: context,
)


def _multiply(c: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 x 32 bit product.

    A product beyond int64 is undefined behaviour in the C++ of compiled code, so c (m - 2^32) is
    formed, which fits, and c 2^32 is added to the high word afterwards.
    """
    product = c * (m - 2**32)
    return (product >> 32) + c, product & MASK32


def philox(counter: Sequence[Tensor], key: Sequence[Tensor], rounds: int = 10) -> list[Tensor]:
    """Philox4x32: four counter words and two key words to four random words.

    Words are uint32 held in int64 tensors that broadcast against each other.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    m0, m1 = _MULTIPLIERS
    for _ in range(rounds):
        (high0, low0), (high1, low1) = _multiply(c0, m0), _multiply(c2, m1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & MASK32, (k1 + _WEYL[1]) & MASK32
    return [c0, c1, c2, c3]


def blocks(
    samples: int, quads: int, state: Tensor, stream: int, first_sample: int = 0
) -> list[Tensor]:
    """The four Philox words of each block of four elements, ``[samples, quads]`` each."""
    device = state.device
    seed, step, first = state.unbind()
    # masked, so that the compiler does not take the products for index arithmetic, whose vectors
    # overflow (torch 2.13)
    c0 = torch.arange(quads, device=device)[None, :] & MASK32
    c1 = (torch.arange(samples, device=device)[:, None] + (first + first_sample)) & MASK32
    c2 = step & MASK32
    c3 = (step >> 32 & 0xFFFFFF) | (stream << 24)
    return philox((c0, c1, c2, c3), (seed & MASK32, seed >> 32 & MASK32))


def words(count: int, key: NoiseKey, *, stream: int, first_sample: int = 0) -> Tensor:
    """The four uint32 words of the first block of each sample, as int64 ``[count, 4]``."""
    return torch.cat(blocks(count, 1, key.tensor, stream, first_sample), dim=1)


def uniform(count: int, key: NoiseKey, *, stream: int, first_sample: int = 0) -> Tensor:
    """One number per sample in the open interval (0, 1), float64 ``[count]``."""
    word = words(count, key, stream=stream, first_sample=first_sample)[:, 0]
    return (word.double() + 0.5) * 2.0**-32


def integers(count: int, key: NoiseKey, *, stream: int, first_sample: int = 0) -> Tensor:
    """One number per sample in [0, 2^63), int64 ``[count]``: their order is a permutation."""
    word = words(count, key, stream=stream, first_sample=first_sample)
    return (word[:, 0] << 31) ^ word[:, 1]


def uniforms(
    samples: int, quads: int, state: Tensor, stream: int, first_sample: int = 0
) -> tuple[Tensor, Tensor]:
    """What the normals of each block of four elements are made of; see `to_unit`."""
    return to_unit(blocks(samples, quads, state, stream, first_sample))


def to_unit(quad: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Four words ``[B, Q]`` to float32 in (0, 1): for two radii and two angles, ``[B, Q, 2]``.

    The product is exact, and there is one rounding in the sum.
    """
    w0, w1, w2, w3 = (w.float() * 2.0**-32 + 2.0**-33 for w in quad)
    return torch.stack((w0, w2), dim=-1), torch.stack((w1, w3), dim=-1)


def normals(uniforms: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """Box-Muller: uniforms ``[B, Q, 2]`` for radii and angles to normals ``[B, 4 Q]``.

    The uniforms are float32 whatever `dtype` is, so float64 serves as the oracle of the same
    noise.
    """
    radius, angle = (u.to(dtype) for u in uniforms)
    r = (-2.0 * radius.log()).clamp_min(0.0).sqrt()
    a = 2.0 * math.pi * angle
    return torch.stack((r * a.cos(), r * a.sin()), dim=-1).flatten(1)
