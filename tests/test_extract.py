"""common.evaluation.extract: the same features and metrics from one, two and three processes, modes left as found."""

import contextlib
import os
import socket

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing, nn

from common import runtime
from common.evaluation import extract, rank_metrics
from common.images import ImageStore
from common.transforms import normalize

N = 101


class Pictures:
    """What extract asks of an image store."""

    def __init__(self, n):
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randint(0, 256, (n, 3, 16, 8), generator=generator, dtype=torch.uint8)

    def __len__(self):
        return len(self.pixels)

    def gather(self, indices):
        return self.pixels[torch.as_tensor(indices)]


def network():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 12),
    )
    model[1].running_mean.normal_()
    return model


def metrics(feats):
    pids, camids = np.arange(N) % 17, np.arange(N) // 17 % 3
    return rank_metrics(feats[:30], feats[30:], pids[:30], pids[30:], camids[:30], camids[30:])


def worker(rank, world_size, port, path):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    model = nn.parallel.DistributedDataParallel(network())
    sizes = (N, 5)  # with 5 images in blocks of 8 only rank 0 has any
    feats = [extract(model, Pictures(n), batch_size=8, rank=rank, world_size=world_size) for n in sizes]
    torch.save(feats, f"{path}.{rank}")
    runtime.leave()


def extracted_by(world_size, path):
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(worker, (world_size, port, path), nprocs=world_size)
    return [torch.load(f"{path}.{rank}", weights_only=True) for rank in range(world_size)]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_processes_give_the_features_and_metrics_of_one(world_size, tmp_path):
    alone, few = (extract(network(), Pictures(n), batch_size=8) for n in (N, 5))
    for feats, without_a_block in extracted_by(world_size, tmp_path / "feats"):
        assert torch.equal(feats, alone) and torch.equal(without_a_block, few)
        ours, expected = metrics(feats), metrics(alone)
        assert ours.mAP == expected.mAP and np.array_equal(ours.cmc, expected.cmc) and ours.mINP == expected.mINP


@pytest.mark.parametrize("n,batch_size", [(N, 8), (N, 1), (N, 500), (1, 8), (16, 8)])
def test_features_equal_one_forward_pass_image_by_image(n, batch_size):
    model = network().eval()
    expected = torch.cat([model(normalize(Pictures(n).gather([i]))) for i in range(n)]).detach()
    feats = extract(model, Pictures(n), batch_size=batch_size)
    assert feats.shape == (n, 12) and feats.dtype == torch.float32 and not feats.requires_grad
    torch.testing.assert_close(feats, expected, atol=1e-5, rtol=0)


def test_flip_takes_the_mean_with_the_mirrored_images():
    model, images = network().eval(), Pictures(9)
    x = normalize(images.gather(range(9)))
    expected = (model(x) + model(x.flip(3))).detach() / 2
    torch.testing.assert_close(extract(model, images, flip=True), expected, atol=1e-6, rtol=0)


def test_every_module_leaves_in_the_mode_it_came_with():
    model = network().train()
    model[1].eval()
    statistics = model[1].running_mean.clone()
    extract(model, Pictures(9))
    assert [m.training for m in model] == [True, False, True, True, True, True, True] and model.training
    assert torch.equal(model[1].running_mean, statistics)

    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("no")

    broken = Broken().train()
    with pytest.raises(RuntimeError, match="no"):
        extract(broken, Pictures(3))
    assert broken.training


def test_features_can_be_trained_on():
    feats = extract(network(), Pictures(9))
    weight = torch.ones(12, requires_grad=True)
    (feats @ weight).sum().backward()
    assert weight.grad is not None


def test_bf16_is_near_and_answers_in_float32():
    exact = extract(network(), Pictures(20))
    near = extract(network(), Pictures(20), amp="bf16")
    assert near.dtype == torch.float32 and not torch.equal(near, exact)
    torch.testing.assert_close(near, exact, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    "change,words",
    [
        (dict(amp="fp8"), "amp: expected one of off, bf16, fp16, got 'fp8'"),
        (dict(batch_size=0), "batch_size 0"),
        (dict(images=Pictures(0)), "0 images"),
        (dict(rank=2, world_size=2), "rank 2 of 2"),
        (dict(model=nn.Identity()), r"model: expected output \(9, D\) in eval mode, got \(9, 3, 16, 8\)"),
    ],
)
def test_wrong_input_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        extract(**({"model": network(), "images": Pictures(9)} | change))


@pytest.mark.parametrize("workers", [0, 1])
def test_images_in_no_cache_are_decoded_by_that_many_workers(workers):
    class Store(ImageStore):
        def decode(self, index):
            return np.full((3, 16, 8), os.getpid() % 256, np.uint8)

    store = Store(["a", "b"], (3, 16, 8), "bicubic", "off", torch.device("cpu"), None)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 8, 1, bias=False))
    nn.init.ones_(model[1].weight)
    own = extract(model, store, workers=workers)
    here = model(normalize(torch.full((1, 3, 16, 8), os.getpid() % 256, dtype=torch.uint8)))
    assert bool(torch.isclose(own[0], here[0], rtol=1e-4)) == (workers == 0)
