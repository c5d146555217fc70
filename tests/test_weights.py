"""--weights: every published form starts every project, one line says what was taken, one sentence what was wrong."""

import os
import re
import urllib.error
from argparse import Namespace

import numpy as np
import pytest
import torch
from torchvision import models
from weight_files import assert_started, moved, prefixed, save, tiny_convnext, typed

from aff_scl.model import AFF, load_backbone
from common import checkpoints, weights
from convnext_ap.model import load_trunk
from dapg import trunk
from pixel_sampling import model as pixel_sampling
from prsnet.model import SIZES, Encoder
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
    place = re.escape(str(tmp_path / "hub" / "checkpoints")) + r"/\w+-\w+\.pth"
    with pytest.raises(
        FileNotFoundError, match=f"no route to host.*; download https://.* put it at {place}, .*--weights PATH"
    ):
        STARTS[project][0]("imagenet")
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True, exist_ok=True)
    name = models.ResNet18_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    (tmp_path / "hub" / "checkpoints" / name).write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(FileNotFoundError, match=f"delete .*{name}, which is damaged"):
        STARTS[project][0]("imagenet")


# --------------------------------------------------------------------------------------------------------- checkpoints
def test_scores_of_numpy_and_flags_of_argparse_are_read_and_code_is_not(tmp_path):
    content = {"map": np.float32(0.5), "rank": np.int64(3), "best": np.bool_(True), "args": Namespace(lr=0.1)}
    found = checkpoints.load(save(content, tmp_path))
    assert found == content
    with pytest.raises(ValueError, match="reading it would run torchvision.models.resnet.ResNet; let its program save"):
        checkpoints.load(save(models.resnet18(), tmp_path))
