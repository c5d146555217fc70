"""aff_scl.losses.Memory: Eqs. (10), (12), (13) against loops, its start of an epoch and its bookkeeping."""

import pytest
import torch
import torch.nn.functional as F
from test_aff_scl_equations import dot, normalised, setting, slow_update, unit

from aff_scl.losses import Memory, symmetric_contrast


# ------------------------------------------------------------------------------------------------ Eqs. (10), (12), (13)
@pytest.mark.parametrize("hard_ref", ["mean", "hard"])
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.9])
def test_update_equals_loop_over_identities(momentum, hard_ref):
    memory, q, labels = setting(momentum=momentum, hard_ref=hard_ref)
    means, hards = slow_update(memory, q, labels)
    before = memory.means.clone(), memory.hards.clone()
    memory.update(q, labels)
    assert torch.allclose(memory.means, torch.tensor(means), atol=1e-6)
    assert torch.allclose(memory.hards, torch.tensor(hards), atol=1e-6)
    absent = [0, 2, 5]
    assert torch.equal(memory.means[absent], before[0][absent]) and torch.equal(memory.hards[absent], before[1][absent])
    for rows in (memory.means, memory.hards):
        assert torch.allclose(rows.norm(dim=1), torch.ones(6))


def test_hard_sample_is_the_least_similar_to_the_mean_before_the_update():
    mean, hard = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    q = F.normalize(torch.tensor([[1.0, 0.1], [0.1, 1.0], [1.0, -1.0]]))
    by_mean, by_hard = Memory(mean, hard, 0.0), Memory(mean, hard, 0.0, "hard")
    for memory in (by_mean, by_hard):
        memory.update(q[None], torch.zeros(1, 3, dtype=torch.int64))
    assert torch.allclose(by_mean.hards[0], q[1]) and torch.allclose(by_hard.hards[0], q[2])


@pytest.mark.parametrize("labels", [[[0, 0], [0, 0]], [[0, 1], [2, 2]]])
def test_a_batch_that_is_not_identity_after_identity_is_refused(labels):
    memory = Memory(unit(3, 8), unit(3, 8))
    with pytest.raises(ValueError, match="one identity, and no two rows the same"):
        memory.update(unit(2, 2, 8), torch.tensor(labels))
    with pytest.raises(ValueError, match=r"expected q \(P, K, D\)"):
        memory.update(unit(4, 8), torch.tensor([0, 0, 1, 1]))


def test_ties_go_to_the_first_image():
    q = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, -1.0, 0.0]])  # all at similarity 0 to the mean
    memory = Memory(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]]), 0.0)
    memory.update(q[None], torch.zeros(1, 3, dtype=torch.int64))
    assert torch.equal(memory.hards[0], q[0])


def test_order_of_identities_and_of_their_images_does_not_matter():
    (one, q, labels), (two, _, _) = setting(), setting()
    one.update(q, labels)
    two.update(q[[2, 0, 1]][:, [3, 1, 0, 2]], labels[[2, 0, 1]])
    assert torch.allclose(one.means, two.means, atol=1e-7) and torch.equal(one.hards, two.hards)


def test_a_loss_can_be_differentiated_after_the_update():
    memory, q, labels = setting()
    leaf = q.clone().requires_grad_()
    expected = torch.autograd.grad(symmetric_contrast(leaf, labels, memory)[0], leaf)[0]
    loss, _ = symmetric_contrast(leaf, labels, memory)
    memory.update(leaf, labels)
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], expected)
    assert not memory.means.requires_grad and not memory.hards.requires_grad


def test_training_on_fixed_labels_lowers_the_loss():
    memory, q, labels = setting(size=16)
    leaf = q.clone().requires_grad_()
    optimizer, values = torch.optim.SGD([leaf], lr=0.2), []
    for _ in range(20):
        optimizer.zero_grad()
        rows = F.normalize(leaf, dim=-1)
        loss, _ = symmetric_contrast(rows, labels, memory)
        loss.backward()
        optimizer.step()
        memory.update(rows, labels)
        values.append(loss.item())
    assert values[-1] < 0.5 * values[0]


# --------------------------------------------------------------------------------------------------- start of an epoch
def test_memories_start_at_the_unit_means_of_the_clusters():
    feats, labels = unit(20, 8), torch.tensor([2, 0, -1, 1, 1] * 4)
    memory = Memory.from_features(feats, labels)
    for i in range(3):
        members = [row for row, label in zip(feats.tolist(), labels.tolist()) if label == i]
        expected = torch.tensor(normalised([sum(column) for column in zip(*members)]))
        assert torch.allclose(memory.means[i], expected, atol=1e-6) and torch.equal(memory.means[i], memory.hards[i])


def test_hardest_start_is_the_member_farthest_from_the_mean():
    feats, labels = unit(20, 8), torch.tensor([2, 0, -1, 1, 1] * 4).numpy()
    memory = Memory.from_features(feats, labels, hard_init="hardest")
    for i in range(3):
        members = [row for row, label in zip(feats.tolist(), labels.tolist()) if label == i]
        expected = min(members, key=lambda row: dot(row, memory.means[i].tolist()))
        assert torch.allclose(memory.hards[i], torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("labels, options, message", [
    ([0, 0, 2, 2], {}, r"without a feature: \[1\]"),
    ([0, 0, 1, 1], {"num_classes": 3}, r"without a feature: \[2\]"),
    ([0, 0, 1, 5], {"num_classes": 2}, "outside it"),
    ([-1, -1, -1, -1], {}, "no labels"),
    ([-2, 0, 0, 0], {}, "outside it"),
    ([0, 1], {}, "expected feats"),
    ([0, 0, 1, 1], {"hard_init": "first"}, "hard_init"),
    ([0, 0, 1, 1], {"hard_ref": "centre"}, "hard_ref"),
    ([0, 0, 1, 1], {"momentum": 1.5}, "momentum"),
])  # fmt: skip
def test_impossible_memories_are_refused(labels, options, message):
    with pytest.raises(ValueError, match=message):
        Memory.from_features(unit(4, 8), torch.tensor(labels), **options)


def test_features_that_are_not_finite_are_refused():
    feats = unit(4, 8)
    feats[2, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        Memory.from_features(feats, torch.tensor([0, 0, 1, 1]))


def test_joint_memory_puts_the_source_first_and_gives_it_back():
    source = Memory(unit(3, 8), unit(3, 8, seed=1), 0.2, "hard")
    target = Memory(unit(4, 8, seed=2), unit(4, 8, seed=3), 0.2, "hard")
    joint = Memory.join(source, target)
    assert len(joint) == 7 and (joint.momentum, joint.hard_ref) == (0.2, "hard")
    q, labels = unit(2, 2, 8, seed=4), torch.tensor([[0, 0], [1, 1]])
    joint.update(q, labels + len(source))
    target.update(q, labels)
    assert torch.equal(joint.means[3:], target.means) and torch.equal(joint.hards[3:], target.hards)
    back = joint[: len(source)]
    assert torch.equal(back.means, source.means) and torch.equal(back.hards, source.hards)
    joint.means[0] = 0.0
    assert torch.equal(back.means, source.means)


def test_a_memory_survives_a_checkpoint_to_the_bit(tmp_path):
    memory, q, labels = setting()
    memory.update(q, labels)
    torch.save(memory.state_dict(), tmp_path / "memory.pt")
    again = Memory(**torch.load(tmp_path / "memory.pt", weights_only=True), momentum=0.1)
    assert torch.equal(again.means, memory.means) and torch.equal(again.hards, memory.hards)
