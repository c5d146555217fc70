"""Data sets: the trees that users have, file names, protocol details, and one clear sentence for each mistake."""

import contextlib
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from scipy.io import savemat

from common import datasets
from common.datasets import __main__ as command
from common.datasets import files, luperson, market

MARKET = {
    "bounding_box_train": ["0002_c1s1_000451_03.jpg", "0002_c2s1_000551_01.jpg", "0007_c3s3_077419_03.jpg"],
    "query": ["0001_c1s1_001051_00.jpg", "0003_c2s3_000001_00.jpg"],
    "bounding_box_test": [
        "-1_c1s1_000401_03.jpg",
        "0000_c2s1_000151_01.jpg",
        "0001_c2s1_001976_01.jpg",
        "0003_c6s1_000001_01.JPG",
    ],
}
DUKE = {
    "bounding_box_train": ["0001_c2_f0046182.jpg", "0001_c8_f0046302.jpg"],
    "query": ["0005_c2_f0046985.jpg"],
    "bounding_box_test": ["0002_c1_f0044158.jpg", "0005_c5_f0046985.jpg"],
}
CUHK03 = {
    "bounding_box_train": ["0001_c1_1.png", "0001_c2_6.png"],
    "query": ["0003_c1_21.png"],
    "bounding_box_test": ["0003_c2_26.png", "0004_c1_1.png"],
}
MSMT = {
    "bounding_box_train": ["0000_c1_0000.jpg", "0000_c14_0001.jpg"],
    "query": ["0000_c1_0000.jpg"],
    "bounding_box_test": ["0000_c15_0001.jpg", "0001_c3_0000.jpg"],
}

pytestmark = pytest.mark.filterwarnings("ignore:.*instead of the published")


def write_tree(root: Path, tree: dict, pixels: bool = False) -> Path:
    """Files of the tree: empty, or small images."""
    for folder, names in tree.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            if pixels:
                Image.new("RGB", (8, 16), (len(name), 0, 0)).save(root / folder / name)
            else:
                (root / folder / name).touch()
    return root


@pytest.mark.parametrize(
    "name, tree, files",
    [
        ("market", "market1501/Market-1501-v15.09.15", MARKET),
        ("market1501", "Market-1501-v15.09.15", MARKET),
        ("Market", "market1501", MARKET),
        ("market", "", MARKET),
        ("duke", "dukemtmcreid/DukeMTMC-reID", DUKE),
        ("dukemtmc", "DukeMTMC-reID", DUKE),
        ("dukemtmcreid", "dukemtmc-reid/DukeMTMC-reID", DUKE),
        ("duke", "dukemtmc-reid", DUKE),
        ("cuhk03", "cuhk03-np/detected", CUHK03),
        ("cuhk03", "cuhk03_np/detected", CUHK03),
        ("cuhk03", "cuhk03/detected", CUHK03),
        ("cuhk03", "", CUHK03),
        ("msmt17", "msmt17/MSMT17_V1", MSMT),
        ("msmt17", "msmt17", MSMT),
        ("msmt17", "MSMT17_V2", MSMT),
    ],
)
def test_every_tree_is_found_and_read(tmp_path, name, tree, files):
    root = write_tree(tmp_path / tree, files)
    data = datasets.load(name, tmp_path)
    for split, folder in (("train", "bounding_box_train"), ("query", "query"), ("gallery", "bounding_box_test")):
        assert [Path(s.path) for s in getattr(data, split)] == [root / folder / file for file in sorted(files[folder])]
    assert data.kind == "real" and data.name == datasets.canonical(name)


def test_market_pids_and_camids_are_those_of_the_names(tmp_path):
    data = datasets.load("market", write_tree(tmp_path, MARKET))
    assert [(s.pid, s.camid) for s in data.gallery] == [(-1, 0), (0, 1), (1, 1), (3, 5)]
    assert [(s.pid, s.camid) for s in data.train] == [(2, 0), (2, 1), (7, 2)]
    assert datasets.labels(data.train).tolist() == [0, 0, 1] and datasets.labels(data.train).dtype == np.int64
    with pytest.raises(ValueError, match="-1_c1s1_000401_03.jpg: pid -1 is junk"):
        datasets.labels(data.gallery)


def test_cuhk03_splits_are_chosen_and_the_wrong_folder_is_refused(tmp_path):
    write_tree(tmp_path / "cuhk03-np/labeled", CUHK03)
    assert "labeled" in datasets.load("cuhk03", tmp_path, split="labeled").train[0].path
    with pytest.raises(FileNotFoundError, match="detected"):
        datasets.load("cuhk03", tmp_path)
    with pytest.raises(ValueError, match="holds the labeled boxes, not 'detected'"):
        datasets.load("cuhk03", tmp_path / "cuhk03-np/labeled")
    with pytest.raises(ValueError, match="'both' is not one of detected, labeled"):
        datasets.load("cuhk03", tmp_path, split="both")


@pytest.mark.parametrize("place", ["images_detected", "cuhk03_release/images_detected"])
def test_cuhk03_new_protocol_lists_over_the_original_images(tmp_path, place):
    names = ["1_001_1_01.png", "1_001_2_06.png", "1_002_1_01.png", "1_002_2_06.png", "2_001_1_01.png"]
    write_tree(tmp_path / "cuhk03", {place: names})
    filelist = np.array([[name] for name in names], dtype=object)
    savemat(
        tmp_path / "cuhk03/cuhk03_new_protocol_config_detected.mat",
        {
            "filelist": filelist,
            "labels": np.array([[1], [1], [2], [2], [3]]),
            "train_idx": np.array([[2], [1]]),
            "query_idx": np.array([[3]]),
            "gallery_idx": np.array([[4], [5]]),
        },
    )
    data = datasets.load("cuhk03", tmp_path)
    assert [(Path(s.path).name, s.pid, s.camid) for s in data.train] == [(names[0], 1, 0), (names[1], 1, 1)]
    assert [(s.pid, s.camid) for s in data.query + data.gallery] == [(2, 0), (2, 1), (3, 0)]
    (tmp_path / "cuhk03" / place / names[3]).unlink()
    with pytest.raises(ValueError, match=f"{names[3]}: listed in .*detected.mat but not there"):
        datasets.load("cuhk03", tmp_path)


@pytest.mark.parametrize(
    "version, train, test", [("MSMT17_V1", "train", "test"), ("MSMT17_V2", "mask_train_v2", "mask_test_v2")]
)
def test_msmt17_lists_give_pid_and_camera_and_validation_joins_training(tmp_path, version, train, test):
    root = tmp_path / "msmt17" / version
    lists = {
        "train": ["0000/0000_000_01_0303morning_0008_0.jpg 0", "0001/0001_001_15_0303noon_0009_0.jpg 1"],
        "val": ["0000/0000_009_03_0303morning_0010_1.jpg 0"],
        "query": ["0000/0000_000_02_0113noon_0033_1.jpg 0"],
        "gallery": ["0000/0000_001_11_0113noon_0066_0.jpg 0", "0005/0005_001_11_0113noon_0066_0.jpg 5"],
    }
    for name, lines in lists.items():
        folder = train if name in ("train", "val") else test
        write_tree(root / folder, {})
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / f"list_{name}.txt").write_text("\n".join(lines) + "\n")
    data = datasets.load("msmt17", tmp_path)
    assert [(s.pid, s.camid) for s in data.train] == [(0, 0), (0, 2), (1, 14)]
    assert data.query[0].path == str(root / test / "0000/0000_000_02_0113noon_0033_1.jpg") and data.query[0].camid == 1
    assert len(datasets.load("msmt17", tmp_path, combine=False).train) == 2
    assert " 0 " in data.statistics().splitlines()[-1]  # pid 0 is a person here, no distractor
    (root / "list_val.txt").write_text("0000/0000.jpg 0\n")
    with pytest.raises(ValueError, match="list_val.txt: 0000/0000.jpg 0: not a line like"):
        datasets.load("msmt17", tmp_path)


@pytest.mark.parametrize(
    "name, words",
    [
        ("market", "Market-1501-v15.09.15"),
        ("duke", "withdrawn by its authors"),
        ("cuhk03", "CUHK03-NP"),
        ("msmt17", "MSMT17_V1"),
    ],
)
def test_missing_data_set_names_the_trees_the_source_and_the_stand_in(tmp_path, name, words):
    with pytest.raises(FileNotFoundError, match=words) as caught:
        datasets.load(name, tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message and f"python -m common.synthetic {name} --out data" in message
    assert "\n" not in message


def test_half_a_tree_names_what_is_missing(tmp_path):
    write_tree(tmp_path / "market1501", {"bounding_box_train": MARKET["bounding_box_train"]})
    with pytest.raises(FileNotFoundError, match="market1501 holds no query and no bounding_box_test"):
        datasets.load("market", tmp_path)


def test_images_whose_names_do_not_parse_are_an_error_and_leftovers_are_counted(tmp_path):
    write_tree(tmp_path, MARKET)
    for leftover in ("Thumbs.db", ".DS_Store", "._0002_c1s1_000451_03.jpg", "0001_c1s1_000001_00.txt"):
        (tmp_path / "query" / leftover).touch()
    (tmp_path / "query" / "@eaDir").mkdir()
    with pytest.warns(files.LeftOut, match=r"query: left out .*") as said:
        assert len(datasets.load("market", tmp_path).query) == 2
    (message,) = [str(one.message) for one in said if one.category is files.LeftOut]
    assert "hidden or system entries: 4 (" in message and "files that are no images: 1 (0001_" in message
    (tmp_path / "query" / "person.jpg").touch()
    with pytest.raises(ValueError, match="query: person.jpg: not named as .*give a tree without them") as refused:
        datasets.load("market", tmp_path)
    assert "rename" not in str(refused.value) and "remove" not in str(refused.value)


def test_empty_split_and_single_camera_are_errors(tmp_path):
    write_tree(tmp_path / "empty", {**MARKET, "query": []})
    with pytest.raises(ValueError, match="query has no images under"):
        datasets.load("market", tmp_path / "empty")
    write_tree(
        tmp_path / "one",
        {**MARKET, "query": ["0001_c1s1_001051_00.jpg"], "bounding_box_test": ["0001_c1s1_001976_01.jpg"]},
    )
    with pytest.raises(ValueError, match="all query and gallery images under .* have camera 1"):
        datasets.load("market", tmp_path / "one")
    with pytest.raises(ValueError, match="unknown data set 'marked'; known: market, duke"):
        datasets.load("marked", tmp_path)
    with pytest.raises(ValueError, match="market: unknown option split; known: none"):
        datasets.load("market", tmp_path, split="labeled")


def test_counts_off_the_published_table_warn_for_real_data_only(tmp_path):
    write_tree(tmp_path / "market1501", MARKET)
    with pytest.warns(UserWarning, match="train has 3 images, 2 ids, 3 cameras instead of the published 12936, 751, 6"):
        datasets.load("market", tmp_path)
    (tmp_path / "market1501/SYNTHETIC").write_text("{}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = datasets.load("market", tmp_path)
    assert data.kind == "synthetic" and data.check() == []


def test_the_warning_of_other_counts_names_both_reasons_and_the_early_look_leaves_it_to_the_load(tmp_path):
    write_tree(tmp_path, MARKET)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        datasets.expect("market", tmp_path)
    with pytest.warns(UserWarning, match="of your own is fine, but its results fill no cell .*check the download"):
        data = datasets.load("market", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(data.differences()) == 3


def test_statistics_count_junk_and_distractors_apart(tmp_path):
    lines = datasets.load("market", write_tree(tmp_path, MARKET)).statistics().splitlines()
    assert lines[-1].split() == ["gallery", "4", "2", "2", "1", "1"]
    assert lines[-3].split() == ["train", "3", "2", "3", "0", "0"]


def test_order_does_not_depend_on_the_file_system_or_on_hashing(tmp_path, monkeypatch):
    write_tree(tmp_path, MARKET)
    expected = datasets.load("market", tmp_path)
    original = os.scandir

    @contextlib.contextmanager
    def shuffled(folder):
        with original(folder) as entries:
            found = list(entries)
        yield iter(random.sample(found, len(found)))

    monkeypatch.setattr(os, "scandir", shuffled)
    for _ in range(5):
        assert datasets.load("market", tmp_path) == expected
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\nimport warnings; warnings.simplefilter('ignore')\n"
        "from common import datasets\nd = datasets.load('market', sys.argv[2])\n"
        "print([s.path for s in d.train + d.query + d.gallery], d.digest())"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code, str(ROOT), str(tmp_path)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1] and expected.digest() in outputs[0]


def test_digest_follows_names_and_sizes_but_not_the_place(tmp_path):
    first = datasets.load("market", write_tree(tmp_path / "a", MARKET)).digest()
    assert first == datasets.load("market", write_tree(tmp_path / "b", MARKET)).digest()
    (tmp_path / "b/query/0001_c1s1_001051_00.jpg").write_text("x")
    assert first != datasets.load("market", tmp_path / "b").digest()


def test_command_line_prints_statistics_and_check_finds_the_broken_image(tmp_path):
    write_tree(tmp_path, MARKET, pixels=True)
    module = [sys.executable, "-m", "common.datasets"]
    run = lambda *words: subprocess.run(
        [*module, *words, "--data-dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert "gallery" in run("market").stdout
    good = run("check", "market")
    assert good.returncode == 0 and "9 images opened, 0 broken" in good.stdout
    broken = tmp_path / "query/0001_c1s1_001051_00.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    bad = run("check", "market")
    assert bad.returncode == 1 and str(broken) in bad.stdout and "1 broken" in bad.stdout
    assert "train has 3 images" in bad.stdout and "counts differ from the published table" in bad.stdout
    assert "Warning" not in bad.stderr
    wrong = run("check", "duke")  # the names are Market's
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr and "not named as the data set" in wrong.stderr


def test_check_reports_every_broken_image_and_wrong_name_and_counts(tmp_path, capsys, monkeypatch):
    write_tree(tmp_path, MARKET, pixels=True)
    files = sorted((tmp_path / "bounding_box_train").iterdir())
    files[0].write_bytes(b"")
    files[1].write_bytes(files[1].read_bytes()[:-40])
    assert command.main(["check", "market", "--data-dir", str(tmp_path), "-j", "1"]) == 1
    said = capsys.readouterr().out
    assert all(f"{file}: " in said for file in files[:2]) and "9 images opened, 2 broken" in said
    (tmp_path / "SYNTHETIC").write_text("{}")
    assert command.main(["check", "market", "--data-dir", str(tmp_path)]) == 1
    assert "instead of the published" not in capsys.readouterr().out
    (tmp_path / "SYNTHETIC").unlink()
    monkeypatch.setattr(market, "PUBLISHED", {"train": (3, 2, 3), "query": (2, 2, 2), "gallery": (3, 2, 2)})
    command.main(["check", "market", "--data-dir", str(tmp_path)])
    assert "counts are those of the published table" in capsys.readouterr().out
    (tmp_path / "query" / "holiday.jpg").write_bytes(b"x")
    assert command.main(["check", "market", "--data-dir", str(tmp_path)]) == 1
    assert "holiday.jpg" in capsys.readouterr().err


def test_check_opens_the_images_of_an_lmdb(tmp_path, monkeypatch):
    good, key = tmp_path / "a.jpg", f"{tmp_path}/data{luperson.SEPARATOR}"
    Image.new("RGB", (4, 8)).save(good)
    values = {key + "a": good.read_bytes(), key + "b": good.read_bytes()[:60]}
    monkeypatch.setattr(luperson, "read", values.__getitem__)
    assert command.fault(key + "a") is None and command.fault(key + "b").startswith(key + "b: ")
