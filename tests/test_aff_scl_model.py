"""aff_scl.model: sizes, equations (1)-(6), batch-statistics groups and domains, weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aff_scl.model import AFF, CASAM, SE, GeM, PerHalf, SplitAttention, convert_dsbn
from common.batchnorm import over_groups


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)


def small(arch="aff", **options):
    return AFF(arch, backbone="resnet18", **options)


def picture(batch=4, height=64, width=32):
    return torch.randn(batch, 3, height, width)


def count(**options):
    with torch.device("meta"):
        return sum(weight.numel() for weight in AFF(**options).parameters())


# ---------------------------------------------------------------------------------------------------------------- sizes
@pytest.mark.parametrize("options, expected", [
    (dict(), 26_699_938),
    (dict(gate="softmax"), 26_699_938),
    (dict(post="relu"), 26_695_842),
    (dict(cam="se", casam_reduction=16), 24_302_754),
    (dict(arch="base"), 23_512_128),
    (dict(arch="base", neck="none"), 23_508_032),
    (dict(arch="g"), 23_544_994),
    (dict(arch="l"), 26_667_072),
    (dict(swap=True), 23_508_032 + 2 * 2048 * 128 + 2 * (2 * 1024 * 4 + 98) + 2 * 4096),
    (dict(num_classes=751), 26_699_938 + 751 * 2048),
])  # fmt: skip
def test_parameter_counts_to_the_unit(options, expected):
    assert count(**options) == expected


@pytest.mark.parametrize("backbone, channels", [("resnet18", 512), ("resnet34", 512), ("resnet50", 2048)])
@pytest.mark.parametrize("options", [dict(), dict(cam="se"), dict(swap=True)])
def test_map_is_16x8_and_sizes_follow_the_channels(backbone, channels, options):
    with torch.device("meta"):
        model = AFF(backbone=backbone, **options).eval()
        images = torch.empty(2, 3, 256, 128)
        assert model.feature_map(images).shape == (2, channels, 16, 8)
        assert model(images).shape == (2, channels) and model.feature_size == channels


def test_hidden_widths_scale_and_never_vanish():
    assert small().global_branch.mlp[0].weight.shape == (2, 512, 1, 1)
    assert small(casam_reduction=4096).global_branch.mlp[0].weight.shape == (1, 512, 1, 1)
    assert small(cam="se", cam_reduction=1024).local_branch.halves[0].mlp[0].weight.shape == (1, 256, 1, 1)


@pytest.mark.parametrize("options, name", [
    (dict(arch="global"), "arch"), (dict(backbone="vgg16"), "backbone"), (dict(cam="cbam"), "cam"),
    (dict(gate="relu"), "gate"), (dict(post="gelu"), "post"), (dict(pool="max"), "pool"), (dict(neck="fc"), "neck"),
    (dict(pool="gem"), "non-negative"),
])  # fmt: skip
def test_unknown_options_are_named(options, name):
    with pytest.raises(ValueError, match=name):
        AFF(**{"backbone": "resnet18", **options})


# ------------------------------------------------------------------------------------------------------------ equations
def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def spread(module):
    """Large weights, so that gates differ visibly from 0.5."""
    for weight in module.parameters():
        nn.init.normal_(weight, std=0.3)
    return module.eval()


def test_casam_equals_equations_1_to_4():
    module, x = spread(CASAM(16, 4)), torch.randn(2, 16, 5, 3)
    w0, w1 = module.mlp[0].weight[:, :, 0, 0], module.mlp[2].weight[:, :, 0, 0]
    expected = torch.empty_like(x)
    for n in range(2):
        strongest = torch.stack([x[n, c].max() for c in range(16)])
        average = torch.stack([x[n, c].mean() for c in range(16)])
        f_c = sigmoid(w1 @ (w0 @ strongest).clamp(min=0) + w1 @ (w0 @ average).clamp(min=0))  # Eq. (1)
        f1 = x[n] * f_c[:, None, None]  # Eq. (2)
        padded = F.pad(torch.stack([f1.max(0).values, f1.mean(0)]), (3, 3, 3, 3))
        for i in range(5):
            for j in range(3):
                f_s = sigmoid((padded[:, i : i + 7, j : j + 7] * module.conv.weight[0]).sum())  # Eq. (3)
                expected[n, :, i, j] = f1[:, i, j] * f_s  # Eq. (4)
    assert torch.allclose(module(x), expected, atol=1e-6)


def test_se_equals_equations_5_and_6():
    module, x = spread(SE(12, 4)), torch.randn(2, 12, 5, 3)
    w1, w2 = module.mlp[0].weight[:, :, 0, 0], module.mlp[2].weight[:, :, 0, 0]
    for n in range(2):
        gate = sigmoid(w2 @ (w1 @ x[n].flatten(1).mean(1)).clamp(min=0))
        assert torch.allclose(module(x)[n], x[n] * gate[:, None, None], atol=1e-6)


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_split_attention_weighs_both_halves_from_one_squeeze(gate):
    module, x = spread(SplitAttention(12, gate)), torch.randn(2, 12, 5, 3)
    conv1, norm, _, conv2 = module.mlp
    for n in range(2):
        s = (x[n, :6] + x[n, 6:]).flatten(1).mean(1)
        hidden = conv1.weight[:, :, 0, 0] @ s + conv1.bias
        hidden = (hidden - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
        logits = conv2.weight[:, :, 0, 0] @ hidden.clamp(min=0) + conv2.bias
        if gate == "sigmoid":
            weights = sigmoid(logits)
        else:
            first, second = logits[:6].exp(), logits[6:].exp()
            weights = torch.cat([first, second]) / (first + second).repeat(2)
        assert torch.allclose(module(x)[n], x[n] * weights[:, None, None], atol=1e-6)


def test_branches_follow_figure2():
    model, x = small(post="relu").eval(), picture()
    spread(model.global_branch), spread(model.local_branch)
    trunk = model.backbone(x)
    expected = model.local_branch(trunk + model.global_branch(trunk)).relu()
    assert isinstance(model.global_branch, CASAM) and isinstance(model.local_branch, SplitAttention)
    assert torch.equal(model.feature_map(x), expected)


def test_arch_and_swap_choose_the_branches():
    kinds = {arch: small(arch) for arch in ("base", "g", "l")}
    assert kinds["base"].global_branch is kinds["base"].local_branch is kinds["base"].post is None
    assert isinstance(kinds["g"].global_branch, CASAM) and kinds["g"].local_branch is kinds["g"].post is None
    assert kinds["l"].global_branch is None and isinstance(kinds["l"].local_branch, SplitAttention)
    swapped = small(swap=True)
    assert isinstance(swapped.global_branch, SE) and isinstance(swapped.local_branch, PerHalf)
    assert [type(half) for half in swapped.local_branch.halves] == [CASAM, CASAM]
    weights = [half.conv.weight.data_ptr() for half in swapped.local_branch.halves]
    assert weights[0] != weights[1]


@pytest.mark.parametrize("options", [dict(), dict(cam="se"), dict(swap=True)])
def test_gates_are_half_open_at_the_start(options):
    model, gates = small(**options), []
    for module in model.modules():
        if isinstance(module, nn.Sigmoid):
            module.register_forward_hook(lambda _, __, output: gates.append(output))
    model(picture(8))
    assert gates and all((gate - 0.5).abs().max() < 0.05 for gate in gates)


def test_pooled_and_feature_are_what_they_say():
    model, x = small(num_classes=5).train(), picture()
    output = model(x)
    assert output.feat.shape == output.pooled.shape == (4, 512) and output.logits.shape == (4, 5)
    z = copy.deepcopy(model).feature_map(x)
    assert torch.allclose(output.pooled, z.mean((2, 3)), atol=1e-5)
    centred = (output.pooled - output.pooled.mean(0)) / (output.pooled.var(0, unbiased=False) + 1e-5).sqrt()
    assert torch.allclose(output.feat, F.normalize(centred), atol=1e-4)
    assert torch.allclose(output.logits, centred @ model.classifier.weight.T, atol=1e-4)


def test_neck_none_uses_the_pooled_feature():
    model = small(neck="none", num_classes=3)
    output = model(picture())
    assert torch.allclose(output.feat, F.normalize(output.pooled))
    assert model.classifier.bias.ne(0).all()  # reid-strong-baseline's: a bias, and not the small start of BNNeck's
    assert torch.allclose(output.logits, output.pooled @ model.classifier.weight.T + model.classifier.bias, atol=1e-6)


def test_gem_is_the_power_mean():
    x = torch.rand(2, 3, 4, 2)
    assert torch.allclose(GeM()(x)[:, :, 0, 0], (x**3).mean((2, 3)) ** (1 / 3), atol=1e-6)
    dark, gem = torch.zeros(1, 3, 4, 2, dtype=torch.float16, requires_grad=True), GeM()
    gem(dark).sum().backward()
    assert torch.isfinite(dark.grad).all() and torch.isfinite(gem.p.grad).all()
    assert small("base", pool="gem").eval()(picture()).shape == (4, 512)


@pytest.mark.parametrize("arch", ["aff", "base"])
def test_rows_have_unit_length_in_float32_even_under_autocast(arch):
    model = small(arch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = [model.train()(picture()), model.eval()(picture())]
    for feats in outputs:
        assert feats.dtype == torch.float32 and torch.allclose(feats.norm(dim=1), torch.ones(4), atol=1e-6)


@pytest.mark.parametrize("options", [dict(), dict(cam="se"), dict(swap=True, post="relu", pool="gem"), dict(arch="g"),
                                     dict(arch="l"), dict(arch="base")])  # fmt: skip
def test_every_trainable_parameter_gets_a_gradient_and_shifts_stay_frozen(options):
    model = small(num_classes=3, **options)
    output = model(picture())
    (output.logits.square().sum() + output.pooled.sum() + output.feat[:, 0].sum()).backward()
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    expected = {"neck.bias"} | ({"post.bias"} if isinstance(model.post, nn.BatchNorm2d) else set())
    assert frozen == expected and model.neck.bias.eq(0).all()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


def test_classifier_can_be_renewed_and_removed():
    model, rows = small(), F.normalize(torch.randn(7, 512))
    model.set_classifier(rows)
    assert torch.equal(model.classifier.weight, rows) and model.classifier.bias is None
    assert model.classifier.weight.requires_grad and model(picture()).logits.shape == (4, 7)
    model.set_classifier(None)
    assert model(picture()).shape == (4, 512) and not any("classifier" in key for key in model.state_dict())


# -------------------------------------------------------------------------------------------- batch-statistics groups
@pytest.mark.parametrize("groups", [2, 4])
def test_groups_equal_separate_forward_passes_and_move_statistics_by_their_mean(groups):
    plain, x = small(), picture(8)
    grouped = over_groups(copy.deepcopy(plain), 1, groups)
    copies = [copy.deepcopy(plain) for _ in range(groups)]
    separate = torch.cat([model(chunk) for model, chunk in zip(copies, x.chunk(groups))])
    assert torch.allclose(grouped(x), separate, atol=1e-5)
    assert not torch.allclose(separate, plain(x), atol=1e-3)
    for key, value in grouped.state_dict().items():
        if "running" in key:
            assert torch.allclose(value, torch.stack([model.state_dict()[key] for model in copies]).mean(0), atol=1e-5)


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match=r"batch of 0 does not divide into 1 domain\(s\)"):
        small()(picture(0))
    with pytest.raises(ValueError, match=r"batch of 3 does not divide into 2 domain\(s\)"):
        small()(picture(3), domain=(0, 1))


# -------------------------------------------------------------------------------------------------------------- domains
def statistics(model, domain):
    return {key: value.clone() for key, value in model.state_dict().items() if f"copies.{domain}.running" in key}


def changed(before, after):
    return [not torch.equal(before[key], after[key]) for key in before]


def test_dsbn_routes_statistics_to_the_domain_that_ran():
    model = convert_dsbn(small())
    source, target = statistics(model, 0), statistics(model, 1)
    assert len(source) == len(target) == 2 * 23  # 20 in ResNet-18, split attention, post, neck: mean and variance
    model(picture(), domain=0)
    assert all(changed(source, statistics(model, 0))) and not any(changed(target, statistics(model, 1)))
    source = statistics(model, 0)
    model(picture(), domain=1)
    assert all(changed(target, statistics(model, 1))) and not any(changed(source, statistics(model, 0)))


def test_dsbn_starts_from_the_plain_model_and_evaluates_on_the_target():
    plain, x = small().eval(), picture()
    model = convert_dsbn(copy.deepcopy(plain)).eval()
    assert torch.equal(model(x), plain(x))
    model.train()(x, domain=0)
    assert torch.equal(model.eval()(x), plain(x))  # only the source copy moved
    assert torch.equal(model(x), model(x, domain=1)) and not torch.equal(model(x), model(x, domain=0))
    frozen = [key for key, weight in model.named_parameters() if not weight.requires_grad]
    assert frozen == [f"{name}.copies.{d}.bias" for name in ("post", "neck") for d in (0, 1)]


@pytest.mark.parametrize("dsbn", [True, False])
def test_a_tuple_of_domains_equals_one_pass_per_domain(dsbn):
    joint = over_groups(convert_dsbn(small()) if dsbn else small(), 1, groups=2)
    single, x = copy.deepcopy(joint), picture(8)
    separate = torch.cat([single(x[:4], domain=0), single(x[4:], domain=1)])
    assert torch.equal(joint(x, domain=(0, 1)), separate)
    assert all(torch.equal(a, b) for a, b in zip(joint.state_dict().values(), single.state_dict().values()))


def test_one_joint_pass_uses_every_parameter():
    model = convert_dsbn(small())
    model(picture(8), domain=(0, 1))[:, 0].sum().backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


def test_dsbn_training_needs_a_domain():
    with pytest.raises(ValueError, match="domain"):
        convert_dsbn(small())(picture())


def test_converting_twice_changes_nothing():
    model = convert_dsbn(small())
    keys = list(model.state_dict())
    assert list(convert_dsbn(model).state_dict()) == keys
