"""Networks: encoders, queue, momentum, shuffled BatchNorm, gather with gradient, trunk loader, AGW, PN-GAN."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import runfiles
from dapg import model, trunk
from dapg.downstream import agw
from dapg.poses import pngan


def tiny(**options):
    return model.Contrast("resnet18", size=16, dim=8, **options)


def images(*shape):
    return torch.rand(*shape, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------------ queue, momentum
def test_the_queue_is_filled_in_order_and_wraps_around():
    net, before = tiny(), tiny().queue.clone()
    keys = F.normalize(torch.arange(24 * 8.0).view(24, 8) + 1, dim=1)
    net.after_step(keys[:10])
    assert torch.equal(net.queue[:10], keys[:10]) and torch.equal(net.queue[10:], before[10:]) and net.pointer == 10
    net.after_step(keys[10:20])
    assert torch.equal(net.queue[10:], keys[10:16]) and torch.equal(net.queue[:4], keys[16:20]) and net.pointer == 4


def test_momentum_moves_parameters_only_and_gradients_reach_only_q():
    net = tiny(momentum=0.9)
    with torch.no_grad():
        for p in net.encoder_q.parameters():
            p.add_(1)
    old = [p.clone() for p in net.encoder_k.parameters()]
    stats = net.encoder_k.trunk.bn1.running_mean.clone()
    net.follow()
    for p, q, was in zip(net.encoder_k.parameters(), net.encoder_q.parameters(), old):
        assert torch.allclose(p, 0.9 * was + 0.1 * q, atol=1e-5)
    assert torch.equal(net.encoder_k.trunk.bn1.running_mean, stats)
    old = next(net.encoder_k.parameters()).clone()
    z, k = net(images(16), images(12))
    assert not torch.equal(next(net.encoder_k.parameters()), old)  # every step with keys moves them
    assert not torch.equal(net.encoder_k.trunk.bn1.running_mean, stats)  # its own forward pass moves them
    (z @ net.queue.T).logsumexp(1).sum().backward()
    assert all(p.grad is not None for p in net.encoder_q.parameters())
    assert all(p.grad is None for p in net.encoder_k.parameters()) and not k.requires_grad


@pytest.mark.parametrize(
    "count, wanted, size",
    [(4_180_000, None, 65536), (12936, None, 2048), (1200, None, 256), (8, None, 4), (8, 512, 512)],
)
def test_queue_is_at_most_a_quarter_of_the_images(count, wanted, size):
    assert model.queue_size(count, wanted) == size


def test_checksum_sees_a_change_and_a_swap():
    x = torch.randn(6, 4)
    assert model.checksum(x) == model.checksum(x.clone())
    assert model.checksum(x) != model.checksum(x[[1, 0, 2, 3, 4, 5]]) and model.checksum(x) != model.checksum(x + 1e-6)
    assert model.checksum(torch.tensor(3)) != model.checksum(torch.tensor(4))  # the queue's pointer has no dimension


# ---------------------------------------------------------------------------------------------------------------- trunk


def test_exported_trunks_and_rows_are_found_by_kind(tmp_path):
    net = model.Encoder("resnet18")
    for data in ("luperson", "luperson-synthetic-small"):
        folder = tmp_path / "dapg" / data / "robust/dapg" / "seed0"
        folder.mkdir(parents=True)
        trunk.export(folder / "trunk.pt", net, {"stage": "robust", "images": 3})
    for synthetic, place in ((None, "luperson"), ("small", "luperson-synthetic-small")):
        assert runfiles.of_row("dapg", "robust/dapg", "trunk.pt", tmp_path, synthetic).parts[-5:-3] == (place, "robust")
        assert (
            trunk.load("row:robust/dapg", "resnet18", str(tmp_path), synthetic).keys() == net.trunk.state_dict().keys()
        )
    with pytest.raises(FileNotFoundError, match="--row align/dapg --synthetic full"):
        runfiles.of_row("dapg", "align/dapg", "trunk.pt", tmp_path, "full")


def test_a_further_pre_training_starts_from_the_head_too(tmp_path, capsys):
    """Stage 2 has the network of stage 1: of its export or checkpoint all is taken, of other files the trunk."""
    torch.manual_seed(0)
    first, second = model.Contrast("resnet18", 8), model.Contrast("resnet18", 8)
    trunk.export(tmp_path / "trunk.pt", first.learner, {})
    torch.save({"model": first.state_dict()}, tmp_path / "checkpoint_0001.pt")
    torch.save(first.learner.trunk.state_dict(), tmp_path / "bare.pth")
    trunk.export(tmp_path / "byol.pt", model.BYOL("resnet18").learner, {})
    own = second.learner.state_dict()
    for name in ("trunk.pt", "checkpoint_0001.pt"):
        found = trunk.load(str(tmp_path / name), "resnet18", "", None, own)
        assert all(torch.equal(found[key], value) for key, value in first.learner.state_dict().items())
    capsys.readouterr()
    for name in ("bare.pth", "byol.pt"):  # BYOL's head has another shape
        found = trunk.load(str(tmp_path / name), "resnet18", "", None, own)
        assert torch.equal(found["head.0.weight"], own["head.0.weight"]) and "new: head." in capsys.readouterr().out
        assert not torch.equal(found["trunk.conv1.weight"], own["trunk.conv1.weight"])
    second.load_encoder(trunk.load(str(tmp_path / "trunk.pt"), "resnet18", "", None, own))
    for encoder in (second.encoder_q, second.encoder_k):
        assert torch.equal(encoder.head[2].weight, first.encoder_q.head[2].weight)


def test_schedules():
    assert [round(trunk.cosine(e, 300, 10), 3) for e in (0, 5, 10, 155, 300)] == [0, 0.5, 1, 0.5, 0]
    assert [agw.schedule(e) for e in (0, 9, 10, 19, 20, 49, 50, 80)] == [0.1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]
    cosine = [agw.schedule(e, "cosine") for e in range(82)]
    assert cosine[:10] == [agw.schedule(e) for e in range(10)] and cosine[10] == 1 and cosine[81] < 1e-12
    assert sum(cosine[10:82]) == pytest.approx(36)  # half of the steps, and the first


# ------------------------------------------------------------------------------------------------------------------ AGW
def test_agw_has_the_live_parameters_of_the_authors_network_and_an_18x9_map():
    net = agw.TwoStream(395).eval()
    assert sum(p.numel() for p in net.parameters()) == 24_359_311
    seen = []
    net.layers[3][-1].register_forward_hook(lambda *a: seen.append(a[2].shape))
    with torch.no_grad():
        pooled, logits = net(torch.zeros(1, 3, 288, 144), torch.zeros(1, 3, 288, 144))
    assert seen == [(2, 2048, 18, 9)] and pooled.shape == (2, 2048) and logits.shape == (2, 395)
    assert not net.neck.bias.requires_grad and sorted(net.non_local) == ["2_2", "2_3", "3_3", "3_4", "3_5"]


def test_both_stems_and_the_layers_start_from_the_trunk():
    source = trunk.resnet("resnet18")
    net = agw.TwoStream(5, "resnet18")
    net.load_trunk(source.state_dict())
    for stem in (net.visible, net.infrared):
        assert torch.equal(stem[0].weight, source.conv1.weight)
    assert net.visible[0].weight.data_ptr() != net.infrared[0].weight.data_ptr()
    assert torch.equal(net.layers[3][1].conv2.weight, source.layer4[1].conv2.weight)


def test_both_streams_describe_an_image_alike_before_training_also_with_random_weights():
    torch.manual_seed(3)
    net = agw.TwoStream(5, "resnet18").eval()
    x = images(2)
    with torch.no_grad():
        assert torch.equal(net.pooled(x, None), net.pooled(None, x))
    assert net.visible[0].weight.data_ptr() != net.infrared[0].weight.data_ptr()
    torch.manual_seed(3)  # what is drawn after the stems follows two ResNets, as when each stem kept its own
    first, _, block = trunk.resnet("resnet18"), trunk.resnet("resnet18"), agw.NonLocal(128)
    assert torch.equal(net.visible[0].weight, first.conv1.weight)
    assert torch.equal(net.non_local["2_0"].g.weight, block.g.weight)


def test_non_local_equals_its_definition_and_starts_as_identity():
    block = agw.NonLocal(6, inner=2).eval()
    x = torch.randn(2, 6, 4, 3)
    assert torch.equal(block(x), x)
    nn.init.ones_(block.norm.weight)
    g, theta, phi = (f(x).flatten(2) for f in (block.g, block.theta, block.phi))
    y = torch.zeros_like(g)
    for m in range(12):
        for n in range(12):
            y[:, :, m] += (theta[:, :, m] * phi[:, :, n]).sum(1, keepdim=True) * g[:, :, n] / 12
    assert torch.allclose(block(x), x + block.norm(block.w(y.view(2, 2, 4, 3))), atol=1e-5)


def test_non_local_stays_within_float16():
    """Its products of 648 places sum up to 259,200, of which the mean, 400, is wanted."""
    block = agw.NonLocal(1).eval()
    for layer in (block.g, block.theta, block.phi, block.w):
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
    nn.init.constant_(block.norm.weight, 0.01)
    x = torch.full((1, 1, 36, 18), 20.0)
    with torch.no_grad():
        assert torch.allclose(block.half()(x.half()).float(), torch.full_like(x, 100.0), rtol=1e-2)


def test_gem_is_the_cubic_mean_and_groups_have_their_rates():
    net = agw.TwoStream(4, "resnet18").eval()
    x = torch.rand(2, 3, 64, 32)
    maps = []
    net.layers[3][-1].register_forward_hook(lambda *a: maps.append(a[2]))
    with torch.no_grad():
        pooled = net.pooled(x, None)
    want = (maps[0].clamp_min(0).pow(3).mean((2, 3)) + 1e-12).pow(1 / 3)
    assert torch.allclose(pooled, want, rtol=1e-4)
    groups = agw.parameter_groups(net, 0.1)
    assert [round(g["lr"], 3) for g in groups] == [0.01, 0.1] and len(groups[1]["params"]) == 2


# --------------------------------------------------------------------------------------------------------------- PN-GAN
def test_pngan_has_the_published_sizes():
    gan = pngan.PNGAN()
    assert sum(p.numel() for p in gan.generator.parameters()) == 11_387_584
    assert sum(p.numel() for p in gan.discriminator.parameters()) == 2_764_672
    with torch.no_grad():
        assert gan.discriminator(torch.zeros(1, 3, 256, 128)).shape == (1, 1, 26, 10)
        small = pngan.Generator(8, 2)
        fake = small(torch.zeros(1, 3, 64, 32), torch.zeros(1, 3, 64, 32))
        assert fake.shape == (1, 3, 64, 32) and fake.abs().max() <= 1
        x = torch.rand(2, 3, 64, 32)
        assert torch.allclose(small.train()(x, x), small.eval()(x, x), atol=1e-6)  # InstanceNorm keeps no statistics


def test_gan_losses_are_least_squares_and_l1():
    gan = pngan.PNGAN(4, 1)
    fake, source = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    d_fake, d_real = gan.discriminator(fake), gan.discriminator(source)
    loss, l1 = pngan.generator_loss(gan, fake, source)
    assert torch.allclose(loss, (d_fake - 1).pow(2).mean() + 10 * (fake - source).abs().mean(), atol=1e-5)
    assert torch.allclose(l1, (fake - source).abs().mean())
    want = d_fake.pow(2).mean() + (d_real - 1).pow(2).mean()
    assert torch.allclose(pngan.discriminator_loss(gan, fake, source), want, atol=1e-5)


def test_gan_rate_is_constant_then_falls_to_zero():
    gan = pngan.PNGAN(2, 1)
    optimizers = pngan.Optimizers(gan, 1.0)
    decay, rates = pngan.Decay(optimizers, 1.0, 20), []
    for _ in range(20):
        rates.append(optimizers.parts[1].param_groups[0]["lr"])
        decay.step()
    assert np.allclose(rates, [1.0] * 11 + [0.1 * n for n in range(9, 0, -1)])
    assert optimizers.parts[0].param_groups[0]["lr"] == 0 and rates[-1] == pytest.approx(2 / 20)
    assert torch.equal(pngan.to_pixels(pngan.to_tanh(torch.arange(256, dtype=torch.uint8))), torch.arange(256).byte())


def test_byols_target_follows_slowly_and_then_not_at_all():
    net = model.BYOL("resnet18")
    weight = next(net.online.parameters())
    with torch.no_grad():
        weight.add_(1)
    slow = next(net.target.parameters())
    before = slow.clone()
    net.after_step(None, 0.0)
    assert torch.allclose(slow, 0.996 * before + 0.004 * weight, atol=1e-6) and not torch.equal(slow, before)
    before = slow.clone()
    net.after_step(None, 0.5)
    assert torch.allclose(slow, 0.998 * before + 0.002 * weight, atol=1e-6)
    before = slow.clone()
    net.after_step(None, 1.0)
    assert torch.equal(slow, before)


def test_reflection_of_slices_is_that_of_pytorch():
    x = torch.randn(2, 4, 9, 7, requires_grad=True)
    ours, theirs = pngan.mirrored(pngan.mirrored(x, 3, 3), 3, 2), torch.nn.ReflectionPad2d(3)(x)
    assert torch.equal(ours, theirs)
    weight = torch.randn_like(ours)
    gradients = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (ours, theirs)]
    assert torch.allclose(*gradients, atol=1e-5)
