"""Noise in the kernels: the words and normals of `fastcm.rng`, however the work is divided."""

from __future__ import annotations

import pytest
import tolerances
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcm import rng
from fastcm.kernels import launch
from fastcm.kernels.launch import LaunchConfig, locate
from fastcm.kernels.noising import launch_noising
from fastcm.kernels.philox import box_muller, load_counter, normals, philox
from fastcm.ops import reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
DTYPES = [torch.uint8, *FLOATS]
KEYS = [(0, 0, 0), (2**62 + 12345, 2**55 + 2**33 + 7, 2**32 - 2), (2**32, 2**32 - 1, 1)]


@triton.jit
def philox_kernel(counter_ptr, out_ptr):
    c = counter_ptr
    c0, c1, c2, c3 = philox(
        tl.load(c).to(tl.uint32),
        tl.load(c + 1).to(tl.uint32),
        tl.load(c + 2).to(tl.uint32),
        tl.load(c + 3).to(tl.uint32),
        tl.load(c + 4).to(tl.uint32),
        tl.load(c + 5).to(tl.uint32),
    )
    tl.store(out_ptr, c0.to(tl.int64))
    tl.store(out_ptr + 1, c1.to(tl.int64))
    tl.store(out_ptr + 2, c2.to(tl.int64))
    tl.store(out_ptr + 3, c3.to(tl.int64))


@triton.jit(do_not_specialize=["stream", "first_sample", "sample"])
def words_kernel(key_ptr, out_ptr, stream, first_sample, sample, QUADS: tl.constexpr):
    c1, c2, c3, k0, k1 = load_counter(key_ptr, stream, first_sample, sample)
    quad = tl.arange(0, QUADS)
    w0, w1, w2, w3 = philox(quad.to(tl.uint32), c1, c2, c3, k0, k1)
    tl.store(out_ptr + quad, w0.to(tl.int64))
    tl.store(out_ptr + QUADS + quad, w1.to(tl.int64))
    tl.store(out_ptr + 2 * QUADS + quad, w2.to(tl.int64))
    tl.store(out_ptr + 3 * QUADS + quad, w3.to(tl.int64))


@triton.jit
def box_muller_kernel(words_ptr, out_ptr, N: tl.constexpr, FAST: tl.constexpr):
    i = tl.arange(0, N)
    w0 = tl.load(words_ptr + i).to(tl.uint32)
    w1 = tl.load(words_ptr + N + i).to(tl.uint32)
    n0, n1 = box_muller(w0, w1, FAST)
    tl.store(out_ptr + i, n0)
    tl.store(out_ptr + N + i, n1)


@triton.jit(do_not_specialize=["stream", "first_sample", "start"])
def normals_kernel(
    key_ptr, out_ptr, stream, first_sample, start,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    z = normals(key_ptr, stream, first_sample, 0, start, BLOCK, VECTOR, FAST)
    tl.store(out_ptr + tl.arange(0, BLOCK), z)


@triton.jit(do_not_specialize=["pid", "D"])
def locate_kernel(out_ptr, pid, D, BLOCK: tl.constexpr):
    sample, start, row = locate(pid, D, BLOCK)
    tl.store(out_ptr, sample)
    tl.store(out_ptr + 1, start)
    tl.store(out_ptr + 2, row)


def uniform_data(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=dtype, device=device)
    return torch.randn(shape, device=device).to(dtype)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, words, device):
    out = torch.empty(4, dtype=torch.int64, device=device)
    philox_kernel[(1,)](torch.tensor(counter + key, device=device), out)
    assert out.tolist() == words


@pytest.mark.parametrize("state", KEYS)
@pytest.mark.parametrize(("stream", "first_sample"), [(0, 0), (17, 5), (255, 2**32 - 1)])
def test_words_are_those_of_rng_bit_for_bit(state, stream, first_sample, device):
    key = rng.NoiseKey(*state, device=device)
    for sample in (0, 3):
        out = torch.empty(4, 64, dtype=torch.int64, device=device)
        words_kernel[(1,)](key.tensor, out, stream, first_sample, sample, QUADS=64)
        expected = rng.blocks(sample + 1, 64, key.tensor, stream, first_sample)
        assert torch.equal(out, torch.stack([word[sample] for word in expected]))


def test_normals_are_finite_and_accurate_at_every_corner_of_the_words(device):
    corners = [0, 1, 2**8, 2**24 - 1, 2**32 - 1, 2**32 - 2**7, 2**32 - 2**8, 2**32 - 2**22 - 2**9]
    corners += [(k << 29) + d & rng.MASK32 for k in range(8) for d in (-1, 0, 1)]
    corners = torch.tensor(corners, device=device)
    words = torch.stack((corners.repeat(32), corners.repeat_interleave(32)))
    words = words[:, :1024].contiguous()
    out = torch.empty(2, 1024, device=device)
    fast = launch.target(out).fast
    box_muller_kernel[(1,)](words, out, N=1024, FAST=fast)
    quad = [words[0:1], words[1:2], words[0:1], words[1:2]]
    expected = rng.normals(rng.to_unit(quad), torch.float64).view(1024, 4)[:, :2].T
    near = words[0] > 2**32 - 2**22
    slack = torch.where(near, tolerances.NORMAL_NEAR_ZERO if fast else 4e-6, tolerances.NORMAL)
    assert torch.isfinite(out).all()
    assert out.abs().max() <= 6.77
    assert ((out - expected).abs() <= slack).all()


@pytest.mark.parametrize("vector", [4, 8])
def test_element_4i_plus_j_is_normal_j_of_block_i(vector, device):
    key = rng.NoiseKey(*KEYS[1], device=device)
    out = torch.empty(1, 512, device=device)
    fast = launch.target(out).fast
    normals_kernel[(1,)](key.tensor, out, 3, 9, 1024, BLOCK=512, VECTOR=vector, FAST=fast)
    z = reference.noise((1, 1536), key, stream=3, first_sample=9, dtype=torch.float64)
    slack = tolerances.noise_slack(torch.Size((1, 1536)), key, 3, 9)
    assert ((out - z[:, 1024:]).abs() <= slack[:, 1024:]).all()


@pytest.mark.parametrize("D", [256, 1000])
def test_the_same_noise_for_any_block_vector_and_batch_split(D, device):
    x0 = torch.zeros(5, D, device=device)
    unit = torch.ones(1, 2, 5, device=device)

    def noise(samples: slice, config: LaunchConfig | None, first: int, key: rng.NoiseKey):
        out = torch.empty_like(x0[samples])
        coeffs = unit[:, :, samples].contiguous()
        launch_noising(
            x0[samples], coeffs, key.tensor, out, stream=2, first_sample=first, config=config
        )
        return out

    key = rng.NoiseKey(11, 3, 2**32 - 3, device=device)
    whole = noise(slice(0, 5), None, 0, key)
    for block, vector in ((128, 4), (512, 8), (1024, 8)):
        config = LaunchConfig(block, num_warps=1, VECTOR=vector)
        assert torch.equal(noise(slice(0, 5), config, 0, key), whole)
    assert torch.equal(noise(slice(2, 5), None, 2, key), whole[2:])
    later = rng.NoiseKey(11, 3, 1, device=device)
    assert torch.equal(noise(slice(4, 5), None, 0, later), whole[4:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "D"), [(0, 8), (2, 0), (3, 1), (1, 3), (3, 1023), (1, 1024), (3, 3072), (1, 4097)]
)
def test_two_noisy_versions_agree_with_the_reference(B, D, dtype, device):
    key = rng.NoiseKey(*KEYS[1], device=device)
    x0 = uniform_data((B, D), dtype, device)
    coeffs = torch.rand(2, 2, B, device=device)
    first = torch.float32 if dtype == torch.uint8 else dtype
    outs = [torch.empty(B, D, dtype=out, device=device) for out in (first, torch.bfloat16)]
    launch_noising(x0, coeffs, key.tensor, *outs, stream=1, first_sample=7)
    alpha, sigma = coeffs[:, 0], coeffs[:, 1]
    slack = tolerances.noise_slack(x0.shape, key, 1, 7)
    for k, out in enumerate(outs):
        where = {"stream": 1, "first_sample": 7}
        exact, plain = (
            reference.noising(x0, alpha, sigma, key, **where, out_dtype=out_dtype)[k]
            for out_dtype in (torch.float64, out.dtype)
        )
        tolerances.assert_close(out, exact, plain, slack * sigma[k][:, None])


@pytest.mark.parametrize("out_dtype", FLOATS)
def test_a_large_sample_is_noised_to_its_last_element(out_dtype, device):
    key = rng.NoiseKey(5, device=device)
    x0 = torch.randn(1, 16384 + 7, device=device)
    out = torch.empty_like(x0, dtype=out_dtype)
    coeffs = torch.rand(1, 2, 1, device=device)
    launch_noising(x0, coeffs, key.tensor, out, stream=0)
    exact, plain = (
        reference.noising(x0, coeffs[:, 0], coeffs[:, 1], key, stream=0, out_dtype=dtype)[0]
        for dtype in (torch.float64, out_dtype)
    )
    tolerances.assert_close(out, exact, plain, tolerances.noise_slack(x0.shape, key, 0))


def test_the_velocity_is_a_noisy_version_with_alpha_minus_one(device):
    key = rng.NoiseKey(5, device=device)
    x0 = torch.randn(2, 3, 8, 8, device=device)
    out = torch.empty_like(x0)
    coeffs = torch.tensor([-1.0, 1.0], device=device)[None, :, None].expand(1, 2, 2).contiguous()
    launch_noising(x0, coeffs, key.tensor, out, stream=0)
    z = reference.noise(x0.shape, key, stream=0)
    assert (out - (z - x0)).abs().max() < 2e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_at_any_offset_give_the_same_values_and_nothing_outside(dtype, device):
    key = rng.NoiseKey(6, device=device)
    coeffs = torch.rand(1, 2, 2, device=device)
    data = uniform_data((2, 35), dtype, device)
    out_dtype = torch.float32 if dtype == torch.uint8 else dtype
    expected = torch.empty(2, 35, dtype=out_dtype, device=device)
    launch_noising(data, coeffs, key.tensor, expected, stream=0)
    for offset in range(41):
        x0 = torch.cat((data.new_zeros(offset), data.flatten()))[offset:].view(2, 35)
        memory = torch.full((160,), 7.0, dtype=out_dtype, device=device)
        out = memory[offset : offset + 70].view(2, 35)
        launch_noising(x0, coeffs, key.tensor, out, stream=0)
        assert torch.equal(out, expected)
        assert (memory[:offset] == 7).all() and (memory[offset + 70 :] == 7).all()


@pytest.mark.parametrize(
    ("pid", "D"),
    [(0, 1), (2**31 - 1, 1), (2**31 - 1, 3072), (2**31 - 1, 2048), (2**31 - 1, 2**30), (7, 2**30)],
)
def test_addresses_are_right_beyond_two_to_the_31(pid, D, device):
    out = torch.empty(3, dtype=torch.int64, device=device)
    locate_kernel[(1,)](out, pid, D, BLOCK=2048)
    sample, chunk = divmod(pid, -(-D // 2048))
    assert out.tolist() == [sample, chunk * 2048, sample * D]


def test_launch_configurations_cover_the_sample_without_much_waste():
    for warp_size in (32, 64):
        for D in (1, 64, 1023, 3072, 4097, 12288, 16384, 16391, 2_000_000):
            config = launch.pointwise(D, 4, warp_size)
            assert launch.chunks(D, config) * config.BLOCK >= D
            assert launch.chunks(D, config) * config.BLOCK <= max(1.2 * D, 512)
            assert 1 <= config.num_warps * warp_size <= 512
            for B in (1, 16, 512):
                config = launch.chunked(B, D, 4, warp_size)
                assert launch.chunks(D, config) <= launch.MAX_CHUNKS
                assert 1 <= config.num_warps * warp_size <= 512
            if D <= launch.MAX_SAMPLE:
                config = launch.per_sample(D, 2, warp_size)
                assert D <= config.BLOCK + config.TAIL <= max(1.5 * D, 128)
    assert launch.per_sample(3072, 4) == LaunchConfig(2048, 4, VECTOR=4, TAIL=1024)
    assert launch.pointwise(3072, 2) == LaunchConfig(1024, 2, VECTOR=8)


@pytest.mark.gpu
def test_a_replayed_graph_reads_the_key_that_is_there_now():
    key = rng.NoiseKey(1, device="cuda")
    x0 = torch.zeros(4, 4096, device="cuda")
    out = torch.empty_like(x0)
    coeffs = torch.ones(1, 2, 4, device="cuda")
    launch_noising(x0, coeffs, key.tensor, out, stream=0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch_noising(x0, coeffs, key.tensor, out, stream=0)
        key.advance_()
    for step in range(3):
        graph.replay()
        z = reference.noise(x0.shape, rng.NoiseKey(1, step), stream=0)
        assert (out.cpu() - z).abs().max() < tolerances.NORMAL_NEAR_ZERO


@pytest.mark.gpu
def test_normals_keep_their_contract_over_millions():
    key = rng.NoiseKey(*KEYS[1], device="cuda")
    x0 = torch.zeros(64, 65536, device="cuda")
    out = torch.empty_like(x0)
    launch_noising(x0, torch.ones(1, 2, 64, device="cuda"), key.tensor, out, stream=3)
    exact = reference.noise(x0.shape, key, stream=3, dtype=torch.float64)
    assert ((out - exact).abs() <= tolerances.noise_slack(x0.shape, key, 3)).all()
