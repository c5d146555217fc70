"""aff_scl.complexity: Table 8 to the digit, and the counter's rules on networks small enough to count by hand."""

import contextlib
import io
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from ranks import on_ranks
from torch import nn
from torchvision import models

from aff_scl import complexity
from aff_scl.complexity import measure
from aff_scl.model import AFF


@pytest.fixture(scope="module")
def ours():
    return measure("ours", AFF, 384, 192)


def test_table8_comes_out_to_the_printed_digit(ours):
    printed = f"{ours.params / 1e6:.2f} {ours.flops / 1e9:.2f} {ours.memory_mb:.2f}"
    assert printed == "26.70 9.17 186.26"
    assert ours.params == ours.exact_params == 26_699_938


def test_multiply_adds_agree_with_the_hand_count(ours):
    assert ours.exact_flops / 1e9 == pytest.approx(9.1231, abs=5e-5)
    assert measure("honest", AFF, 256, 128).exact_flops / 1e9 == pytest.approx(4.0565, abs=5e-5)


def test_torchvision_resnet50_has_the_numbers_of_torchstat():
    row = measure("resnet50", models.resnet50, 224, 224)
    assert row.params == 25_557_032
    assert f"{row.flops / 1e9:.4f}" == "4.1185" and f"{row.memory_mb:.2f}" == "109.69"


@pytest.mark.parametrize("gate, memory", [("softmax", 186.256), ("sigmoid", 186.264)])
def test_gate_changes_memory_only(gate, memory):
    row = measure(gate, lambda: AFF(gate=gate), 384, 192)
    assert row.params == 26_699_938 and row.flops / 1e9 == pytest.approx(9.1734, abs=5e-5)
    assert row.memory_mb == pytest.approx(memory, abs=5e-4)


@pytest.mark.parametrize("arch, flops, memory", [("base", 9.169, 183.95), ("g", 9.169, 183.99), ("l", 9.173, 186.23)])
def test_parts_of_table7_at_the_same_size(arch, flops, memory):
    row = measure(arch, lambda: AFF(arch), 384, 192)
    assert row.flops / 1e9 == pytest.approx(flops, abs=5e-4) and f"{row.memory_mb:.2f}" == f"{memory:.2f}"


class Tiny(nn.Module):
    """One convolution called on two sizes and one ReLU used twice; 3x8x8 in."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=True)
        self.relu = nn.ReLU()
        self.unused = nn.Linear(10, 10)

    def forward(self, x):
        x = self.relu(self.conv(x))
        return self.relu(self.conv(x[:, :, :4, :4]))


def test_the_last_call_of_a_module_counts_and_exact_counts_all():
    row = measure("tiny", Tiny, 8, 8)
    assert row.params == 3 * 3 + 3  # the linear layer was never called
    assert row.flops == 48 * (3 + 1) + 48  # convolution with bias and ReLU, both on 3x4x4
    assert row.memory_mb * 2**20 == 2 * 48 * 4
    assert row.exact_params == 3 * 3 + 3 + 110
    assert row.exact_flops == (192 + 48) * 3
    assert row.exact_memory_mb * 2**20 == 2 * (192 + 48) * 4


def test_exact_memory_leaves_out_views_and_inplace_results():
    def build():
        return nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.ReLU())

    assert measure("views", build, 4, 4).exact_memory_mb * 2**20 == 48 * 4


def test_nothing_is_computed():
    def build():
        model = AFF()
        assert all(weight.is_meta for weight in model.parameters())
        return model

    measure("meta", build, 4096, 2048)  # 32 million pixels: days of work, were it not for the meta device


def run(*flags, cwd):
    command = [sys.executable, str(ROOT / "aff_scl" / "complexity.py"), *flags]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout


def test_script_prints_unrounded_json_from_another_directory(tmp_path):
    rows = json.loads(run("--json", cwd=tmp_path))
    assert rows[0]["params"] == 26_699_938 and rows[0]["flops"] == 9_173_354_056
    assert (rows[0]["height"], rows[0]["width"], rows[1]["height"], rows[1]["width"]) == (384, 192, 256, 128)
    assert set(rows[0]) == {"name", "params", "flops", "memory_mb", "exact_params", "exact_flops", "exact_memory_mb",
                            "height", "width"}  # fmt: skip
    assert not list(tmp_path.iterdir())


def row_of_table8(folder):
    """What complexity.py prints for the row, on this rank."""
    sys.argv = ["complexity.py", "--row", "table8/ours", "--results-dir", f"{folder}/results", "--logs-dir", folder]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        complexity.main(complexity.complexity_args())
    return said.getvalue()


def test_row_writes_a_result_file_that_the_tables_read_under_torchrun_too(tmp_path):
    printed = on_ranks(2, row_of_table8, str(tmp_path))
    assert "26.70    9.17   186.26" in printed[0] and printed[1] == ""
    path = tmp_path / "results" / "aff_scl" / "no-data" / "table8" / "ours" / "seed0.json"
    metrics = json.loads(path.read_text())["metrics"]
    assert metrics["params"] == 26_699_938 and metrics["memory_mb"] == pytest.approx(186.264, abs=5e-4)


def test_measuring_leaves_no_hook_behind():
    kept = []

    def build():
        kept.append(nn.Sequential(nn.Conv2d(3, 3, 1)))
        return kept[0]

    measure("hooks", build, 4, 4)
    assert not kept[0][0]._forward_hooks and torch.is_grad_enabled()
