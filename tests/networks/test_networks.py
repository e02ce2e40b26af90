"""The demo networks: shapes, float32 time, conditioning, compilation, rebuilding."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastcm import networks
from fastcm.networks import MLP, DiT, UNet
from fastcm.networks.embedding import Conditioning, sinusoid

Make = Callable[[int | None], nn.Module]

TINY: dict[str, tuple[Make, tuple[int, ...]]] = {
    "mlp": (lambda classes: MLP((1, 4, 4), width=16, depth=1, num_classes=classes), (1, 4, 4)),
    "unet": (
        lambda classes: UNet(
            2, base_channels=8, channel_mults=(1, 2), num_res_blocks=1, num_classes=classes
        ),
        (2, 8, 8),
    ),
    "dit": (
        lambda classes: DiT(2, (4, 8), width=16, depth=2, num_heads=2, num_classes=classes),
        (2, 4, 8),
    ),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than these networks compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=sorted(TINY))
def name(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    return str(request.param)


def perturbed(net: nn.Module) -> nn.Module:
    """No weight is zero, so every path through the network shows in its output."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def batch(shape: tuple[int, ...], size: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(size, *shape), torch.rand(size)


def test_output_is_zero_at_initialisation_and_has_the_shape_of_x(name: str) -> None:
    make, shape = TINY[name]
    x, t = batch(shape)
    f = make(None)(x, t)
    assert f.shape == x.shape
    assert torch.equal(f, torch.zeros_like(x))


def test_every_weight_that_trains_gets_a_gradient(name: str) -> None:
    make, shape = TINY[name]
    net = perturbed(make(4))
    x, t = batch(shape)
    net(x, t, torch.tensor([0, 1, 2])).square().mean().backward()
    missing = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_time_changes_the_output(name: str) -> None:
    make, shape = TINY[name]
    net = perturbed(make(None))
    x, t = batch(shape)
    assert not torch.allclose(net(x, t), net(x, t + 0.01), atol=1e-6)


def test_samples_do_not_see_each_other(name: str) -> None:
    make, shape = TINY[name]
    net = perturbed(make(4))
    x, t = batch(shape)
    labels = torch.tensor([2, 0, 1])
    torch.testing.assert_close(net(x, t, labels)[1:2], net(x[1:2], t[1:2], labels[1:2]))


def test_class_label_changes_the_output(name: str) -> None:
    make, shape = TINY[name]
    net = perturbed(make(4))
    x, t = batch(shape)
    labels = torch.tensor([0, 1, 2])
    change = (net(x, t, labels) - net(x, t, labels + 1)).flatten(1).abs().amax(1)
    assert (change > 1e-5).all()


def test_no_label_is_the_null_label(name: str) -> None:
    make, shape = TINY[name]
    net = perturbed(make(4))
    x, t = batch(shape)
    null = torch.full((3,), 4)
    torch.testing.assert_close(net(x, t), net(x, t, null))
    assert not torch.allclose(net(x, t), net(x, t, null - 1), atol=1e-5)


def test_label_for_an_unconditional_network_is_refused(name: str) -> None:
    make, shape = TINY[name]
    x, t = batch(shape)
    with pytest.raises(ValueError, match="network without classes"):
        make(None)(x, t, torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("labels", [torch.zeros(3), torch.zeros(2, dtype=torch.int64)])
def test_labels_of_another_dtype_or_length_are_refused(name: str, labels: Tensor) -> None:
    make, shape = TINY[name]
    with pytest.raises(ValueError, match=r"cond must be int64 labels of shape \(3,\)"):
        make(4)(*batch(shape), labels)


def test_wrong_shapes_are_refused_by_name(name: str) -> None:
    make, shape = TINY[name]
    net = make(None)
    x, t = batch(shape)
    with pytest.raises(ValueError, match=r"x must have shape \[B, .* got \[3, 5, 4, 4\]"):
        net(torch.zeros(3, 5, 4, 4), t)
    with pytest.raises(ValueError, match=r"x must have shape \[B, .* got \[3\]"):
        net(t, t)
    with pytest.raises(ValueError, match=r"t must have shape \[3\].* got \[2\]"):
        net(x, t[:2])


def test_network_compiles_into_one_graph(name: str) -> None:
    make, shape = TINY[name]
    net = perturbed(make(4))
    x, t = batch(shape)
    labels = torch.tensor([0, 1, 2])
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x, t, labels), net(x, t, labels))


def test_bfloat16_autocast_stays_close_to_float32(name: str) -> None:
    make, shape = TINY[name]
    net = perturbed(make(4))
    x, t = batch(shape)
    exact = net(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        for given in (x, x.bfloat16()):
            error = (net(given, t).float() - exact).norm() / exact.norm()
            assert error < 0.05


def test_network_cast_to_bfloat16_runs(name: str) -> None:
    make, shape = TINY[name]
    net = perturbed(make(4))
    x, t = batch(shape)
    exact = net(x, t)
    f = net.bfloat16()(x.bfloat16(), t)
    assert f.dtype == torch.bfloat16
    assert (f.float() - exact).norm() / exact.norm() < 0.1


def test_description_rebuilds_the_network(name: str) -> None:
    make, shape = TINY[name]
    net = perturbed(make(4))
    again = networks.build(json.loads(json.dumps(net.description)))
    again.load_state_dict(net.state_dict())
    x, t = batch(shape)
    assert torch.equal(again(x, t), net(x, t))
    assert again.description == net.description


def test_build_names_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"unknown network 'vit'.*\['dit', 'mlp', 'unet'\]"):
        networks.build({"name": "vit"})
    with pytest.raises(ValueError, match=r"unknown network None"):
        networks.build({"shape": [2]})
    with pytest.raises(ValueError, match=r"unknown keyword 'layers' for 'mlp', valid: \['shape'"):
        networks.build({"name": "mlp", "shape": [2], "layers": 3})
    with pytest.raises(ValueError, match=r"keyword 'shape' is required for 'mlp'"):
        networks.build({"name": "mlp", "width": 16})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MLP((2,), depth=0), "depth must be an int >= 1, got 0"),
        (lambda: MLP(()), "MLP needs a shape"),
        (lambda: MLP((2,), num_classes=0), "num_classes must be"),
        (lambda: MLP((2,), time_scale=0.0), "time_scale must be positive"),
        (lambda: UNet(3, base_channels=6), "multiple of 4"),
        (lambda: UNet(3, attention_levels=(3,)), r"attention_levels must be within 0\.\.2"),
        (lambda: UNet(3, num_heads=7), "num_heads must divide"),
        (lambda: DiT(3, 9), "patch must divide"),
        (lambda: DiT(3, 8, width=30, num_heads=6), "width must be a multiple"),
        (lambda: DiT(3, (8, 8, 8)), "size must be an int or"),
    ],
)
def test_impossible_architecture_is_refused(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_default_mlp_for_digits_has_1_4_million_parameters() -> None:
    count = sum(p.numel() for p in MLP((1, 8, 8)).parameters())
    assert 1.35e6 < count < 1.45e6


@pytest.mark.parametrize("size", [8, 32, 64])
def test_unet_runs_at_each_size(size: int) -> None:
    net = perturbed(UNet(1, base_channels=4, channel_mults=(1, 1, 2), num_res_blocks=1))
    x, t = batch((1, size, size), 1)
    f = net(x, t)
    assert f.shape == x.shape
    assert f.isfinite().all() and f.std() > 0


def test_unet_refuses_a_size_it_cannot_halve() -> None:
    net = UNet(1, base_channels=4, channel_mults=(1, 1, 1), num_res_blocks=1)
    with pytest.raises(ValueError, match="multiples of 4"):
        net(torch.zeros(1, 1, 8, 10), torch.zeros(1))


def test_unet_attends_where_it_is_told() -> None:
    def heads(levels: tuple[int, ...] | None) -> int:
        net = UNet(1, 8, (1, 1), num_res_blocks=1, attention_levels=levels)
        return sum(type(m).__name__ == "Attention" for m in net.modules())

    assert heads(()) == 1  # the middle
    assert heads(None) == heads((1,)) == 4  # one block down, two up
    assert heads((0, 1)) == 7


def test_dit_puts_each_patch_back_where_it_came_from() -> None:
    net = perturbed(DiT(1, (4, 6), width=8, depth=1, num_heads=1))
    net.input.weight.data.copy_(torch.eye(4).repeat(2, 1))  # carry the patch, and only the patch
    net.input.bias.data.zero_()
    net.position.zero_()
    net.blocks = nn.ModuleList()
    net.norm = nn.Identity()
    for p in (net.modulation.weight, net.modulation.bias, net.output.bias):
        p.data.zero_()
    net.output.weight.data.copy_(torch.eye(4).repeat(1, 2) / 2)
    x, t = batch((1, 4, 6))
    torch.testing.assert_close(net(x, t), x)


def test_dit_positions_are_distinct_and_not_saved() -> None:
    net = DiT(1, (4, 8), width=16, depth=1, num_heads=1)
    assert net.position.unique(dim=0).shape == (8, 16)
    assert "position" not in net.state_dict()


def test_sinusoid_has_the_published_frequencies() -> None:
    angle = 2.0 * 10000.0 ** (-torch.arange(4) / 4)
    expected = torch.cat((angle.cos(), angle.sin()))[None]
    torch.testing.assert_close(sinusoid(torch.tensor([0.002]), 8, 1000.0), expected)
    with pytest.raises(ValueError, match="even"):
        sinusoid(torch.tensor([0.1]), 7)


@pytest.mark.parametrize("cast", [torch.float32, torch.bfloat16])
def test_time_embedding_stays_float32_under_autocast(cast: torch.dtype) -> None:
    conditioning = Conditioning(8, None, 1000.0).to(cast)
    exact = Conditioning(8, None, 1000.0)
    exact.load_state_dict(conditioning.state_dict())
    t = torch.rand(5)
    with torch.autocast("cpu", torch.bfloat16):
        emb = conditioning(t)
    assert emb.dtype == torch.float32
    torch.testing.assert_close(emb, exact(t), rtol=0, atol=1e-6)


def test_time_embedding_separates_times_closer_than_bfloat16_resolves() -> None:
    torch.manual_seed(0)
    t = torch.tensor([0.700, 0.7005])
    assert t.bfloat16().unique().numel() == 1
    with torch.autocast("cpu", torch.bfloat16):
        emb = Conditioning(64, None, 1000.0)(t)
    assert (emb[0] - emb[1]).abs().max() > 1e-3


def test_time_scale_multiplies_the_time() -> None:
    t = torch.rand(4)
    scaled, plain = Conditioning(8, None, 250.0), Conditioning(8, None, 1.0)
    plain.load_state_dict(scaled.state_dict())
    torch.testing.assert_close(scaled(t), plain(250.0 * t))


def test_mlp_learns_two_points() -> None:
    torch.manual_seed(0)
    net = MLP((2,), width=32, depth=2, num_classes=2)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    points = torch.tensor([[1.0, -2.0], [-0.5, 0.5]])
    labels = torch.arange(2).repeat(32)
    for _ in range(150):
        loss = (net(torch.randn(64, 2), torch.rand(64), labels) - points[labels]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


UNORDERED = ("embedding_dense_backward", "upsample_nearest", "index_put", "index_add", "scatter")
"""Sums that a GPU, or compiled code on one, takes by atomics: in another order each time."""


@pytest.mark.parametrize("name", ["mlp", "unet", "dit"])
def test_the_backward_pass_adds_in_a_fixed_order(name: str) -> None:
    make, shape = TINY[name]
    net, called = make(4), []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    with Names():
        out = net(torch.randn(2, *shape), torch.rand(2), torch.tensor([0, 4]))
        out.square().sum().backward()
    assert not [op for op in called if any(bad in op for bad in UNORDERED)]


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_attention_reads_channels_side_by_side(name: str, monkeypatch) -> None:
    """Else a GPU takes the attention that stores the whole matrix."""
    strides, attention = [], nn.functional.scaled_dot_product_attention

    def seen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        strides.extend(t.stride(-1) for t in (q, k, v))
        return attention(q, k, v)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", seen)
    make, shape = TINY[name]
    make(None)(torch.randn(2, *shape), torch.rand(2))
    assert strides and set(strides) == {1}


@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_out_of_range_is_refused(label: int) -> None:
    with pytest.raises(ValueError, match=r"labels in \[0, 5\), got"):
        TINY["mlp"][0](4)(torch.randn(1, 1, 4, 4), torch.rand(1), torch.tensor([label]))
