"""The network of ConvNeXt-AP: counts to the printed digit, pooling, stages, descriptors, weights, what is refused."""

import functools
import json

import pytest
import torch
from conftest import ROOT, script
from torchvision import models

from convnext_ap import complexity
from convnext_ap.model import (
    ConvNeXtAP,
    Embedding,
    Heads,
    PartClassifier,
    check_size,
    name_of,
    stripes,
    unit,  # fmt: skip
)

measure = functools.cache(complexity.measure)
FOUR = {"ConvNeXt": ("none", 0), "ConvNeXt-A": ("dw", 0), "ConvNeXt-P": ("none", 6), "ConvNeXt-AP": ("dw", 6)}


def tiny(attention="dw", parts=4, **options):
    torch.manual_seed(0)
    return ConvNeXtAP(5, "tiny", attention, parts, drop_path=0.0, **options)


def images(n=4, height=128, width=64):
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------------------------------------- Tables 2-4


@pytest.mark.parametrize("name", FOUR)
def test_tables_2_to_4_come_out_to_the_printed_digit(name):
    row = measure(256, 128, 751, "base", *FOUR[name])
    assert row.name == name
    params = "88.00" if FOUR[name][1] == 0 else "90.74"
    assert (f"{row.params / 1e6:.2f}", f"{row.flops / 1e9:.2f}") == (params, "10.04")
    assert row.exact_params == (88_020_335 if FOUR[name][1] == 0 else 90_761_993)


def test_the_baselines_count_is_the_sum_written_out():
    """Stem, downsampling, depthwise convolutions, MLPs, norms, head, pool: 3,047,424 positions of all blocks."""
    blocks = 3 * 262_144 + 3 * 131_072 + 27 * 65_536 + 3 * 32_768
    assert blocks == 3_047_424
    flops = 12_582_912 + 3 * 67_108_864 + 49 * blocks + 9_663_676_416 + 4 * blocks + 454_400 + 4 * 256 + 33 * 1024
    assert measure(256, 128, 751, "base", "none", 0).flops == flops == 10_039_588_608


def test_simam_adds_no_parameters_and_only_shows_in_the_exact_count():
    plain, attentive = (measure(256, 128, 751, "base", a, 0) for a in ("none", "dw"))
    assert attentive[1:4] == (*plain[1:3], plain.exact_params) and attentive.exact_macs == plain.exact_macs
    assert 5 * 3_047_424 < attentive.exact_flops - plain.exact_flops < 12 * 3_047_424


def test_multiply_adds_of_a_torchvision_convnext():
    """The trunk's products are those of torchvision's model, counted by PyTorch itself."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model, x = models.convnext_base(), torch.empty(1, 3, 256, 128)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.features(x)
    head = 1024 * 256 + 256 * 751
    assert measure(256, 128, 751, "base", "none", 0).exact_macs == counter.get_total_flops() // 2 + head


def test_complexity_prints_json():
    done = script(ROOT / "convnext_ap/complexity.py", "--json", cwd="/")
    rows = json.loads(done.stdout)
    assert [row["name"] for row in rows] == list(FOUR)
    assert all({"params", "flops", "exact_params", "exact_flops", "exact_macs"} < set(row) for row in rows)
    assert [round(row["flops"] / 1e9, 2) for row in rows] == [10.04] * 4


def test_duke_and_cuhk03_would_print_other_digits():
    printed = [f"{measure(256, 128, k, 'base', 'none', p).params / 1e6:.2f}" for k, p in ((702, 0), (702, 6), (767, 6))]
    assert printed == ["87.99", "90.65", "90.77"]
    assert complexity.PAPER["ConvNeXt-AP"] == (90.74, 10.04)


# ------------------------------------------------------------------------------------------------------------- pooling


def test_six_stripes_of_eight_rows_are_two_rows_each():
    fmap = torch.arange(8.0).view(1, 1, 8, 1).expand(1, 2, 8, 4)
    windows = [(0, 1), (1, 2), (2, 3), (4, 5), (5, 6), (6, 7)]
    assert stripes(fmap, 6)[0, :, 0].tolist() == [sum(w) / 2 for w in windows]
    assert stripes(fmap, 6).shape == (1, 6, 2)


@pytest.mark.parametrize("height, parts", [(8, 6), (12, 6), (8, 4), (7, 3), (4, 4), (5, 1)])
def test_stripes_are_adaptive_average_pooling_without_its_indeterminate_gradient(height, parts):
    fmap = torch.randn(2, 3, height, 4).requires_grad_()
    ours, theirs = stripes(fmap, parts), torch.nn.functional.adaptive_avg_pool2d(fmap, (parts, 1))[..., 0].mT
    weights = torch.randn(2, parts, 3)
    (a,), (b,) = (torch.autograd.grad((x * weights).sum(), fmap) for x in (ours, theirs))
    assert torch.allclose(ours, theirs, atol=1e-6) and torch.allclose(a, b, atol=1e-6)
    with torch.profiler.profile() as seen:
        stripes(fmap, parts)
    assert not [event.key for event in seen.key_averages() if "adaptive" in event.key]


def test_eq1_and_eq2_equal_loops_over_positions():
    pool, fmap = PartClassifier(5, 3).double(), torch.randn(2, 5, 4, 2, dtype=torch.float64)
    torch.nn.init.normal_(pool.conv.weight)
    expected = torch.zeros(2, 3, 5, dtype=torch.float64)
    for b in range(2):
        for y in range(4):
            for x in range(2):
                f = fmap[b, :, y, x]
                scores = [float(torch.exp(pool.conv.weight[i, :, 0, 0].detach() @ f)) for i in range(3)]
                for i in range(3):
                    expected[b, i] += scores[i] / sum(scores) * f * 3 / 8
    assert torch.allclose(pool(fmap), expected, atol=1e-12)


def test_with_w_zero_every_part_is_the_global_mean():
    pool, fmap = PartClassifier(16, 6), torch.randn(3, 16, 8, 4)
    torch.nn.init.zeros_(pool.conv.weight)
    assert torch.allclose(pool(fmap), fmap.mean((2, 3))[:, None].expand(-1, 6, -1), atol=1e-6)


def test_with_equal_shares_of_the_map_parts_are_stripe_means():
    """The first p channels say which stripe a position is in, and W reads them with certainty."""
    fmap = torch.randn(2, 10, 8, 4)
    fmap[:, :4] = torch.eye(4).repeat_interleave(2, 1)[None, :, :, None]  # rows 0, 1 -> part 0, ...
    pool = PartClassifier(10, 4)
    torch.nn.init.zeros_(pool.conv.weight)
    pool.conv.weight.data[:, :4, 0, 0] = 100 * torch.eye(4)
    assert torch.allclose(pool(fmap), stripes(fmap, 4), atol=1e-5)


def test_probabilities_of_the_parts_sum_to_one():
    share = PartClassifier(16, 6).probabilities(torch.randn(2, 16, 8, 4))
    assert share.shape == (2, 6, 8, 4) and torch.allclose(share.sum(1), torch.ones(2, 8, 4))


# --------------------------------------------------------------------------------------------------- heads, descriptors


def test_batched_heads_equal_separate_linear_layers():
    torch.manual_seed(0)
    heads, pooled = Heads(3, 8, 4, dropout=0.0), torch.randn(6, 3, 8)
    feats, logits = heads(pooled)
    for i in range(3):
        h = torch.nn.functional.linear(pooled[:, i], heads.reduce[i].T, heads.reduce_bias[i])
        part = slice(256 * i, 256 * (i + 1))
        h = torch.nn.functional.batch_norm(h, None, None, heads.norm.weight[part], heads.norm.bias[part], training=True)
        assert torch.allclose(feats[:, i], h, atol=1e-5)
        expected = torch.nn.functional.linear(h, heads.classify[i].T, heads.classify_bias[i])
        assert torch.allclose(logits[:, i], expected, atol=1e-5)


@pytest.mark.parametrize("parts, sizes", [(0, (256, 192)), (4, (5 * 256, 5 * 192))])
def test_descriptors_have_unit_length_and_their_sizes(parts, sizes):
    model = tiny(parts=parts).eval()
    embedding = Embedding(model)
    found = embedding.descriptors(embedding(images()))
    assert tuple(x.shape[1] for x in found.values()) == sizes
    assert all(torch.allclose(x.norm(dim=1), torch.ones(4)) for x in found.values())
    assert torch.allclose(found["H"], model(images()), atol=1e-6)


def test_paper_sizes_of_the_descriptors():
    with torch.device("meta"):
        model = ConvNeXtAP(751)
    out = model.encode(torch.empty(2, 3, 256, 128, device="meta"))
    assert out.feats.flatten(1).shape == (2, 1792) and out.pooled.flatten(1).shape == (2, 7168)
    assert model.feature_map(torch.empty(2, 3, 256, 128, device="meta")).shape == (2, 1024, 8, 4)


def test_every_piece_of_a_descriptor_has_the_same_say():
    pieces = torch.randn(2, 4, 8) * torch.tensor([1.0, 10, 100, 1000])[None, :, None]
    x = unit(pieces)
    cosines = [torch.nn.functional.cosine_similarity(pieces[0, i], pieces[1, i], 0) for i in range(4)]
    assert (x[0] @ x[1]).item() == pytest.approx(sum(cosines).item() / 4, abs=1e-6)


# -------------------------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("attention, calls", [("none", 0), ("dw", 6), ("mlp", 6), ("branch", 6)])
def test_simam_runs_once_in_every_block(monkeypatch, attention, calls):
    from convnext_ap import model as module

    seen = []
    monkeypatch.setattr(module, "simam", lambda x: seen.append(x.shape) or x)
    tiny(attention, 0).eval()(images(1))
    assert len(seen) == calls and all(len(shape) == 4 for shape in seen)
    if calls:
        assert seen[0] == (1, 24, 32, 16) and seen[-1] == (1, 192, 4, 2)  # channels second, whatever the position


def test_the_base_trunk_has_36_blocks_and_without_simam_is_torchvisions():
    with torch.device("meta"):
        ours, theirs = ConvNeXtAP(2, "base", "none", 0).trunk, models.convnext_base().features
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert sum(type(m).__name__ == "Block" for m in ours.modules()) == 36
    probabilities = [m.p for m in ours.modules() if type(m).__name__ == "StochasticDepth"]
    assert probabilities[0] == 0 and probabilities[-1] == pytest.approx(0.2)


def test_without_simam_a_block_computes_what_torchvisions_does():
    ours = tiny("none", 0).eval().trunk
    sizes = ((24, 48, 1), (48, 96, 1), (96, 192, 3), (192, None, 1))
    theirs = models.ConvNeXt([models.convnext.CNBlockConfig(*size) for size in sizes]).eval().features
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(images(1)), theirs(images(1)))


# -------------------------------------------------------------------------------------------------------------- stages


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def train_steps(model, n=2):
    from convnext_ap.losses import total_loss

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    labels = torch.tensor([0, 0, 1, 1])
    model.train()
    for _ in range(n):
        out = model(images())
        optimizer.zero_grad()
        total_loss(out.logits, out.feats, labels, only_parts=model.stage == "assign").total.backward()
        optimizer.step()
    return snapshot(model)


def test_the_frozen_stage_changes_only_w_and_no_statistics():
    model = tiny()
    train_steps(model)
    before = snapshot(model)
    model.set_stage("assign")
    after = train_steps(model)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"assign.conv.weight"}
    model.set_stage("joint")
    last = train_steps(model)
    unchanged = {key for key in after if torch.equal(after[key], last[key])}
    assert unchanged == set()


def test_the_first_stage_leaves_w_alone():
    model = tiny()
    before = snapshot(model)["assign.conv.weight"]
    assert torch.equal(before, train_steps(model)["assign.conv.weight"])


def test_the_frozen_stage_stays_frozen_through_an_evaluation():
    model = tiny()
    model.set_stage("assign")
    model.train()
    model.eval()
    model.train()
    assert model.training and not any(m.training for part in (model.trunk, model.heads) for m in part.modules())


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("size, message", [
    ((128, 64, "dw", 6), r"6 parts do not fit the 4x2 map of a 128x64 input.*--parts 4 or fewer, or --height 192"),
    ((32, 32, "dw", 0), r"SimAM .* single position: use --height 64 or more, or --simam none"),
    ((31, 64, "none", 0), "too small: the trunk divides both sides by 32")])  # fmt: skip
def test_sizes_that_do_not_work_are_refused_with_the_remedy(size, message):
    with pytest.raises(ValueError, match=message):
        check_size(*size)
    check_size(32, 32, "none", 0)


def test_the_model_itself_refuses_a_map_with_fewer_rows_than_parts():
    with pytest.raises(ValueError, match="4 parts do not fit the 3x2 map"):
        tiny(parts=4)(images(1, 96, 64))
    with pytest.raises(ValueError, match="SimAM"):
        tiny(parts=0).eval()(images(1, 32, 32))


def test_stages_and_arguments_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="stage 'assign' of ConvNeXt-A"):
        tiny(parts=0).set_stage("assign")
    with pytest.raises(ValueError, match="trunk 'huge'"):
        ConvNeXtAP(5, "huge")
    assert [name_of(*variant) for variant in FOUR.values()] == list(FOUR)
