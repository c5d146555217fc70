"""--weights of one project each: networks of its own, of its paper's authors, of other people or another form."""

import re
from argparse import Namespace

import numpy as np
import pytest
import torch
from torchvision import models
from weight_files import assert_started, moved, prefixed, save, tiny_convnext

from aff_scl import train as aff_scl_train
from aff_scl.model import AFF, convert_dsbn, load_backbone
from convnext_ap.model import ConvNeXtAP, load_trunk
from dapg import trunk
from pixel_sampling import model as pixel_sampling
from pixel_sampling import test as pixel_sampling_test
from prsnet.flags import weights_file
from prsnet.model import SIZES, Encoder, PRSNet
from prsnet.reid import load_pretrained

torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------------------------- aff_scl
def small(**options):
    return AFF(backbone="resnet18", **options)


def test_a_supervised_network_starts_training_on_other_people_and_without_labels(tmp_path, capsys):
    donor = small(num_classes=8)
    file = save({"state_dict": prefixed(donor.state_dict(), "module.")}, tmp_path)
    for people in (8, 6, 0):
        network = small(num_classes=people)
        load_backbone(network, file)
        for name, value in network.state_dict().items():
            same = (
                torch.equal(value, donor.state_dict()[name]) if value.shape == donor.state_dict()[name].shape else None
            )
            assert same is (None if people == 6 and name == "classifier.weight" else True), name
        line = capsys.readouterr().out
        assert "into the network" in line and ("1 left out: classifier.weight" in line) == (people != 8)
        assert ("; new: classifier.weight" in line) == (people == 6)


def test_of_a_network_of_another_form_the_trunk_is_taken(tmp_path, capsys):
    donor, network = small(cam="se"), small()
    load_backbone(network, save({"state_dict": donor.state_dict()}, tmp_path))
    assert torch.equal(network.backbone.conv1.weight, donor.backbone.conv1.weight)
    said = capsys.readouterr().out
    assert "into the trunk" in said and "new: {global_branch,local_branch,post,neck}.*" in said


def test_weights_of_one_domain_fill_every_copy_and_the_target_s_fill_a_model_without_copies(tmp_path):
    donor, copies = small(), convert_dsbn(small())
    load_backbone(copies, save(donor.state_dict(), tmp_path))
    x = torch.randn(4, 3, 64, 32)
    assert all(torch.equal(copies.eval()(x, domain), donor.eval()(x)) for domain in (0, 1))
    torch.nn.init.uniform_(copies.backbone.bn1.copies[0].weight)
    torch.nn.init.uniform_(copies.neck.copies[1].running_mean)
    file = save({"state_dict": copies.state_dict()}, tmp_path)
    again, plain = convert_dsbn(small()), small()
    load_backbone(again, file)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in copies.state_dict().items())
    load_backbone(plain, file)
    assert torch.equal(plain.eval()(x), copies.eval()(x, 1))
    words = ["--mode", "uda", "--source", "duke", "--backbone", "resnet18", "--weights", file]
    started = aff_scl_train.build(aff_scl_train.parse_args(words), Namespace(device="cpu"), 0)
    assert all(torch.equal(value, copies.state_dict()[name]) for name, value in started.state_dict().items())


def test_what_does_not_fit_leaves_the_network_as_it_was(tmp_path):
    state = models.resnet18().state_dict()
    state.pop("layer4.1.bn2.weight")
    network = small()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ValueError, match="1 of 100 tensors missing: layer4.1.bn2.weight"):
        load_backbone(network, save(state, tmp_path))
    load_backbone(network, "none")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


# ------------------------------------------------------------------------------------------------------ pixel_sampling
def authors(arch, own):
    """Names of the authors' networks: BoT and PCB have a plain ResNet, MGN numbers its parts, HPM has `features`."""
    if arch == "bot":
        return {k.replace("backbone.", "base.").replace("neck.", "bottleneck."): v for k, v in own.items()}
    if arch == "pcb":
        names = [("backbone.", ""), ("reduce.", "conv5.layers."), ("classifiers.", "classifier.")]
    elif arch == "hpm":
        names = [("backbone.", "features."), ("reductions.0.0.", "global_conv."), ("reductions.0.1.", "global_bn.")]
        names += [("classifiers.0.", "global_fc.")]
        for number, (level, part) in enumerate([(n, i) for n in (2, 4, 8) for i in range(n)], 1):
            names += [(f"reductions.{number}.0.", f"pcb{level}_conv_list.{part}.")]
            names += [(f"reductions.{number}.1.", f"pcb{level}_batchnorm_list.{part}.")]
            names += [(f"classifiers.{number}.", f"pcb{level}_fc_list.{part}.")]
    else:
        stem = [("conv1", 0), ("bn1", 1), ("layer1", 4), ("layer2", 5), ("layer3_0", 6)]
        names = [(f"stem.{ours}.", f"backone.{theirs}.") for ours, theirs in stem]
        names += [(f"branches.{i}.0.1.", f"p{i + 1}.0.0.") for i in range(3)]  # ResNet-18's layer3 has two blocks
        names += [(f"branches.{i}.1.", f"p{i + 1}.1.") for i in range(3)]
        heads = ["2048_0", "2048_1", "2048_2", "256_1_0", "256_1_1", "256_2_0", "256_2_1", "256_2_2"]
        for i, head in enumerate(heads):
            names += [(f"reductions.{i}.", f"reduction_{i}."), (f"classifiers.{i}.", f"fc_id_{head}.")]
    named = {}
    for key, value in own.items():
        ((ours, theirs),) = [(a, b) for a, b in names if key.startswith(a)]
        named[theirs + key[len(ours) :]] = value
    return named


@pytest.mark.parametrize("arch", ["bot", "pcb", "mgn", "hpm"])
def test_the_authors_networks_are_read_whole_and_other_people_start_anew(arch, tmp_path, capsys):
    donor = pixel_sampling.build(arch, 5, "resnet18")
    state = prefixed(authors(arch, donor.state_dict()), "module.")
    file = save({"state_dict": state, "epoch": 3, "best_acc": np.float64(0.5)}, tmp_path)
    capsys.readouterr()
    for people in (5, 9):
        network = pixel_sampling.build(arch, people, "resnet18", file)
        for name, value in network.state_dict().items():
            if people == 5 or "classifier" not in name:
                assert torch.equal(value, donor.state_dict()[name]), name
        (line,) = capsys.readouterr().out.splitlines()
        assert "into the network" in line and (people == 5 or "left out" in line and "new: classifier" in line)


@pytest.mark.parametrize("arch", pixel_sampling.ARCHS)
def test_a_trunk_reaches_every_branch_of_a_network_and_none_of_its_heads(arch, tmp_path):
    torch.manual_seed(1)
    resnet = models.resnet18()
    network = pixel_sampling.build(arch, 7, "resnet18", save(resnet.state_dict(), tmp_path))
    own = network.state_dict()
    given = {value.numpy().tobytes() for value in resnet.state_dict().values()}
    filled = {name for name, value in own.items() if value.numpy().tobytes() in given}
    copies = {"mgn": 3, "head_body": 2}.get(arch, 1)
    assert sum(name.endswith("1.conv2.weight") and own[name].shape[0] == 512 for name in filled) == copies
    trunk_names = [name for name in own if re.search(r"(^|\.)(backbone|stem|branches)\.", name)]
    assert set(trunk_names) <= filled and len(trunk_names) < len(own)


def test_bare_weights_are_evaluated_only_as_a_whole_network(tmp_path):
    donor = pixel_sampling.build("bot", 5)
    file = save(donor.state_dict(), tmp_path)
    network, _, _ = pixel_sampling_test.load_network(file, "bot")
    assert torch.equal(network.neck.weight, donor.neck.weight) and not network.training
    state = {name: value for name, value in donor.state_dict().items() if not name.startswith("neck.")}
    with pytest.raises(ValueError, match="a trunk without the rest of --arch bot"):
        pixel_sampling_test.load_network(save(state, tmp_path), "bot")


# ----------------------------------------------------------------------------------------------------- the other three
def convnext_authors(name):
    """A name of ours as in the release of ConvNeXt."""
    stage, _, rest = name.removeprefix("trunk.").partition(".")
    if name.startswith("final_norm."):
        return name.removeprefix("final_")
    if int(stage) % 2 == 0:
        return f"downsample_layers.{int(stage) // 2}.{rest}"
    layers = {
        "block.0": "dwconv",
        "block.2": "norm",
        "block.3": "pwconv1",
        "block.5": "pwconv2",
        "layer_scale": "gamma",
    }
    for ours, theirs in layers.items():
        rest = rest.replace(ours, theirs)
    return f"stages.{int(stage) // 2}.{rest}"


def convnext_timm(name):
    """A name in the release of ConvNeXt as in timm."""
    name = re.sub(r"^downsample_layers\.0\.", "stem.", name)
    name = re.sub(r"^downsample_layers\.(\d)\.", r"stages.\1.downsample.", name)
    name = re.sub(r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2.", name)
    name = name.replace("dwconv", "conv_dw").replace("pwconv", "mlp.fc")
    return re.sub(r"^norm\.", "head.norm.", name)


@pytest.mark.parametrize("program", ["authors", "timm"])
def test_convnext_is_read_by_the_names_of_its_authors_and_of_timm_with_its_last_norm(program, tmp_path):
    donor, network = (ConvNeXtAP(4, "tiny", "dw", 2, final_norm=True) for _ in range(2))
    torch.nn.init.uniform_(donor.final_norm.weight)
    for block in (m for m in donor.modules() if hasattr(m, "layer_scale")):
        torch.nn.init.uniform_(block.layer_scale)
    state = {}
    for name, value in donor.state_dict().items():
        if name.startswith(("trunk.", "final_norm.")):
            name = convnext_authors(name) if program == "authors" else convnext_timm(convnext_authors(name))
            state[name] = value.flatten() if name.endswith("gamma") else value
    state["head.weight" if program == "authors" else "head.fc.weight"] = torch.zeros(1000, 192)
    line = load_trunk(network, save({"model": state}, tmp_path))
    for name, value in network.state_dict().items():
        if name.startswith(("trunk.", "final_norm.")) or name in ("heads.reduce", "assign.conv.weight"):
            assert torch.equal(value, donor.state_dict()[name]) == name.startswith(("trunk.", "final_norm.")), name
    assert f"{len(state) - 1} tensors into the network" in line and "1 left out: head." in line


def test_a_convnext_of_ours_starts_another_with_the_same_blocks_only(tmp_path):
    donor = tiny_convnext("dw", 2)
    file = save({"state_dict": donor.state_dict(), "args": {"simam": "dw", "parts": 2}}, tmp_path)
    network = tiny_convnext("dw", 0, people=9)
    load_trunk(network, file)
    assert torch.equal(network.trunk[0][0].weight, donor.trunk[0][0].weight)
    with pytest.raises(ValueError, match=r"ConvNeXt-AP \(--simam dw --parts 2\), not of ConvNeXt \(--simam none"):
        load_trunk(tiny_convnext(), file)
    with pytest.raises(ValueError, match="no ImageNet weights for --trunk tiny"):
        load_trunk(network, "imagenet")


def test_prsnet_starts_from_a_fine_tuning_and_but_for_the_projection_from_a_pre_training(tmp_path):
    size = SIZES["tiny"]
    whole, bare = PRSNet(64, 32, "plain", size, 64), PRSNet(64, 32, "plain", size, size.dims[-1])
    tuned = prefixed(whole.encoder.state_dict(), "encoder.") | {"classifier.weight": torch.zeros(3, 64)}
    for content in ({"state_dict": tuned}, whole.encoder.state_dict()):
        encoder = Encoder("plain", size, 64)
        load_pretrained(encoder, save(content, tmp_path), {})
        assert_started(encoder.state_dict(), whole.encoder.state_dict())
    for network in (whole, bare):
        encoder = Encoder("plain", size, 64)
        before = encoder.proj.weight.clone()
        load_pretrained(encoder, save({"state_dict": network.state_dict()}, tmp_path), {})
        assert torch.equal(encoder.proj.weight, before)
        assert_started(encoder.stages.state_dict(), network.encoder.stages.state_dict())
    (tmp_path / "best.pt").write_bytes((tmp_path / "w.pth").read_bytes())
    save({"state_dict": moved(whole.state_dict())}, tmp_path, "checkpoint_0009.pt")
    torch.nn.init.uniform_(encoder.stages[0][1].norm.weight)
    kept = encoder.stages[0][1].norm.weight.clone()
    file = weights_file(Namespace(weights=str(tmp_path)), "market")  # of a log folder with both
    line = load_pretrained(encoder, file, {}, drop_norms=True)
    assert torch.equal(encoder.stages[0][1].norm.weight, kept) and "best.pt" in line and "dropped: stages." in line
    assert torch.equal(encoder.stages[0][0][0].weight, bare.encoder.stages[0][0][0].weight)


def test_dapg_starts_from_its_two_stream_network(tmp_path):
    torch.manual_seed(5)
    state = models.resnet18().state_dict()
    streams = {}
    for name, value in state.items():
        stem = re.match(r"(conv1|bn1)\.(.*)", name)
        if stem:
            place = ("conv1", "bn1").index(stem[1])
            streams |= {f"visible.{place}.{stem[2]}": value, f"infrared.{place}.{stem[2]}": value + 1}
        elif name.startswith("layer"):
            streams[f"layers.{int(name[5]) - 1}{name[6:]}"] = value
    found = trunk.load(save({"state_dict": streams}, tmp_path), "resnet18", "logs", None)
    assert_started(found, {name: value for name, value in state.items() if not name.startswith("fc.")})
