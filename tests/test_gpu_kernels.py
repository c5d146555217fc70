"""On a GPU: losses, features and noise are those of the CPU; evaluation, Jaccard distance and re-ranking keep within
the memory that their docstrings state, at the size of Market-1501.

The kernels of common and the corruptions are compared with the CPU in the tests of their modules (`-m gpu`).
"""

import gc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convnext_ap.losses
import dapg.losses
import pixel_sampling.losses
import prsnet.losses
from common import batchnorm, evaluation, jaccard
from common.images import ImageStore
from dapg.noise import groups
from pixel_sampling.head import crop_heads
from tests.benchmarks.bench_evaluation import descriptors
from tests.benchmarks.bench_jaccard import features

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
MIB = 2**20
LABELS = torch.arange(4).repeat_interleave(4)
REAL = torch.tensor([[True] * 4, [True] * 3 + [False], [True] * 4, [True, True, False, False]])


@pytest.fixture(autouse=True)
def full_precision():
    """No TF32 in products, whatever a test before this one has set."""
    torch.set_float32_matmul_precision("highest")


def random(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LOSSES = {  # (function of tensors that have gradients, those tensors)
    "circle": (lambda x, y: convnext_ap.losses.total_loss(x, y, LABELS.to(x.device)).total,
               [random(16, 3, 5), random(16, 3, 8)]),
    "circle-triplet": (lambda x, y: convnext_ap.losses.total_loss(x, y, LABELS.to(x.device), loss="id+triplet").total,
                       [random(16, 3, 5), random(16, 3, 8)]),
    "consistency": (pixel_sampling.losses.consistency_loss, [random(6, 8), random(6, 8, seed=1)]),
    "triplet": (lambda x: pixel_sampling.losses.triplet_loss(x, LABELS.to(x.device)), [random(16, 8)]),
    "prsnet-triplet": (lambda x: prsnet.losses.triplet(x, REAL.to(x.device)), [random(4, 4, 8)]),
    "prsnet-mctl": (lambda x, y: prsnet.losses.centroid_loss("mctl", x, y, REAL.to(x.device)),
                    [random(4, 4, 8), random(4, 4, 8, seed=1)]),
    "prsnet-centre": (lambda x, y: prsnet.losses.centre_loss(x, torch.arange(4).to(x.device), REAL.to(x.device), y),
                      [random(4, 4, 8), random(4, 8, seed=1)]),
    "multi-contrastive": (lambda x, y: dapg.losses.multi_contrastive(x, y, 0.5), [random(6, 3), random(6, 20)]),
    "weighted-triplet": (lambda x: dapg.losses.weighted_triplet(x, LABELS.to(x.device)), [random(16, 8)]),
    "js": (dapg.losses.consistency, [random(3, 6, 5)]),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_their_gradients_are_those_of_the_cpu(name):
    loss, tensors = LOSSES[name]
    found = []
    for device in ("cpu", "cuda"):
        own = [x.to(device).requires_grad_() for x in tensors]
        value = loss(*own)
        found.append([value.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(value, own))])
    for here, there in zip(*found):
        assert here.abs().max() > 0 and (here - there).abs().max() <= 1e-4 * here.abs().max()


def test_batch_statistics_of_groups_are_those_of_the_cpu():
    found = []
    for device in ("cpu", "cuda"):
        layer = batchnorm.over_groups(nn.Sequential(nn.BatchNorm2d(3)), 1, 2).to(device)
        x = (3 * random(8, 3, 6, 5) + 10).to(device).requires_grad_()
        out = layer(x)
        out.pow(3).sum().backward()
        found.append([t.detach().cpu() for t in (out, x.grad, layer[0].running_mean, layer[0].running_var)])
    for here, there in zip(*found):
        assert torch.allclose(here, there, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cache", ["disk", "device"])
def test_features_are_those_of_the_cpu_from_every_cache(cache):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    pixels = np.random.default_rng(0).integers(0, 256, (50, 3, 32, 16), dtype=np.uint8)
    host = ImageStore([""] * 50, (3, 32, 16), "bilinear", "disk", torch.device("cpu"), pixels)
    where = torch.device("cuda", 0)
    stored = torch.from_numpy(pixels).to(where) if cache == "device" else pixels
    store = ImageStore([""] * 50, (3, 32, 16), "bilinear", cache, where, stored)
    here = evaluation.extract(network, host, batch_size=16, flip=True)
    there = evaluation.extract(network.to(where), store, device=where, batch_size=16, flip=True)
    assert there.is_cuda and (here - there.cpu()).abs().max() <= 2e-3 * here.abs().max()  # TF32 in the convolution


def test_heads_are_cropped_as_on_the_cpu():
    images = torch.randint(0, 256, (6, 3, 64, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    parts = torch.zeros(6, 64, 32, dtype=torch.uint8)
    for i in range(5):  # the last has no head
        parts[i, 2 : 12 + i, 8 + i : 20] = 1
    there = crop_heads(images.cuda(), parts.cuda()).cpu()
    assert (there.float() - crop_heads(images, parts).float()).abs().max() <= 1.01


@pytest.mark.parametrize("augmix_ops", [False, True])
def test_noise_groups_look_like_those_of_the_cpu(augmix_ops):
    """The same types, severities and weights; only the noise fields are drawn by the device."""
    images = F.interpolate(random(16, 3, 8, 4).mul(60).add(128), (64, 32), mode="bicubic").clamp(0, 255).byte()
    draw = groups.draw_noise(16, np.random.default_rng(0))
    here = groups.noise_group((images,) * 3, draw, torch.Generator().manual_seed(0), augmix_ops)
    there = groups.noise_group((images.cuda(),) * 3, draw, torch.Generator("cuda").manual_seed(0), augmix_ops)
    for one, other in zip(here[:4], there[:4]):
        assert other.is_cuda and other.dtype == torch.uint8
        means = one.float().mean((1, 2, 3)), other.cpu().float().mean((1, 2, 3))
        assert (means[0] - means[1]).abs().mean() < 6 and (means[0] - means[1]).abs().max() < 40


# -------------------------------------------------------------------------------------------------------------- memory
def peak_mib(work) -> float:
    """MiB that work() takes on the device on top of what is there."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


NORMS_MIB = 4096 * 2048 * 4 / MIB  # squared norms, and distances of single pairs, go 4,096 rows at a time


def test_evaluation_at_market_size_takes_a_few_blocks():
    """Blocks of 16 MiB; sorting takes four more. The whole matrix of distances would be 254 MiB."""
    query, gallery, *ids = descriptors(3368, 19732, 750, distractors=2798 / 15913)
    query, gallery = query.cuda(), gallery.cuda()
    evaluation.rank_metrics(query[:64], gallery, ids[0][:64], ids[1], ids[2][:64], ids[3])  # loads the libraries
    block = evaluation.BLOCK_BYTES[1] / MIB
    assert peak_mib(lambda: evaluation.rank_metrics(query, gallery, *ids)) <= 8 * block + NORMS_MIB < 170


def test_jaccard_distance_at_market_size_takes_one_block_and_what_searches_it():
    """A block of 256 rows is 12.6 MiB; the dense matrix would be 638 MiB."""
    x = features("clustered", 12936, "cuda")
    jaccard.jaccard_distance(x[:300])
    block = 256 * len(x) * 4 / MIB
    assert peak_mib(lambda: jaccard.jaccard_distance(x, chunk=256)) <= 5 * block + 4 * NORMS_MIB < 200


def test_re_ranking_at_market_size_takes_its_result_a_copy_of_the_features_and_blocks():
    x = features("clustered", 23100, "cuda")
    jaccard.re_rank(x[:100], x[100:300])
    result, copy, block = (n * 4 / MIB for n in (3368 * 19732, x.numel(), 256 * len(x)))
    peak = peak_mib(lambda: jaccard.re_rank(x[:3368], x[3368:], chunk=256))
    assert peak <= result + copy + 5 * block + 4 * NORMS_MIB
