"""--weights: every published form starts every project, one line says what was taken, one sentence what was wrong."""

import os
import re
import urllib.error
from argparse import Namespace

import numpy as np
import pytest
import torch
from torchvision import models

from aff_scl import train as aff_scl_train
from aff_scl.model import AFF, convert_dsbn, load_backbone
from common import checkpoints, weights
from convnext_ap.model import ConvNeXtAP, load_trunk
from dapg import trunk
from pixel_sampling import model as pixel_sampling
from pixel_sampling import test as pixel_sampling_test
from prsnet.flags import weights_file
from prsnet.model import SIZES, Encoder, PRSNet
from prsnet.reid import load_pretrained

torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------------------- five projects
def start_aff_scl(file):
    network = AFF(arch="base", backbone="resnet18")
    load_backbone(network, file)
    return network.backbone.state_dict()


def start_pixel_sampling(file):
    return pixel_sampling.build("bot", 5, "resnet18", file).backbone.state_dict()


def start_dapg(file):
    return trunk.load(file, "resnet18", "logs", None)


def tiny_convnext(attention="none", parts=0, people=4):
    return ConvNeXtAP(people, "tiny", attention, parts)


def start_convnext_ap(file):
    network = tiny_convnext()
    print(load_trunk(network, file))
    return {f"features.{name}": value for name, value in network.trunk.state_dict().items()}


def start_prsnet(file):
    encoder = Encoder("plain", SIZES["tiny"], 64)
    print(load_pretrained(encoder, file, {}))
    return encoder.state_dict()


def resnet18():
    return {k: v for k, v in models.resnet18().state_dict().items() if not k.startswith("fc.")}


STARTS = {
    "aff_scl": (start_aff_scl, resnet18),
    "pixel_sampling": (start_pixel_sampling, resnet18),
    "dapg": (start_dapg, resnet18),
    "convnext_ap": (
        start_convnext_ap,
        lambda: {f"features.{k}": v + 0.0 for k, v in tiny_convnext().trunk.state_dict().items()},
    ),
    "prsnet": (start_prsnet, lambda: Encoder("plain", SIZES["tiny"], 64).state_dict()),
}
SMALL = ["convnext_ap", "prsnet"]  # a file is quickly written
projects = pytest.mark.parametrize("project", STARTS)


@pytest.fixture(scope="module")
def donors():
    """Trained-looking trunks by the names of their authors."""
    torch.manual_seed(3)
    return {project: make() for project, (_, make) in STARTS.items()}


def save(content, folder, name="w.pth"):
    torch.save(content, folder / name)
    return str(folder / name)


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def moved(state):
    return {name: value + 1 for name, value in state.items()}


def typed(state, dtype):
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}


def assert_started(found, donor, tolerance=0.0):
    for name, value in donor.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)


# --------------------------------------------------------------------------------------------------------------- forms
def moco(state):
    """Both encoders, a head of each, and the queue, in the order that would mislead a reader of the first one."""
    extra = {"module.encoder_k.fc.0.weight": torch.zeros(2), "module.queue": torch.zeros(2, 3)}
    key, query = (prefixed(s, f"module.encoder_{c}.") for c, s in (("k", moved(state)), ("q", state)))
    return {"epoch": 200, "arch": "resnet50", "state_dict": key | query | extra, "optimizer": {"state": {0: state}}}


SCORES = {"epoch": 3, "best_mAP": np.float64(0.5), "args": Namespace(lr=0.1), "optimizer": {"state": {}}}
FORMS = {
    "bare": lambda s: s,
    "beside numbers": lambda s: {**s, "epoch": 5},
    "state_dict": lambda s: {"state_dict": s, **SCORES},
    "model": lambda s: {"model": s, "model_ema": moved(s)},
    "net": lambda s: {"net": s, "acc": 0.5},
    "network": lambda s: {"network": s},
    "backbone": lambda s: {"backbone": s},
    "model_state_dict": lambda s: {"model_state_dict": prefixed(s, "module.")},
    "byol": lambda s: {"target_network": prefixed(moved(s), "encoder."), "online_network": prefixed(s, "encoder.")},
    "dino": lambda s: {"teacher": moved(s), "student": prefixed(s, "module.backbone.")},
    "moco": moco,
    "momentum_encoder": lambda s: prefixed(moved(s), "momentum_encoder.") | prefixed(s, "encoder."),
    "compiled": lambda s: {"_orig_mod.module.net." + name.replace(".", "._orig_mod.", 1): v for name, v in s.items()},
    "base": lambda s: {"state_dict": prefixed(s, "module.base.")},
    "virtex": lambda s: {"model": {**prefixed(s, "visual.cnn."), "textual.weight": torch.zeros(3)}},
    "classifier": lambda s: {**s, "fc.weight": torch.zeros(751, 4), "classifier.2.weight": torch.zeros(751, 4)},
    "without counters": lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("project", SMALL)
def test_every_published_form_starts_the_trunk(project, form, donors, tmp_path):
    assert_started(STARTS[project][0](save(FORMS[form](donors[project]), tmp_path)), donors[project])


@pytest.mark.parametrize("form", ["moco", "byol", "without counters"])
@pytest.mark.parametrize("project", [name for name in STARTS if name not in SMALL])
def test_resnets_start_from_the_hard_forms(project, form, donors, tmp_path):
    assert_started(STARTS[project][0](save(FORMS[form](donors[project]), tmp_path)), donors[project])


@projects
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_half_precision_is_read_as_float32_and_one_line_says_all(project, dtype, tolerance, donors, tmp_path, capsys):
    donor = donors[project]
    head = {"fc.weight": torch.zeros(7, 3), "fc.bias": torch.zeros(7)}
    file = save({"state_dict": typed(donor, dtype) | head}, tmp_path)
    found = STARTS[project][0](file)
    assert_started(found, donor, tolerance)
    (line,) = capsys.readouterr().out.splitlines()
    assert re.match(rf"weights: {len(donor)} tensors into the (trunk|network) from {re.escape(file)}", line)
    assert f"{str(dtype)[6:]} widened" in line and "2 left out: fc.*" in line


@projects
def test_a_log_folder_stands_for_its_newest_checkpoint(project, donors, tmp_path):
    for epoch, state in ((1, moved(donors[project])), (2, donors[project])):
        save({"state_dict": state, "epoch": epoch}, tmp_path, f"checkpoint_{epoch:04d}.pt")
    assert_started(STARTS[project][0](str(tmp_path)), donors[project])


# ----------------------------------------------------------------------------------------------------------- bad input
class Payload:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def half(state):
    """The first half of the tensors, a part of a block among them."""
    return dict(list(state.items())[: len(state) // 2])


def reshaped(state):
    return {name: value[:1] if value.ndim > 1 else value for name, value in state.items()}


BAD = {  # what is in the file -> what the sentence says
    "another network": (
        lambda s: {"model": {"conv_proj.weight": torch.zeros(3, 3), "cls": torch.zeros(1)}},
        "holds no",
    ),
    "half of a trunk": (half, r"holds no complete .*; \d+ of \d+ tensors missing: "),
    "a momentum copy alone": (lambda s: {"state_dict": prefixed(s, "encoder_k.")}, r"only as a momentum copy \("),
    "a target network alone": (lambda s: {"target_network": s}, r"only as a momentum copy \(target_network"),
    "other shapes": (reshaped, r"\d+ of another shape: .* instead of \("),
    "an optimiser": (lambda s: {"epoch": 3, "state_dict": {}, "optimizer": {"state": {0: s}}}, "holds no state_dict"),
    "a list": (lambda s: [s], "holds no state_dict"),
}


def sentence(project, file):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        STARTS[project][0](file)
    said = str(caught.value)
    assert file in said and "give --weights" in said and "\n" not in said and len(said) < 700, said
    return said


@projects
@pytest.mark.parametrize("fault", BAD)
def test_a_file_that_does_not_serve_is_one_short_sentence(project, fault, donors, tmp_path):
    make, expected = BAD[fault]
    assert re.search(expected, sentence(project, save(make(donors[project]), tmp_path)))


@projects
def test_files_that_are_none_of_torch_save_or_would_run_code_are_refused(project, donors, tmp_path):
    save({"conv1.weight": Payload(tmp_path / "touched")}, tmp_path, "evil.pth")
    whole = save(donors[project], tmp_path)
    cut = (tmp_path / "w.pth").read_bytes()[:100_000]
    texts = [text.encode("latin1") for text in ("no weights", "(l.", "\x80\x02]q\x01", "\x80\x02U\xff", "{q", "")]
    for number, content in enumerate([*texts, cut] if project in SMALL else texts[:1]):  # each fails in its own way
        (tmp_path / f"{number}.pth").write_bytes(content)
        assert "not a readable checkpoint" in sentence(project, str(tmp_path / f"{number}.pth"))
    assert "would run posix.mkdir" in sentence(project, str(tmp_path / "evil.pth")).replace("nt.", "posix.")
    assert not (tmp_path / "touched").exists()
    assert "no file" in sentence(project, whole + "x")


def test_all_missing_tensors_are_named_by_groups(tmp_path):
    state = models.resnet50().state_dict()
    for name in ["layer3.5.bn2.running_var", "layer4.2.conv3.weight", *(k for k in state if k.startswith("layer2."))]:
        state.pop(name)
    with pytest.raises(ValueError) as caught:
        trunk.load(save(state, tmp_path), "resnet50", "logs", None)
    groups = "layer2.*, layer3.5.bn2.running_var, layer4.2.conv3.weight;"
    assert f"w.pth holds no complete resnet50; 67 of 265 tensors missing: {groups}" in str(caught.value)


@pytest.mark.parametrize("there", ["resnet18", "resnet101"])
def test_a_resnet_of_another_depth_is_refused_in_few_words(there, tmp_path):
    """The names and shapes of ResNet-50 are all in a ResNet-101, whose layer3 is longer."""
    file = save(getattr(models, there)().state_dict(), tmp_path)
    with pytest.raises(ValueError) as caught:
        trunk.load(file, "resnet50", "logs", None)
    said = str(caught.value)
    expected = {
        "resnet18": "165 of 265 tensors missing",
        "resnet101": "belong to a larger network: layer3.{6,7,8,9,10,11,",
    }
    assert expected[there] in said and len(said) < 800


def test_names_are_grouped_without_losing_one():
    among = [f"layer{i}.{j}.{part}" for i in (1, 2) for j in range(4) for part in ("conv.weight", "bn.a", "bn.b")]
    some = [name for name in among if name.startswith("layer1") or name.endswith("conv.weight") and ".3." not in name]
    assert weights.compact(some, among) == "layer1.*, layer2.{0,1,2}.conv.weight"
    assert weights.compact(["b", "a.x"], ["b", "a.x", "a.y"]) == "b, a.x"
    assert weights.compact(["a", "b", "c"], ["a", "b", "c"], 2) == "{a,b,c}" and weights.compact([], among) == ""
    assert weights.compact(["a.x", "b.y", "c.z"], ["a.x", "b.y", "c.z"], 2) == "a.x, b.y ..."


@pytest.mark.parametrize("project", ["aff_scl", "pixel_sampling", "dapg"])
def test_without_a_network_imagenet_weights_say_what_to_do(project, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    with pytest.raises(FileNotFoundError, match=r"no route to host.*; download https://\S+ .*--weights PATH"):
        STARTS[project][0]("imagenet")
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True, exist_ok=True)
    name = models.ResNet18_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    (tmp_path / "hub" / "checkpoints" / name).write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(FileNotFoundError, match=f"delete .*{name}, which is damaged"):
        STARTS[project][0]("imagenet")


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


def test_prsnet_starts_from_a_pre_training_a_fine_tuning_and_one_without_projection(tmp_path):
    size = SIZES["tiny"]
    whole, bare = PRSNet(64, 32, "plain", size, 64), PRSNet(64, 32, "plain", size, size.dims[-1])
    tuned = prefixed(whole.encoder.state_dict(), "encoder.") | {"classifier.weight": torch.zeros(3, 64)}
    for content in ({"state_dict": whole.state_dict()}, {"state_dict": tuned}, whole.encoder.state_dict()):
        encoder = Encoder("plain", size, 64)
        load_pretrained(encoder, save(content, tmp_path), {})
        assert_started(encoder.state_dict(), whole.encoder.state_dict())
    encoder = Encoder("plain", size, 64)
    before = encoder.proj.weight.clone()
    load_pretrained(encoder, save({"state_dict": bare.state_dict()}, tmp_path), {})
    assert torch.equal(encoder.proj.weight, before)
    assert_started(encoder.stages.state_dict(), bare.encoder.stages.state_dict())
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


# --------------------------------------------------------------------------------------------------------- checkpoints
def test_scores_of_numpy_and_flags_of_argparse_are_read_and_code_is_not(tmp_path):
    content = {"map": np.float32(0.5), "rank": np.int64(3), "best": np.bool_(True), "args": Namespace(lr=0.1)}
    found = checkpoints.load(save(content, tmp_path))
    assert found == content
    with pytest.raises(ValueError, match="reading it would run torchvision.models.resnet.ResNet; let its program save"):
        checkpoints.load(save(models.resnet18(), tmp_path))
