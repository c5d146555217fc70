"""A gallery that was described before: found again to the last digit, in blocks, and refused where it is another's."""

import json
import tracemalloc

import numpy as np
import pytest
import torch
from test_own_images import ORIGIN, Mean, flags, picture

from common import feature_files, own_images

CPU = torch.device("cpu")
ROWS = [{"path": f"people/{n}.jpg", "split": "gallery"} for n in range(5)]


def write(folder, feats, rows=ROWS, **changes):
    blocks = feats.split(2) if isinstance(feats, torch.Tensor) else feats
    feature_files.write(folder, blocks, rows, {**ORIGIN, **changes}, {"gallery": Mean.form})


def read(folder, made_by=ORIGIN):
    return feature_files.Gallery(folder, made_by, Mean.form)


def test_a_described_gallery_is_ranked_as_its_folder_to_the_last_digit(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_files, "ROWS", 4)
    for place, numbers in (("query", (1, 2)), ("gallery", (5, 1, 6, 1, 2, 9, 1))):  # copies among the gallery
        for place_in_list, number in enumerate(numbers):
            picture(tmp_path / place / f"{place_in_list}.png", number)
    query, gallery = str(tmp_path / "query"), str(tmp_path / "gallery")
    own_images.run(flags(query=query, gallery=gallery), Mean(), ORIGIN, tmp_path / "folder")
    own_images.run(flags(gallery=gallery, export_features=str(tmp_path / "feats")), Mean(), ORIGIN, tmp_path)
    both = {"query": query, "gallery": gallery, "export_features": str(tmp_path / "f.npy")}
    own_images.run(flags(**both), Mean(), ORIGIN, tmp_path / "while")
    for name, place in (("described", tmp_path / "feats"), ("behind", tmp_path / "f.npy")):
        own_images.run(flags(query=query, gallery_features=str(place)), Mean(), ORIGIN, tmp_path / name)
    lists = [(tmp_path / n / "ranking.csv").read_bytes() for n in ("folder", "while", "described", "behind")]
    assert lists[0].count(b"\n") == 1 + 2 * 7 and len(set(lists)) == 1
    (tmp_path / "gallery" / "3.png").unlink()  # its features remain, its picture cannot be drawn
    own_images.run(flags(query=query, gallery_features=str(tmp_path / "feats")), Mean(), ORIGIN, tmp_path / "described")
    assert [p.name for p in (tmp_path / "described").iterdir()] == ["ranking.csv"]
    assert (tmp_path / "described" / "ranking.csv").read_bytes() == lists[0]


def test_searching_200000_rows_takes_the_memory_of_one_block(tmp_path):
    """51 MB of features, 13 MB of distances; at hand are a block of 2 MiB, its distances, and eight bytes a row."""
    n, d, q = 200_000, 64, 16
    draw = torch.Generator().manual_seed(0)
    feats = torch.randn(n, d, generator=draw)
    rows = [{"path": f"{i}.jpg", "split": "gallery"} for i in range(n)]
    feature_files.write(tmp_path, feats.split(feature_files.ROWS), rows, ORIGIN, {"gallery": Mean.form})
    query = feats[torch.arange(q) * 12_345] + 0.01 * torch.randn(q, d, generator=draw)
    wanted = torch.cdist(query.double(), feats.double())
    del feats, rows
    tracemalloc.start()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        gallery = read(tmp_path)
        own_images.rank(tmp_path / "out", ["q.jpg"] * q, gallery, query, gallery.blocks(CPU), 3)
    peak = tracemalloc.get_traced_memory()[1] + peak_of_tensors(seen)
    tracemalloc.stop()
    assert 2**20 < peak < 8 * 2**20, f"{peak / 2**20:.1f} MiB"
    lines = [line.split(",") for line in (tmp_path / "out" / "ranking.csv").read_text().splitlines()[1:]]
    assert [line[2] for line in lines] == [f"{i}.jpg" for i in wanted.topk(3, largest=False).indices.flatten().tolist()]
    assert np.allclose([float(line[3]) for line in lines], wanted.topk(3, largest=False).values.flatten(), atol=1e-3)


def peak_of_tensors(seen):
    """The most bytes that tensors of a profile held at a time."""
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(sizes).max())


def remove(name):
    return lambda folder: (folder / name).unlink()


def other_array(make):
    return lambda folder: np.save(folder / "features.npy", make(np.load(folder / "features.npy")))


def cut(folder):
    whole = (folder / "features.npy").read_bytes()
    (folder / "features.npy").write_bytes(whole[:-10])


def tell(**changes):
    def spoil(folder):
        told = json.loads((folder / "features.json").read_text())
        (folder / "features.json").write_text(json.dumps({**told, **changes}))

    return spoil


@pytest.mark.parametrize(
    "spoil, said",
    [
        (remove("features.npy"), "there is no .*features.npy"),
        (remove("features.jsonl"), "no features.jsonl, so .* was not written to its end"),
        (remove("features.json"), "no features.json, so .* was not written to its end"),
        (cut, "is damaged"),
        (lambda folder: (folder / "features.npy").write_text("hello"), "is damaged"),
        (lambda folder: (folder / "features.json").write_text("[1]"), "is damaged"),
        (lambda folder: (folder / "features.jsonl").write_text(""), "is damaged"),
        (lambda folder: (folder / "features.jsonl").write_text("{}\n" * 4), "has 4 lines for 5 features"),
        (other_array(lambda x: x.astype(np.float64)), r"holds float64 \(5, 3\) instead of float32 \(5, 3\)"),
        (other_array(lambda x: x[:4]), r"holds float32 \(4, 3\) instead of float32 \(5, 3\)"),
        (other_array(lambda x: x[:, :2]), r"holds float32 \(5, 2\)"),
        (tell(splits={"query": 5}), "describes no gallery, only query"),
        (tell(weights="another"), "another network .*: weights another instead of"),
        (tell(height=16, width=8), "height 16 instead of 8, width 8 instead of 4"),
        (tell(schema=0), "schema 0 instead of 1"),
        (tell(metric="cosine"), "metric cosine instead of euclidean"),
        (tell(forms={"gallery": "pool"}), "form pool instead of mean colour"),
    ],
)
def test_features_of_something_else_are_refused_with_path_and_remedy(tmp_path, spoil, said):
    write(tmp_path, torch.rand(5, 3))
    read(tmp_path)
    spoil(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
        read(tmp_path)
    text = str(caught.value)
    assert text.startswith(f"--gallery-features {tmp_path}: ") and "--export-features" in text and "\n" not in text


def test_nan_in_a_gallery_is_named_by_file_and_row(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_files, "ROWS", 2)
    write(tmp_path, torch.rand(5, 3))
    other_array(lambda x: np.where(np.arange(5)[:, None] == 3, np.float32("nan"), x))(tmp_path)
    gallery = read(tmp_path)
    with pytest.raises(ValueError, match=r"features.npy \(write it anew .*NaN.* first row 3"):
        own_images.rank(tmp_path / "out", ["q.jpg"], gallery, torch.rand(1, 3), gallery.blocks(CPU), 0, gallery.name)
    assert not (tmp_path / "out").exists()


def test_a_damaged_line_is_named(tmp_path):
    write(tmp_path, torch.rand(5, 3))
    (tmp_path / "features.jsonl").write_text('{"path": "a"}\n' * 3 + "no json\n" + '{"path": "b"}')
    gallery = read(tmp_path)
    assert [gallery[0], gallery[4]] == ["a", "b"]
    with pytest.raises(ValueError, match="line 4 of .*features.jsonl is damaged"):
        gallery[3]


def test_a_gallery_is_a_sequence_of_its_own_rows_alone(tmp_path):
    rows = [{"path": f"people/q{n}.jpg", "split": "query"} for n in range(2)] + ROWS
    feature_files.write(tmp_path, [torch.rand(7, 3)], rows, ORIGIN, {"query": Mean.form, "gallery": Mean.form})
    gallery = read(tmp_path)
    assert list(gallery) == [row["path"] for row in ROWS] and list(reversed(gallery)) == list(gallery)[::-1]
    assert "people/4.jpg" in gallery and "people/q1.jpg" not in gallery
    for index in (-1, 5):
        with pytest.raises(IndexError, match=f"row {index} of .*features.jsonl: its gallery has 5"):
            gallery[index]


def test_no_features_at_all_are_refused_before_a_folder_is_made(tmp_path):
    with pytest.raises(ValueError, match="new.features.npy: there are no features to write; describe at least one"):
        write(tmp_path / "new", [], [])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("block", [OSError("disk is gone"), torch.full((2, 3), torch.nan), torch.rand(1, 3)], ids=str)
def test_a_description_that_fails_leaves_the_older_one_and_no_new_folder(tmp_path, block):
    def blocks():
        yield torch.rand(2, 3)
        if isinstance(block, Exception):
            raise block
        yield block

    write(tmp_path / "old", torch.rand(5, 3))
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    for place in ("old", "new"):
        with pytest.raises((OSError, ValueError), match="disk is gone|people/2.jpg.*NaN|3 features for 5 images"):
            write(tmp_path / place, blocks())
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]


def test_what_a_killed_writer_left_is_removed_and_its_files_do_not_count(tmp_path):
    write(tmp_path, torch.rand(5, 3))
    with pytest.raises(TypeError):  # ends between the three, as a kill may
        write(tmp_path, torch.rand(5, 3), [{**row, "pid": object()} for row in ROWS])
    for name in ("features.npy.0123abcd.tmp", "features.npy.mine.tmp"):
        (tmp_path / name).write_text("torn")
    with pytest.raises(FileNotFoundError, match="not written to its end"):
        read(tmp_path)
    write(tmp_path, torch.ones(5, 3))
    assert len(read(tmp_path)) == 5 and [p.name for p in tmp_path.glob("*.tmp")] == ["features.npy.mine.tmp"]


def test_weights_flags_and_form_tell_networks_apart():
    net, flags_of_training = torch.nn.Linear(2, 2), {"height": 8, "width": 4, "arch": "a", "seed": 0, "logs_dir": "x"}
    first = own_images.origin("p", net, flags_of_training)
    assert first == own_images.origin("p", net, {**flags_of_training, "logs_dir": "y", "workers": 3})
    moved = torch.nn.Linear(2, 2)
    moved.load_state_dict(net.state_dict())
    assert first == own_images.origin("p", moved, flags_of_training)
    with torch.no_grad():
        moved.bias[1] += 1e-6
    assert first["weights"] != own_images.origin("p", moved, flags_of_training)["weights"]
    assert first["training"] != own_images.origin("p", net, {**flags_of_training, "arch": "b"})["training"]
