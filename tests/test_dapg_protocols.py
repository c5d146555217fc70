"""The protocols: what is compared with what, clean and -C, against loops; and which network test.py measures."""

import numpy as np
import pytest
import torch
from dapg_runs import data_dir, finetuning, run_main
from matplotlib.figure import Figure
from torch.nn.functional import normalize

from common import checkpoints, flags, images, transforms
from common.datasets import regdb, sysu
from dapg import figures, test
from dapg.data import CorruptedStore
from dapg.downstream import protocols
from dapg.noise import corruptions
from results import tables

FLAGS = ["--weights", "none", "--batch-size", 32, "--epochs", 1]


@pytest.fixture(scope="module", params=["sysu", "regdb"])
def measured(request):
    """(name, network, data, metrics of one draw of -C and clean)."""
    _, run, model, _, data = finetuning(data_dir(), "--stage", "agw", "--dataset", request.param, *FLAGS)
    with torch.no_grad():  # the neck turns the features, so that pool and bn rank differently
        model.neck.running_mean.uniform_(0, 2, generator=torch.Generator().manual_seed(3))
    metrics = protocols.evaluate(run, model.eval(), data, "agw", True, protocols.Corruption(draws=2))
    return request.param, model, data, metrics


def described(network, pixels: list[torch.Tensor], modality: str) -> dict[str, torch.Tensor]:
    """Unit pool and bn features of uint8 images (3, H, W), one by one."""
    with torch.no_grad():
        pooled = []
        for image in pixels:
            x = transforms.normalize(image[None])
            pooled.append(network.pooled(*((x, None) if modality == "rgb" else (None, x))))
        pooled = torch.cat(pooled)
        return {"pool": normalize(pooled), "bn": normalize(network.neck(pooled))}


def all_pixels(store) -> list[torch.Tensor]:
    return list(store.gather(np.arange(len(store))).clone())


def noisy(store, repetition: int) -> list[torch.Tensor]:
    """Every image with the type, severity and noise that (seed 0, repetition, image) draws."""
    out = []
    for i, image in enumerate(all_pixels(store)):
        rng = np.random.default_rng(np.random.SeedSequence([0, repetition, i]))
        name, severity = corruptions.BENCH20[int(rng.integers(20))], int(rng.integers(1, 6))
        spoiled = corruptions.corrupt(image.permute(1, 2, 0).numpy(), name, severity, rng)
        out.append(torch.from_numpy(spoiled.transpose(2, 0, 1).copy()))
    return out


def test_clean_and_corrupted_metrics_are_those_of_the_protocol_written_out(measured):
    name, network, data, metrics = measured
    visible, infrared = data.parts["rgb"], data.parts["ir"]
    pids = {part: np.array([s.pid for s in samples]) for part, samples in (("rgb", visible), ("ir", infrared))}
    camids = {part: np.array([s.camid for s in samples]) for part, samples in (("rgb", visible), ("ir", infrared))}
    ir = described(network, all_pixels(data.stores["ir"]), "ir")
    first = data.split if name == "regdb" else 0  # of the corruption's repetitions; RegDB's second is split + 10
    spoiled = [noisy(data.stores["rgb"], r) for r in ((first, first + 10) if name == "regdb" else (0, 1))]
    rgb = {"": [described(network, all_pixels(data.stores["rgb"]), "rgb")]}
    rgb["_c"] = [described(network, pixels, "rgb") for pixels in spoiled]
    want = {}
    for kind in ("pool", "bn"):
        for ending, copies in rgb.items():
            if name == "regdb":
                there = [regdb.metrics(x[kind], ir[kind], pids["rgb"], pids["ir"]) for x in copies]
                back = [regdb.metrics(ir[kind], x[kind], pids["ir"], pids["rgb"]) for x in copies]
                want[f"{kind}.v2t{ending}"], want[f"{kind}.t2v{ending}"] = there, back
                continue
            for mode in ("all", "indoor"):
                trials = range(10) if not ending else range(len(copies))
                want[f"{kind}.{mode}{ending}"] = [
                    sysu.metrics(
                        ir[kind], copies[t if ending else 0][kind][drawn], pids["ir"], pids["rgb"][drawn], camids["ir"],
                        camids["rgb"][drawn],
                    )
                    for t in trials
                    for drawn in [sysu.gallery_trial(visible, mode, t)]
                ]  # fmt: skip
    for key, trials in want.items():
        assert metrics[f"{key}.mAP"] == pytest.approx(np.mean([t.mAP for t in trials]), abs=1e-4), key
        assert metrics[f"{key}.rank1"] == pytest.approx(np.mean([t.rank(1) for t in trials]), abs=1e-4), key
    values = [metrics[f"{key}.mAP"] for key in want if key.startswith("pool")]
    assert len({round(value, 3) for value in values}) == len(values) == 4  # so that none can stand for another
    clean, spoilt = ("v2t", "v2t_c") if name == "regdb" else ("all", "all_c")
    assert metrics[f"{clean}.mAP"] == metrics[f"bn.{clean}.mAP"]  # AGW's published clean numbers
    assert metrics[f"{spoilt}.mAP"] == metrics[f"pool.{spoilt}.mAP"]


def test_a_table_of_agws_clean_numbers_and_figure_1_say_which_feature_they_are_of(monkeypatch, tmp_path):
    """And the table of -C has clean numbers of its own feature beside."""
    project = tables.load(flags.ROOT, "dapg", tmp_path)
    for table in project.tables:
        clean = {column.metric for column in table.columns} & {"all.rank1", "v2t.rank1"}
        assert any("AGW's clean cells are of the feature after BNNeck" in note for note in table.notes) or not clean
    (spoilt,) = (table for table in project.tables if table.id == "table2-cpu")
    groups = [[column.metric for column in spoilt.columns[i : i + 2]] for i in range(0, 12, 3)]
    assert groups == [[f"pool.{name}.rank1", f"{name}_c.rank1"] for name in ("all", "indoor", "v2t", "t2v")]
    said, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: said.append(self.axes[0].get_xlabel()) or save(self, *a, **k)
    )
    assert figures.figure1(None, tmp_path).is_file()
    assert "AGW's clean bars are of the feature after BNNeck" in said[0]


def test_test_py_measures_the_network_of_the_result(tmp_path):
    """With select=best_test the best epoch's, which the checkpoint holds beside the last one's."""
    flags = ["--stage", "agw", "--dataset", "regdb", *FLAGS, "--iters", 1, "--variant", "draws=1"]
    run_main(data_dir(), tmp_path, *flags, "select=best_test")
    (file,) = tmp_path.rglob("checkpoint_0001.pt")
    state = checkpoints.read(file)
    state["extra"]["best"]["state"]["classifier.weight"] += 1.0  # as if an earlier epoch had been better
    torch.save(state, file)
    network, trained, _ = test.load_network(str(file.parent))
    assert torch.equal(network.classifier.weight, state["extra"]["best"]["state"]["classifier.weight"])
    state["args"]["variant"] = ["draws=1"]
    torch.save(state, file)
    network, trained, _ = test.load_network(str(file.parent))
    assert torch.equal(network.classifier.weight, state["state_dict"]["classifier.weight"])


def test_a_checkpoints_settings_meet_this_command_lines_data_and_place():
    trained = dict(stage="agw", dataset="sysu", data_dir="there", synthetic="small", split=None, height=288, workers=4)
    words = "--checkpoint x --data-dir here --real --workers 0 --dataset regdb --split 3".split()
    found = flags.of_test(test.parse_args(words), trained, "split", "logs_dir")
    assert (found.dataset, found.data_dir, found.synthetic, found.split) == ("regdb", "here", None, 3)
    assert (found.height, found.stage, found.workers, found.compile) == (288, "agw", 0, False)


def test_corrupted_images_are_made_in_loader_processes_without_their_store():
    """Whose gather uses the GPU: here it raises in any process."""
    _, _, _, _, data = finetuning(data_dir(), "--stage", "agw", "--dataset", "regdb", *FLAGS)
    store = data.stores["rgb"]
    want = CorruptedStore(store, 1).gather(np.arange(4)).clone()
    copy = CorruptedStore(store, 1)

    def gather(indices):
        raise AssertionError("a loader process asks the store")

    store.gather = gather
    found = torch.cat([pixels.clone() for pixels, _ in images.batches(copy, [[0, 1], [2, 3]], "cpu", workers=1)])
    assert torch.equal(found, want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cache", ["disk", "device", "off"])
def test_corrupted_images_are_the_same_from_every_cache_of_a_gpu(cache):
    flags = ["--stage", "agw", "--dataset", "regdb", *FLAGS]
    want = CorruptedStore(finetuning(data_dir(), *flags)[4].stores["rgb"], 1, index=np.array([1, 4]))
    copy = CorruptedStore(finetuning(data_dir(), *flags, "--cache", cache)[4].stores["rgb"], 1, index=np.array([1, 4]))
    found = [pixels for pixels, _ in images.batches(copy, [[0, 1]], "cuda", workers=2)]
    assert torch.equal(found[0].cpu(), want.gather(np.arange(2)).cpu())
