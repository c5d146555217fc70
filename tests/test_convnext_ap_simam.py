"""SimAM: the closed form against Eq. (3) minimised numerically, the fused form against autograd, what it keeps."""

import math

import pytest
import torch
from conftest import ROOT

from convnext_ap.simam import LAMBDA, energy, simam, simam_autograd
from results import schema

benchmark = schema.load_script(ROOT / "tests" / "benchmarks" / "bench_convnext_ap.py")


def maps(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def least_energy(t, mean, variance, lam):
    """min over w, b of (-1 - w x_i - b)^2 averaged over the channel + (1 - w t - b)^2 + lam w^2, Eq. (3), by its normal
    equations: the average over x_i needs their mean and variance only."""
    a = torch.tensor([[variance + mean**2 + t**2 + lam, mean + t], [mean + t, 2.0]], dtype=torch.float64)
    w, b = torch.linalg.solve(a, torch.tensor([t - mean, 0.0], dtype=torch.float64)).tolist()
    e = variance * w**2 + (1 + w * mean + b) ** 2 + (1 - w * t - b) ** 2 + lam * w**2
    assert w == pytest.approx(2 * (t - mean) / ((t - mean) ** 2 + 2 * variance + 2 * lam), rel=1e-9)  # Eq. (4)
    assert b == pytest.approx(-(t + mean) * w / 2, rel=1e-9, abs=1e-12)  # Eq. (5)
    return e


def test_eq6_equals_a_loop_that_minimises_eq3_for_every_neuron():
    x = maps(2, 3, 4, 3)
    out = simam(x)
    for n in range(2):
        for c in range(3):
            values = x[n, c].flatten().tolist()
            mean = sum(values) / 12
            variance = sum((v - mean) ** 2 for v in values) / 11
            for i, t in enumerate(values):
                least = least_energy(t, mean, variance, LAMBDA)
                assert energy(*torch.tensor([t, mean, variance], dtype=torch.float64)).item() == pytest.approx(
                    least, rel=1e-9
                )
                gate = 1 / (1 + math.exp(-1 / least))
                assert out[n, c].flatten()[i].item() == pytest.approx(t * gate, rel=1e-12, abs=1e-14)


def test_leaving_the_neuron_out_of_its_own_statistics_as_printed_moves_the_gates_as_stated():
    for shape, most, average in (((2000, 1, 8, 4), 0.045, 0.006), ((20, 1, 64, 32), 0.0007, 0.0001)):
        x, others = maps(*shape), shape[2] * shape[3] - 1
        mu = (x.sum((2, 3), keepdim=True) - x) / others  # of all neurons but t, as below Eq. (5)
        s2 = (x.square().sum((2, 3), keepdim=True) - x.square()) / others - mu.square()
        moved = (torch.sigmoid(1 / energy(x, mu, s2)) - simam(x) / x).abs()
        assert 0.8 * most < moved.max() <= most and moved.mean() == pytest.approx(average, rel=0.1)


@pytest.mark.parametrize("shape", [(2, 3, 8, 4), (1, 1, 2, 1), (3, 2, 7, 5)])
def test_fused_forward_and_backward_equal_autograd_of_the_formula(shape):
    x, grad = maps(*shape).requires_grad_(), maps(*shape, seed=1)
    ours, theirs = simam(x), simam_autograd(x)
    assert (ours - theirs).abs().max() < 1e-12
    (a,), (b,) = (torch.autograd.grad(y, x, grad) for y in (ours, theirs))
    assert (a - b).abs().max() < 1e-12


def test_gradcheck():
    assert torch.autograd.gradcheck(simam, (maps(2, 2, 3, 4).requires_grad_(),))


def test_a_constant_channel_is_scaled_by_sigmoid_of_one_half():
    x = torch.full((1, 2, 4, 4), 3.0, requires_grad=True)
    out = simam(x)
    out.sum().backward()
    assert torch.allclose(out, torch.full_like(out, 3 / (1 + math.exp(-0.5)))) and x.grad.isfinite().all()


def test_the_gate_lies_between_its_bounds():
    x = maps(4, 8, 16, 8)
    gate = simam(x) / x
    assert gate.min() >= 1 / (1 + math.exp(-0.5)) and gate.max() < 1 and gate.mean() == pytest.approx(0.674, abs=0.01)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.02), (torch.float16, 0.002), (torch.float32, 1e-5)])
def test_low_precision_stays_close_and_does_not_overflow(dtype, tolerance):
    x = (maps(2, 4, 16, 8) * 300 + 50).to(dtype).requires_grad_()  # squares overflow fp16
    exact = x.detach().double().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = simam(x)
    reference = simam_autograd(exact)
    assert out.dtype == dtype and ((out.double() - reference).abs() / reference.abs().max()).max() < tolerance
    a, b = (torch.autograd.grad(y.sum(), z)[0].double() for y, z in ((out, x), (reference, exact)))
    assert (a - b).abs().max() < 50 * tolerance


def test_channels_last_gives_the_same_numbers_and_keeps_its_format():
    x = maps(2, 16, 8, 4, dtype=torch.float32)
    last = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    x.requires_grad_()
    a, b = simam(x), simam(last)
    assert b.is_contiguous(memory_format=torch.channels_last) and torch.allclose(a, b, atol=1e-6)
    grads = [torch.autograd.grad(y.square().sum(), z)[0] for y, z in ((a, x), (b, last))]
    assert torch.allclose(*grads, atol=1e-5)


def test_a_single_position_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"SimAM .* \(2, 3, 1, 1\) has 1; at least 2 .*--simam none"):
        simam(torch.ones(2, 3, 1, 1))
    with pytest.raises(ValueError, match="SimAM"):
        simam(torch.ones(2, 3))


def full_maps_saved(function):
    """How many tensors of the map's size autograd keeps for one application."""
    x, kept = maps(2, 4, 8, 4, dtype=torch.float32).requires_grad_(), {}

    def pack(tensor):
        if tensor.numel() == x.numel():
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function(x)
    return len(kept), out


def test_one_map_is_kept_where_autograd_keeps_four():
    ours, _ = full_maps_saved(simam)
    theirs, _ = full_maps_saved(simam_autograd)
    assert (ours, theirs) == (1, 4)  # and the output, which the next layer keeps in both cases: 2 against 5


def test_memory_at_256x128_grows_by_one_map_a_block_instead_of_four():
    """ConvNeXt-B, counted on the meta device: one map of every block is 3,047,424 numbers an image."""
    one, kept = 3_047_424 * 4 / 2**20, benchmark.memory("meta")
    assert kept["simam"] - kept["none"] == pytest.approx(one, rel=0.02)
    assert kept["simam_autograd"] - kept["none"] == pytest.approx(4 * one, rel=0.02)
