"""The networks have the shapes, branches, starts and weights that the paper's authors run."""

import pytest
import torch
from torch import nn
from torchvision import models

from pixel_sampling import model
from pixel_sampling.model import NETWORKS, BoT, build
from pixel_sampling.settings import ARCHS

CLASSES = 7
torch.set_num_threads(1)


def images(arch, height=64, width=32, number=4):
    rows = {"head": width, "head_body": height + width}.get(arch, height)
    return torch.randn(number, 3, rows, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    return {arch: build(arch, CLASSES, "resnet18") for arch in ARCHS}


# branches of logits and of triplet features with their sizes, and the test feature, for a 512-channel backbone
SHAPES = {
    "bot": (1, [512], 512),
    "pcb": (6, [6 * 512], 6 * 512),
    "mgn": (8, [256] * 3, 8 * 256),
    "hpm": (15, [256] * 15, 15 * 256),
    "head": (1, [512], 512),
    "head_body": (2, [1024], 1024),
}


@pytest.mark.parametrize("arch", ARCHS)
def test_branches_and_feature_sizes(networks, arch):
    logits, metrics, size = SHAPES[arch]
    output = networks[arch].train()(images(arch))
    assert [tuple(x.shape) for x in output.logits] == [(4, CLASSES)] * logits
    assert [tuple(x.shape) for x in output.metrics] == [(4, d) for d in metrics]
    assert tuple(networks[arch].eval()(images(arch)).shape) == (4, size)


@pytest.mark.parametrize("arch, size", [("bot", 2048), ("pcb", 12288), ("mgn", 2048), ("hpm", 3840)])
def test_test_features_of_resnet50_have_the_published_sizes(arch, size):
    with torch.device("meta"):
        network = NETWORKS[arch](models.resnet50(), 150).eval()
        assert network(torch.empty(2, 3, 256, 128)).shape == (2, size)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_trained_parameter_gets_a_gradient(networks, arch):
    network = networks[arch].train()
    network.zero_grad()
    output = network(images(arch))
    (sum(x.square().sum() for x in output.logits) + sum(x.square().sum() for x in output.metrics)).backward()
    assert [n for n, p in network.named_parameters() if p.requires_grad and p.grad is None] == []


def test_bot_keeps_a_16_by_8_map_freezes_the_necks_shift_and_tests_on_b(networks):
    with torch.device("meta"):
        assert BoT(models.resnet50(), 150).backbone(torch.empty(1, 3, 256, 128)).shape == (1, 2048, 16, 8)
    network = networks["bot"]
    assert not network.neck.bias.requires_grad and network.classifier.bias is None
    assert network.classifier.weight.std().item() == pytest.approx(0.001, rel=0.1)
    network.eval()
    t, b = network.embed(images("bot"))
    assert torch.allclose(t, network.backbone(images("bot")).mean((2, 3)), atol=1e-6)
    assert torch.equal(network(images("bot")), b) and torch.allclose(b, network.neck(t))


def test_pcb_parts_of_its_feature_have_unit_length_and_share_one_reduction(networks):
    network = networks["pcb"]
    network.eval()
    parts = network(images("pcb")).unflatten(1, (6, 512))
    assert torch.allclose(parts.norm(dim=2), torch.ones(4, 6), atol=1e-5)
    assert (
        sum(
            isinstance(m, nn.Conv2d) and m.out_channels == 256 and m.kernel_size == (1, 1) and m.in_channels == 512
            for m in network.reduce
        )
        == 1
    )
    assert all(layer.bias is not None for layer in network.classifiers)


def test_pcb_averages_six_overlapping_bins_of_16_rows():
    x = torch.randn(1, 3, 16, 8)
    for i, got in enumerate(model.stripes(x, 6)):
        low, high = i * 16 // 6, -(-(i + 1) * 16 // 6)
        assert torch.allclose(got, x[:, :, low:high].mean((2, 3)), atol=1e-6)


@pytest.mark.parametrize("pool, adaptive", [(torch.mean, "adaptive_avg_pool2d"), (torch.amax, "adaptive_max_pool2d")])
@pytest.mark.parametrize("height, number", [(16, 6), (16, 1), (16, 8), (8, 3), (7, 2), (2, 6)])
def test_stripes_are_adaptive_pooling_and_its_gradient(height, number, pool, adaptive):
    x = torch.randn(2, 3, height, 4, requires_grad=True)
    ours = torch.stack(model.stripes(x, number, pool), 2)
    theirs = getattr(nn.functional, adaptive)(x, (number, 1))[..., 0]
    weights = torch.randn_like(ours)
    (a,), (b,) = (torch.autograd.grad((y * weights).sum(), x) for y in (ours, theirs))
    assert torch.allclose(ours, theirs, atol=1e-6) and torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("arch", ARCHS)
def test_no_network_pools_adaptively_which_has_no_deterministic_gradient_on_a_gpu(networks, arch):
    with torch.profiler.profile() as seen:
        networks[arch].train()(images(arch))
    names = {event.key for event in seen.key_averages()}
    assert "aten::conv2d" in names and not [name for name in names if "adaptive" in name]


def test_reductions_start_as_the_authors_do():
    """PCB and HPM He by the fan out, sqrt(2 / 256) = 0.088; MGN by the fan in of ResNet-18, sqrt(2 / 512) = 0.0625."""
    spreads = {"pcb": (lambda n: [n.reduce], 0.088), "hpm": (lambda n: n.reductions, 0.088)}
    spreads["mgn"] = lambda n: n.reductions, 0.0625
    for arch, (layers, spread) in spreads.items():
        for layer in layers(build(arch, CLASSES, "resnet18")):
            assert layer[0].weight.std().item() == pytest.approx(spread, rel=0.02) and layer[0].bias is None


def test_mgn_branches_start_equal_differ_in_stride_and_reductions_share_their_start():
    network = build("mgn", CLASSES, "resnet18")
    x = network.stem(torch.randn(1, 3, 256, 128))
    assert [tuple(branch(x).shape[2:]) for branch in network.branches] == [(8, 4), (16, 8), (16, 8)]
    for branch in network.branches[1:]:
        assert all(torch.equal(a, b) for a, b in zip(network.branches[0].parameters(), branch.parameters()))
    first = network.reductions[0]
    assert all(
        torch.equal(first[0].weight, other[0].weight) and other[0].weight is not first[0].weight
        for other in network.reductions[1:]
    )


def test_hpm_takes_the_maximum_of_1_2_4_and_8_stripes(networks):
    x = torch.randn(2, 512, 16, 8)
    got = [part for level in (1, 2, 4, 8) for part in model.stripes(x, level, torch.amax)]
    expected = [x[:, :, i * 16 // n : (i + 1) * 16 // n].amax((2, 3)) for n in (1, 2, 4, 8) for i in range(n)]
    assert len(got) == 15 and all(torch.equal(a, b) for a, b in zip(got, expected))
    assert networks["hpm"].reduction == {"id": "sum", "triplet": "sum"}


def test_head_body_is_two_unshared_networks_with_one_unit_feature(networks):
    network = networks["head_body"].train()
    assert network.body.backbone.conv1.weight is not network.head.backbone.conv1.weight
    x = images("head_body")
    assert torch.allclose(network(x).metrics[0].norm(dim=1), torch.ones(4), atol=1e-5)
    network.eval()
    assert torch.allclose(network(x), torch.cat([network.body(x[:, :, :64]), network.head(x[:, :, 64:])], 1), atol=1e-5)


def test_unknown_networks_are_named():
    with pytest.raises(ValueError, match="no network"):
        build("vit", 5)
