"""A training step of both scripts of PRSNet: the same loss and the same gradient of a global batch on any number of
processes, or the number is refused before anything is read; and no wait for the GPU."""

import functools

import numpy as np
import prsnet_small as small
import pytest
import torch
from ranks import on_ranks

from common import log_folder, runtime, transforms
from prsnet import masking, pretrain, train

PRETRAIN = {"pretrain": (), "pretrain-mae": ("--model", "mae")}
FINETUNE = {
    "mctl": (),
    "ctl": ("--centroid", "ctl"),
    "mae": ("--model", "mae"),
    "authors": ("--preset", "authors", "--batch-size", "12"),
}


def strengthen(model):
    """Blocks and norms that act from the first step, as after training (gamma starts at 1e-6)."""
    draw = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if p.ndim == 1 and "neck" not in name:
            p.data += 0.3 * torch.randn(p.shape, generator=draw)
    return model


def first_pretrain_step(words):
    args = small.pretrain_args(*words)
    run, fixed = runtime.start(args, "prsnet"), small.Fixed(8)
    masking.draw = fixed.draw
    model, optimizer, scheduler = pretrain.build(args, run, 1)
    strengthen(model)
    state = runtime.scaler(run), small.store(8), fixed.augment, 0
    return found(pretrain.train_one_epoch(run, args, model, optimizer, scheduler, *state), model)


def first_finetune_step(words):
    args, labels = small.finetune_args(*words), small.labels()
    run, fixed = runtime.start(args, "prsnet"), small.Fixed(len(labels))
    masking.draw = fixed.draw
    model, optimizer, centres, _ = train.build(args, run, len(small.SIZES), "market")
    strengthen(model)
    state = runtime.scaler(run), small.store(len(labels)), labels, fixed.augment, 0
    return found(train.train_one_epoch(run, args, model, [optimizer, centres], *state), model)


def found(losses, model):
    """Losses, gradients and running statistics after a step."""
    model = log_folder.bare(model)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses, gradients, {name: b for name, b in model.named_buffers() if b.is_floating_point()}


def first_steps():
    """Of every form, one after the other: a start of processes costs more than a step."""
    steps = {name: first_pretrain_step(words) for name, words in PRETRAIN.items()}
    return steps | {name: first_finetune_step(words) for name, words in FINETUNE.items()}


@functools.cache
def on(world):
    return on_ranks(world, first_steps)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("form", [*PRETRAIN, *FINETUNE])
def test_first_step_does_not_depend_on_the_number_of_processes(form, world):
    losses, gradients, buffers = on(1)[0][form]
    assert len(gradients) > 20 and all(value > 0 for value in losses.values())
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
    for rank in on(world):
        others_losses, others_gradients, others_buffers = rank[form]
        assert others_losses == pytest.approx(losses, rel=1e-5) and others_gradients.keys() == gradients.keys()
        gap = torch.cat([(g - others_gradients[name]).flatten() for name, g in gradients.items()]).norm()
        assert gap <= 1e-5 * norm
        torch.testing.assert_close(others_buffers, buffers, rtol=1e-5, atol=1e-6)


def refused():
    """What both scripts say on this number of processes, with data that do not exist."""
    said = []
    for main, args in ((train.main, small.finetune_args()), (pretrain.main, small.pretrain_args())):
        args.data_dir = "nowhere"
        with pytest.raises(ValueError) as error:
            main(args)
        said.append(str(error.value))
    return said


def test_numbers_of_processes_that_do_not_divide_the_batch_are_refused_before_the_data_are_read():
    finetuning, pretraining = on_ranks(3, refused)[0]
    assert "batch of 4 identities x 3 = 12 images does not split over 3 ranks; nearest batch sizes" in finetuning
    assert "--batch-size 8 does not split over 3 processes; nearest: 6" in pretraining


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("words", [(), ("--centroid", "ctl", "--amp", "bf16"), ("--preset", "authors"), None])
def test_a_step_does_not_wait_for_the_gpu(words):
    modes = iter(["default", "error", "default"])  # of three steps, the second is watched

    def augment(pixels, generator):
        torch.cuda.set_sync_debug_mode(next(modes))
        return transforms.normalize(pixels)

    if words is None:
        args, number = small.pretrain_args(), 24
        run = runtime.start(args, "prsnet")
        model, *others = pretrain.build(args, run, 3)
        state = *others, runtime.scaler(run), small.store(number), augment, 0
        losses = pretrain.train_one_epoch(run, args, model, *state)
    else:
        args, labels = small.finetune_args(*words, "--iters", "3", "--batch-size", "12"), torch.arange(6).repeat(9)
        run = runtime.start(args, "prsnet")
        model, optimizer, centres, _ = train.build(args, run, 6, "market")
        state = [optimizer, centres], runtime.scaler(run), small.store(len(labels)), labels, augment, 0
        losses = train.train_one_epoch(run, args, model, *state)
    assert next(modes, None) is None and all(np.isfinite(value) for value in losses.values())
