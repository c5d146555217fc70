"""SYSU-MM01, RegDB and LUPerson: readers, protocols, bad input, and the corrupted benchmark."""

import random
import shutil

import numpy as np
import pytest
import torch
from dapg_trees import write_luperson, write_regdb, write_sysu

from common import datasets, evaluation, images, inputs
from common.datasets import regdb, sysu
from common.synthetic import layouts
from dapg.data import CorruptedStore, subset
from dapg.noise import corruptions


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("vi")
    return write_luperson(write_regdb(write_sysu(root)))


def unit(x):
    return torch.nn.functional.normalize(torch.as_tensor(x), dim=1).float()


# ----------------------------------------------------------------------------------------------------------------- SYSU
def test_sysu_takes_camera_and_id_from_the_folders(tree):
    data = datasets.load("SYSU-MM01", tree)
    assert len({s.pid for s in data.train}) == 10 and len({s.pid for s in data.query}) == 4
    assert {s.camid for s in data.query} == {2, 5} and {s.camid for s in data.gallery} == {0, 1, 3, 4}
    assert all((s.modality == "ir") == (s.camid in (2, 5)) for s in data.train + data.query + data.gallery)
    assert [s.path for s in data.query] == sorted(s.path for s in data.query)


def test_sysu_gallery_is_the_published_draw():
    """Against the authors' procedure, written out: seed, people ascending, cameras in order, one choice a folder."""
    rng = np.random.default_rng(0)
    folders = {
        (pid, cam): [f"cam{cam}/{pid:04d}/{i + 1:04d}.jpg" for i in range(rng.integers(1, 9))]
        for pid in (7, 3, 250)
        for cam in (1, 2, 4, 5)
        if (pid, cam) != (3, 4)
    }
    samples = sorted(
        (datasets.Sample(path, pid, cam - 1) for (pid, cam), files in folders.items() for path in files),
        key=lambda s: s.path,
    )
    for mode, cameras in (("all", (1, 2, 4, 5)), ("indoor", (1, 2))):
        for trial in range(10):
            random.seed(trial)
            places = [(pid, cam) for pid in (3, 7, 250) for cam in cameras if (pid, cam) in folders]
            want = [random.choice(sorted(folders[place])) for place in places]
            assert [samples[i].path for i in sysu.gallery_trial(samples, mode, trial)] == want


STORED = (
    "cam1/0011/0004.jpg cam2/0011/0004.jpg cam1/0012/0001.jpg cam2/0012/0002.jpg cam1/0013/0004.jpg "
    "cam2/0013/0004.jpg cam1/0014/0002.jpg cam2/0014/0002.jpg"
).split()


def test_sysu_gallery_draw_stays_what_it_was(tree):
    gallery = datasets.load("sysu", tree).gallery
    found = [gallery[i].path.split("SYSU-MM01/")[1] for i in sysu.gallery_trial(gallery, "indoor", 0)]
    assert found == STORED


def test_synthetic_sysu_full_has_the_real_counts():
    items, texts = layouts.plan("sysu", "full", 0)
    cams = [int(item.path[3]) for item in items]
    tested = set(map(int, texts["exp/test_id.txt"].split(",")))
    visible, infrared = (
        {(i.person, c) for i, c in zip(items, cams) if i.person in tested and c in part}
        for part in ((1, 2, 4, 5), (3, 6))
    )
    assert (len(tested), len(visible), len(infrared)) == (96, 301, 192)
    assert sum(c in (1, 2) for _, c in visible) == 112
    assert sum(i.person in tested and c in (3, 6) for i, c in zip(items, cams)) == 3803
    assert sum(i.person not in tested and c in (3, 6) for i, c in zip(items, cams)) == 11909
    assert sum(i.person not in tested and c in (1, 2, 4, 5) for i, c in zip(items, cams)) == 22258


def sysu_oracle(sim, qp, gp, qc, gc):
    """The authors' rule with loops: CMC on the id-deduplicated list, AP on the full list, camera 3 ignores camera 2."""
    aps, firsts, inps = [], [], []
    for i in range(len(qp)):
        order = sorted(range(len(gp)), key=lambda j: (-sim[i][j], j))
        order = [j for j in order if not (qc[i] == 2 and gc[j] == 1)]
        line = [gp[j] for j in order]
        if qp[i] not in line:
            continue
        dedup = list(dict.fromkeys(line))
        firsts.append(dedup.index(qp[i]))
        hits = [r for r, pid in enumerate(line, start=1) if pid == qp[i]]
        aps.append(np.mean([(n + 1) / r for n, r in enumerate(hits)]))
        inps.append(len(hits) / hits[-1])
    cmc = [np.mean([f <= r for f in firsts]) for r in range(20)]
    return np.mean(aps), cmc, np.mean(inps), len(aps)


def test_sysu_metrics_equal_loops_with_the_room_rule_and_deduplication():
    rng = np.random.default_rng(5)
    q, g = unit(rng.normal(size=(12, 6))), unit(rng.normal(size=(40, 6)))
    g[7] = g[3]  # a tie
    qp, gp = rng.integers(0, 8, 12), rng.integers(0, 7, 40)
    qc, gc = rng.choice([2, 5], 12), rng.choice([0, 1, 3, 4], 40)
    m = sysu.metrics(q, g, qp, gp, qc, gc)
    mAP, cmc, inp, valid = sysu_oracle((q @ g.T).tolist(), qp, gp, qc, gc)
    assert m.num_valid == valid < 12 and abs(m.mAP - mAP) < 1e-6 and abs(m.mINP - inp) < 1e-6
    assert np.allclose(m.cmc, cmc)
    assert np.isnan(m.ap).sum() == 12 - valid


def test_sysu_camera_3_ignores_all_of_camera_2():
    q, g = unit([[1.0, 0], [1.0, 0]]), unit([[1.0, 0.01], [0, 1.0], [1.0, 0.3]])
    pids, camids = [1, 2, 1], [1, 0, 3]
    m = sysu.metrics(q, g, [1, 1], pids, [2, 5], camids)  # the best match of camera 3's query stands in camera 2
    assert m.ap.tolist() == [1.0, 1.0] and m.rank(1) == 1.0
    with pytest.raises(ValueError, match="no valid query"):
        sysu.metrics(q[:1], g[:1], [1], [1], [2], [1])


def test_sysu_bad_input_is_named(tree, tmp_path):
    with pytest.raises(FileNotFoundError, match="SYSU-MM01.*common.synthetic sysu"):
        datasets.load("sysu", tmp_path)
    for breakage, words in (
        (lambda r: shutil.rmtree(r / "cam3"), "holds no cam3"),
        (lambda r: shutil.rmtree(r / "exp"), "holds no exp"),
        (lambda r: (r / "exp" / "val_id.txt").unlink(), "val_id.txt"),
        (lambda r: (r / "exp" / "test_id.txt").write_text("1;2"), "'1;2'"),
        (lambda r: (r / "exp" / "test_id.txt").write_text("1,12"), "in train and in test"),
        (
            lambda r: [shutil.rmtree(r / f"cam{c}" / "0003") for c in (3, 6)],
            "1 training ids have no infrared images .*0003",
        ),
        (
            lambda r: [shutil.rmtree(r / f"cam{c}" / "0011") for c in (1, 2, 4, 5)],
            "1 test ids have no visible images .*0011",
        ),
    ):
        root = tmp_path / "copy"
        shutil.copytree(tree / "SYSU-MM01", root / "SYSU-MM01")
        breakage(root / "SYSU-MM01")
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            datasets.load("sysu", root)
        shutil.rmtree(root)


# ---------------------------------------------------------------------------------------------------------------- RegDB
def test_regdb_splits_are_halves_in_both_modalities(tree):
    for split in (1, 10):
        data = datasets.load("regdb", tree, split=split)
        assert len(data.train) == 36 and len(data.query) == len(data.gallery) == 18
        assert {s.modality for s in data.query} == {"rgb"} and {s.modality for s in data.gallery} == {"ir"}
        assert not {s.path for s in data.train} & {s.path for s in data.query + data.gallery}


def test_people_are_counted_once_also_where_both_halves_are_numbered_from_zero(tree):
    assert inputs.count_ids(datasets.load("regdb", tree)) == 12  # 6 + 6, each half numbered 0 to 5
    assert inputs.count_ids(datasets.load("sysu", tree)) == 14

    def data(train, query, gallery):
        parts = ([datasets.Sample(f"{i}", pid, 0) for i, pid in enumerate(pids)] for pids in (train, query, gallery))
        return datasets.Dataset("x", tree, "real", *parts)

    assert inputs.count_ids(data([1, 1, 2], [3], [3, 0, -1])) == 3  # neither distractors nor junk
    assert inputs.count_ids(data([0, 1], [0, 2], [0, 2, -1])) == 4  # 0 is a person where a query has it
    assert inputs.count_ids(data([-1, -1], [], [])) == 0


def test_regdb_metrics_are_ordinary_cmc_without_a_camera_rule():
    rng = np.random.default_rng(0)
    q, g = unit(rng.normal(size=(9, 4))), unit(rng.normal(size=(15, 4)))
    qp, gp = np.arange(9) % 5, np.arange(15) % 5
    m, aps = regdb.metrics(q, g, qp, gp), []
    for i in range(9):
        order = np.argsort(-(q[i] @ g.T).numpy(), kind="stable")
        hits = np.flatnonzero(gp[order] == qp[i])
        aps.append(np.mean(np.arange(1, len(hits) + 1) / (hits + 1)))
    assert abs(m.mAP - np.mean(aps)) < 1e-6 and isinstance(m, evaluation.RankMetrics)


def test_regdb_bad_input_is_named(tree, tmp_path):
    with pytest.raises(ValueError, match="split 11"):
        datasets.load("regdb", tree, split=11)
    idx = "idx/test_thermal_1.txt"
    good = (tree / "RegDB" / idx).read_text()
    for text, words in (
        (None, "no .*test_thermal_1.txt"),
        ("", "is empty"),
        ("Thermal/1/0.bmp\n", "line 1 is"),
        (good.replace("Thermal/", "Visible/"), "expected an image under Thermal/"),
        (good.replace("/0.bmp", "/99.bmp"), "is not under"),
        ("".join(good.splitlines(True)[3:]), "one modality only"),
    ):
        root = tmp_path / "copy"
        shutil.copytree(tree / "RegDB", root / "RegDB")
        (root / "RegDB" / idx).unlink() if text is None else (root / "RegDB" / idx).write_text(text)
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            datasets.load("regdb", root)
        shutil.rmtree(root)
    (tmp_path / "RegDB" / "Visible").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="holds no Thermal and no idx"):
        datasets.load("regdb", tmp_path)


# ------------------------------------------------------------------------------------------------------------- LUPerson
def test_luperson_folder_is_read_recursively_and_subset_is_seeded(tree):
    data = datasets.load("luperson", tree)
    assert len(data.train) == 40 and not data.query and [s.pid for s in data.train] == list(range(40))
    some = subset(data.train, 10, 0)
    assert some == subset(data.train, 10, 0) != subset(data.train, 10, 1) and some == sorted(some, key=lambda s: s.path)
    assert subset(data.train, 0, 0) == data.train
    with pytest.raises(ValueError, match="only 40"):
        subset(data.train, 41, 0)


# ------------------------------------------------------------------------------------------------------------------- -C
def corrupted(tree, tmp_path, workers, blocks, **options):
    samples = datasets.load("sysu", tree).gallery[:14]
    store = images.open_images([s.path for s in samples], 64, 32, cache_dir=tmp_path, workers=1)
    copy = CorruptedStore(store, 3, **options)
    out = [x.clone() for x, _ in images.batches(copy, blocks, "cpu", workers=workers)]
    return torch.cat(out), store


def test_the_corrupted_benchmark_depends_on_neither_workers_nor_batches_nor_processes(tree, tmp_path):
    whole, store = corrupted(tree, tmp_path, 0, [np.arange(14)])
    for workers, blocks in ((2, np.array_split(np.arange(14), 5)), (0, [[i] for i in range(14)])):
        assert torch.equal(corrupted(tree, tmp_path, workers, blocks)[0], whole)
    assert torch.equal(corrupted(tree, tmp_path, 0, [np.arange(1, 14, 2)])[0], whole[1::2])  # rank 1 of 2
    picked = CorruptedStore(store, 3, index=np.array([4, 9]))
    assert torch.equal(picked.gather(np.arange(2)), whole[[4, 9]])
    assert not torch.equal(CorruptedStore(store, 4).gather(np.arange(14)), whole)


def test_corrupted_images_are_the_draw_of_seed_repetition_and_image(tree, tmp_path):
    whole, store = corrupted(tree, tmp_path, 0, [np.arange(14)])
    for i in (0, 13):
        rng = np.random.default_rng(np.random.SeedSequence([0, 3, i]))
        name, severity = corruptions.BENCH20[int(rng.integers(20))], int(rng.integers(1, 6))
        want = corruptions.corrupt(store.gather([i])[0].permute(1, 2, 0).numpy(), name, severity, rng)
        assert np.array_equal(whole[i].permute(1, 2, 0).numpy(), want)
    dark, _ = corrupted(tree, tmp_path, 0, [np.arange(14)], types=("brightness",), severity=5)
    assert (dark.int() - store.gather(np.arange(14)).int()).min() >= 0
