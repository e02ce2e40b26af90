"""Value, gradient and tangent in one pass: right, and no dearer than it says."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastcm import jvp, networks
from fastcm.jvp import rules

SHIPPED: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "mlp": lambda: (networks.MLP((2, 4, 4), width=64, depth=2, two_times=True), (2, 4, 4)),
    "dit": lambda: (
        networks.DiT(2, 8, patch=2, width=32, depth=2, num_heads=2, two_times=True),
        (2, 8, 8),
    ),
    "unet": lambda: (networks.UNet(2, 16, (1, 2), 1, num_heads=2, two_times=True), (2, 8, 8)),
}


def randomised(net: nn.Module) -> nn.Module:
    """Without the layers that start at zero, which would hide what goes through them."""
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.05)
    return net


class Case:
    """A network of two times, its arguments and a direction."""

    def __init__(self, name: str, batch: int = 6) -> None:
        net, shape = SHIPPED[name]()
        self.net = randomised(net)
        self.t = torch.rand(batch) * 0.5 + 0.5
        self.primals = (torch.randn(batch, *shape), self.t, 0.5 * self.t)
        self.tangents = (
            torch.randn(batch, *shape),
            torch.ones(batch),
            torch.zeros(batch),
        )

    def __call__(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        out: Tensor = self.net(x, t, None, s=s)
        return out


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


def exact_tangent(
    fn: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> Tensor:
    """By torch's forward AD."""
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        _, tangent = torch.func.jvp(fn, primals, tangents)[:2]
    out: Tensor = tangent
    return out


def check(fn: Callable[..., Tensor], *pairs: tuple[Tensor, Tensor], limit: float = 1e-5) -> None:
    """The tangent of `fn` is that of forward AD."""
    primals, tangents = zip(*pairs, strict=True)
    out, tangent = jvp.jvp(fn, primals, tangents)
    torch.testing.assert_close(out, fn(*primals), rtol=0, atol=0)
    assert relative(tangent, exact_tangent(fn, primals, tangents)) < limit


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(shape), torch.randn(shape)


W, B = torch.randn(5, 8), torch.randn(5)
OPERATORS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[Tensor, Tensor], ...]]] = {
    "linear": (lambda x: F.linear(x, W, B), (pair(3, 8),)),
    "linear of the weight": (lambda w: F.linear(torch.ones(3, 8), w), (pair(5, 8),)),
    "conv1d": (lambda x: F.conv1d(x, torch.ones(4, 2, 3), padding=1), (pair(3, 2, 7),)),
    "conv2d": (
        lambda x: F.conv2d(x, torch.ones(4, 2, 3, 3), torch.ones(4), 2, 1),
        (pair(3, 2, 6, 6),),
    ),
    "conv3d": (lambda x: F.conv3d(x, torch.ones(4, 2, 2, 2, 2)), (pair(3, 2, 4, 4, 4),)),
    "matmul": (torch.matmul, (pair(2, 3, 4), pair(2, 4, 5))),
    "matmul, left": (lambda x: x @ torch.ones(4, 5), (pair(2, 3, 4),)),
    "matmul, right": (lambda x: torch.ones(5, 3) @ x, (pair(2, 3, 4),)),
    "bmm": (torch.bmm, (pair(2, 3, 4), pair(2, 4, 5))),
    "layer_norm": (lambda x: F.layer_norm(x, (8,), W[0], W[1]), (pair(3, 8),)),
    "layer_norm of two": (lambda x: F.layer_norm(x, (4, 8), eps=1e-2), (pair(3, 4, 8),)),
    "rms_norm": (lambda x: F.rms_norm(x, (8,), W[0], 1e-3), (pair(3, 8),)),
    "rms_norm without eps": (lambda x: F.rms_norm(x, (8,)), (pair(3, 8),)),
    "group_norm": (lambda x: F.group_norm(x, 2, W[0, :4], W[1, :4]), (pair(3, 4, 5, 5),)),
    "attention": (F.scaled_dot_product_attention, (pair(2, 3, 7, 8),) * 3),
    "attention, causal": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3),
        (pair(2, 3, 7, 8),) * 3,
    ),
    "cross attention": (
        lambda q: F.scaled_dot_product_attention(q, W[None].expand(2, 5, 8), B[:, None] * W),
        (pair(2, 7, 8),),
    ),
    "views": (
        lambda x: torch.cat([y.sin() for y in x.unflatten(1, (2, 4)).chunk(2, 1)], 2).flatten(1),
        (pair(3, 8),),
    ),
    "in place": (lambda x: (x * 2.0).add_(x).mul_(x), (pair(3, 8),)),
    "pointwise": (lambda x, y: F.silu(x) * F.gelu(y, approximate="tanh"), (pair(3, 8), pair(3, 8))),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_tangents_of_operators_are_those_of_forward_ad(name: str) -> None:
    fn, pairs = OPERATORS[name]
    check(fn, *pairs)


def test_a_wrong_rule_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    fn, pairs = OPERATORS["linear"]

    def wrong(x: Tensor, *more: Any) -> Tensor:
        value, tangent = rules.unpack(x)
        assert tangent is not None
        return rules.dual(F.linear(value, *more), torch.zeros_like(F.linear(value, *more)))

    monkeypatch.setitem(rules.RULES, F.linear, wrong)
    with pytest.raises(AssertionError):
        check(fn, *pairs)


@pytest.mark.parametrize("name", SHIPPED)
def test_tangents_of_the_networks(name: str) -> None:
    case = Case(name)
    case.t.mul_(0.1)  # at a scale of 1,000 float32 times alone cost four digits
    out, tangent = jvp.jvp(case, case.primals, case.tangents)
    torch.testing.assert_close(out, case(*case.primals), rtol=0, atol=0)
    assert relative(tangent, exact_tangent(case, case.primals, case.tangents)) < 1e-5


@pytest.mark.parametrize("name", ["mlp", "dit"])
def test_tangents_in_bfloat16_with_time_in_float32(name: str) -> None:
    case = Case(name)

    def half(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return case(x, t, s)

    _, tangent = jvp.jvp(half, case.primals, case.tangents)
    assert relative(tangent, exact_tangent(case, case.primals, case.tangents)) < 0.02


def step(case: Case, out: Tensor) -> list[Tensor]:
    """The gradients of a loss of the value."""
    case.net.zero_grad()
    (out.sin() * torch.arange(out.numel()).reshape(out.shape)).mean().backward()
    return [p.grad.clone() for p in case.net.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", SHIPPED)
def test_gradients_are_those_of_a_plain_call_bit_for_bit(name: str) -> None:
    case = Case(name)
    plain = step(case, case(*case.primals))
    found = step(case, jvp.jvp(case, case.primals, case.tangents)[0])
    assert len(plain) == len(found) > 0
    for mine, theirs in zip(found, plain, strict=True):
        assert torch.equal(mine, theirs)


class Kept:
    """What the graph holds of a tensor."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


def saved_bytes(run: Callable[[], object]) -> int:
    """What is kept for the backward pass of a call's result; storages count once."""
    held: list[weakref.ref[Kept]] = []

    def pack(x: Tensor) -> Kept:
        kept = Kept(x)
        held.append(weakref.ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.x):
        out = run()
    gc.collect()
    alive = [kept.x.untyped_storage() for ref in held if (kept := ref()) is not None]
    del out
    return sum({storage.data_ptr(): storage.nbytes() for storage in alive}.values())


@pytest.mark.parametrize("name", ["mlp", "dit"])
def test_the_tangent_keeps_nothing_for_the_backward_pass(name: str) -> None:
    case = Case(name, batch=32)
    plain = saved_bytes(lambda: case(*case.primals))
    ours = saved_bytes(lambda: jvp.jvp(case, case.primals, case.tangents))
    assert 0 < ours <= 1.02 * plain


def test_a_step_costs_four_thirds_of_a_plain_one_in_products() -> None:
    case = Case("mlp")
    case.net = randomised(networks.MLP((2, 4, 4), width=256, depth=4, two_times=True))

    def flops(run: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter:
            step(case, run())
        total: int = counter.get_total_flops()
        return total

    plain = flops(lambda: case(*case.primals))
    ours = flops(lambda: jvp.jvp(case, case.primals, case.tangents)[0])
    assert 1.2 * plain < ours <= 4.1 / 3 * plain


@pytest.mark.parametrize("name", ["mlp", "dit"])
def test_the_same_in_compiled_code(name: str) -> None:
    """Four ways to a tangent agree: eager, in a dual level, compiled, in a compiled step."""
    case = Case(name)

    def loss(x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        out, tangent = jvp.jvp(case, (x, t, s), case.tangents)
        return (out - tangent.detach()).square().mean(), tangent

    def gradients(found: Tensor) -> list[Tensor]:
        case.net.zero_grad()
        found.backward()
        return [p.grad.clone() for p in case.net.parameters() if p.grad is not None]

    eager, tangent = loss(*case.primals)
    want = gradients(eager)
    with torch.no_grad():
        _, alone = torch.compile(loss, fullgraph=True)(*case.primals)
    assert relative(alone, tangent) < 1e-4
    compiled, again = torch.compile(loss, fullgraph=True)(*case.primals)
    assert relative(again, tangent) < 1e-4
    for mine, theirs in zip(gradients(compiled), want, strict=True):
        assert relative(mine, theirs) < 1e-4


def test_views_with_gaps_compile() -> None:
    x, tx = torch.randn(6, 3, 8)[:, 1], torch.randn(6, 8)
    t, tt = torch.rand(6, 2)[:, 0], torch.ones(6)

    def fn(x: Tensor, t: Tensor) -> Tensor:
        return F.linear(x.reshape(-1, 2, 4).flatten(1), W, B) * t[:, None]

    def both(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        out, tangent = jvp.jvp(fn, (x, t), (tx, tt))
        return out, tangent

    check(fn, (x, tx), (t, tt))
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(x, t)
    torch.testing.assert_close(compiled, both(x, t))


def test_our_attention_inside_of_other_peoples_derivatives() -> None:
    q, k, v, tq, tk, tv = (torch.randn(2, 3, 7, 8) for _ in range(6))
    exact = exact_tangent(F.scaled_dot_product_attention, (q, k, v), (tq, tk, tv))
    assert relative(torch.func.jvp(jvp.attention, (q, k, v), (tq, tk, tv))[1], exact) < 1e-5
    with forward_ad.dual_level():
        out = jvp.attention(*map(forward_ad.make_dual, (q, k, v), (tq, tk, tv)))
        assert relative(forward_ad.unpack_dual(out).tangent, exact) < 1e-5


def test_strict_raises_what_is_left_to_forward_ad() -> None:
    mask = torch.ones(7, 7, dtype=torch.bool).tril()

    def masked(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    check(masked, pair(2, 7, 8))
    q, tq = pair(2, 7, 8)
    with pytest.raises(jvp.NotCovered, match="mask"):
        jvp.jvp(masked, (q,), (tq,), strict=True)


def test_dropout_has_one_mask_for_value_and_tangent() -> None:
    x, ones = torch.ones(1000), torch.ones(1000)
    out, tangent = jvp.jvp(lambda x: F.dropout(x, 0.5), (x,), (ones,))
    assert torch.equal(out, tangent) and 0 < (out == 0).sum() < 1000


def test_structures_and_outputs_without_a_tangent() -> None:
    def fn(inputs: dict[str, Tensor], y: Tensor) -> dict[str, Tensor]:
        return {"sum": inputs["x"] + y, "constant": torch.ones(3)}

    x, y = torch.randn(3), torch.randn(3)
    out, tangent = jvp.jvp(fn, ({"x": x}, y), ({"x": y}, x))
    assert torch.equal(tangent["sum"], x + y) and not tangent["constant"].any()
    assert torch.equal(out["sum"], x + y)


def test_a_gradient_into_the_stopped_tangent_is_refused() -> None:
    case = Case("mlp")
    out, tangent = jvp.jvp(case, case.primals, case.tangents)
    with pytest.raises(RuntimeError, match="detach"):
        (out - tangent).square().mean().backward()
    out, tangent = jvp.jvp(case, case.primals, case.tangents, tangent_grad=True)
    tangent.square().mean().backward()


def test_named_errors() -> None:
    x = torch.randn(3, 8)
    compiled = torch.compile(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="compile the function that calls jvp"):
        jvp.jvp(compiled, (x,), (x,))
    with pytest.raises(ValueError, match="compile the function that calls jvp"):
        jvp.jvp(lambda x: compiled(x), (x,), (x,))
    with pytest.raises(ValueError, match="shape and floating dtype"):
        jvp.jvp(torch.sin, (x,), (x[:2],))
    with pytest.raises(ValueError, match="nested as primals"):
        jvp.jvp(torch.add, (x, x), (x,))
    with pytest.raises(TypeError, match="primals must be a tuple"):
        jvp.jvp(torch.sin, x, (x,))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be tensors"):
        jvp.jvp(torch.sin, (1.0,), (x,))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        jvp.jvp(torch.sin, (x,), (x,))
    with pytest.raises(ValueError, match=r"dropout_p=0\.1"):
        jvp.jvp(lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.1), (x,), (x,))


@pytest.mark.parametrize("scheme", ["central", "forward"])
def test_finite_differences_converge_with_their_order(scheme: Any) -> None:
    x, tx = (torch.randn(3, 8, dtype=torch.float64) for _ in range(2))
    exact = x.cos() * tx
    errors = []
    for h in (1e-2, 5e-3):
        out, tangent = jvp.finite_difference(torch.sin, (x,), (tx,), h, scheme)
        assert torch.equal(out, x.sin())
        errors.append(relative(tangent, exact))
    assert (
        abs(torch.tensor(errors[0] / errors[1]).log2().item() - (2 - (scheme == "forward"))) < 0.1
    )


def test_finite_differences_warn_of_half_precision() -> None:
    x = torch.randn(3, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="noise"):
        jvp.finite_difference(torch.sin, (x,), (x,), 1e-2)
    with pytest.raises(ValueError, match="h must be > 0"):
        jvp.finite_difference(torch.sin, (x,), (x,), 0.0)
    with pytest.raises(ValueError, match="scheme"):
        jvp.finite_difference(torch.sin, (x,), (x,), 0.1, "upwind")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["dit", "pixart", "pixart, masked", "sana"])
def test_networks_of_diffusers_need_no_change(name: str) -> None:
    """Attention with a mask is in parts, on a CPU and elsewhere: forward AD knows no fused one."""
    diffusers = pytest.importorskip("diffusers")
    common = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2}
    if name == "dit":
        net = diffusers.DiTTransformer2DModel(
            **common, sample_size=8, patch_size=2, num_embeds_ada_norm=10
        )
        more: dict[str, Any] = {"class_labels": torch.tensor([1, 2])}
    elif name == "sana":
        net = diffusers.SanaTransformer2DModel(
            **common, out_channels=4, sample_size=8, num_cross_attention_heads=2,
            cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12,
        )  # fmt: skip
        more = {"encoder_hidden_states": torch.randn(2, 5, 12)}
    else:
        net = diffusers.PixArtTransformer2DModel(
            **common, sample_size=8, patch_size=2, cross_attention_dim=16, caption_channels=12
        )
        more = {"encoder_hidden_states": torch.randn(2, 5, 12), "added_cond_kwargs": {}}
    if name in ("pixart, masked", "sana"):
        more["encoder_attention_mask"] = (torch.arange(5) < 3).float().repeat(2, 1)
    randomised(net).eval()
    x, tx = pair(2, 4, 8, 8)
    t, tt = torch.rand(2), torch.ones(2)

    def fn(x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = net(x, timestep=t, **more).sample
        return out

    _, tangent = jvp.jvp(fn, (x, t), (tx, tt))
    assert relative(tangent, exact_tangent(fn, (x, t), (tx, tt))) < 1e-5
