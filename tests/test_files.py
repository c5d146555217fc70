"""Folders of images as they are outside: links, leftovers of other systems, suffixes; lists in other encodings."""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import write_market
from dapg_trees import write_regdb, write_sysu
from PIL import Image
from scipy.io import savemat

from common import datasets, own_images
from common.datasets import __main__ as command
from common.datasets import files, lists
from pixel_sampling import parse
from prsnet import test as prsnet_test

pytestmark = pytest.mark.filterwarnings("ignore:.*instead of the published")


def put(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 16)).save(root / name)
    return root


def listed(root: Path, **options) -> list[str]:
    return [os.path.relpath(path, root) for path in files.images(root, **options)]


def said(call) -> str:
    """The one warning of what was left out, after the folder's name; "" for none."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    messages = [str(one.message) for one in found if one.category is files.LeftOut]
    assert len(messages) < 2
    return messages[0].partition("left out ")[2] if messages else ""


# ------------------------------------------------------------------------------------------------------------- folders


def test_links_are_followed_each_folder_once_and_endless_ones_end(tmp_path):
    root, disk = put(tmp_path / "data", "own/a.jpg"), put(tmp_path / "disk2", "b.jpg", "deep/c.jpg")
    (root / "part2").symlink_to(disk)
    (root / "file.jpg").symlink_to(disk / "b.jpg")
    assert listed(root) == ["file.jpg", "own/a.jpg", "part2/b.jpg", "part2/deep/c.jpg"]
    (disk / "up").symlink_to(root)  # endless
    (root / "again").symlink_to(root / "own")
    (root / "below").symlink_to(disk / "deep")  # sorts before part2, through which it can be reached too
    (root / "gone").symlink_to(tmp_path / "unmounted")
    text = said(lambda: listed(root))
    assert listed(root) == ["below/c.jpg", "file.jpg", "own/a.jpg", "part2/b.jpg"]
    assert (
        "links to folders that are read already: 2 (again, up)" in text and "links that lead nowhere: 1 (gone)" in text
    )
    (root / "own/broken.jpg").symlink_to(tmp_path / "gone.jpg")
    assert "own/broken.jpg" in listed(root)  # an image that is not there is an error when it is read


def test_what_other_systems_leave_behind_is_counted_and_no_person(tmp_path):
    put(tmp_path, "a.jpg", "@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", ".ipynb_checkpoints/a-checkpoint.jpg",
        "__MACOSX/._a.jpg", "#recycle/old.jpg", "lost+found/1.jpg", ".hidden/a.png", "sub/._b.jpg", "sub/b.JPG",
        "sub/Thumbs.db/c.jpg", "$RECYCLE.BIN/d.png", ".reid_cache/e.png")  # fmt: skip
    (tmp_path / "SYNTHETIC").touch()
    assert listed(tmp_path) == ["a.jpg", "sub/b.JPG"]
    assert said(lambda: listed(tmp_path)) == "hidden or system entries: 9 (#recycle, $RECYCLE.BIN, ._b.jpg, ...)"
    assert said(lambda: listed(put(tmp_path / "clean", "a.jpg"))) == ""


def test_every_suffix_that_pillow_reads_is_an_image_and_the_others_are_named(tmp_path):
    put(tmp_path, "a.WEBP", "b.tif", "c.gif", "d.JPE", "e.ppm", "f.jfif")
    for name in ("phone.heic", "notes.txt", "page.pdf", "drawing.eps", "weights.h5"):
        (tmp_path / name).touch()
    assert listed(tmp_path) == ["a.WEBP", "b.tif", "c.gif", "d.JPE", "e.ppm", "f.jfif"]
    assert said(lambda: listed(tmp_path)) == "files that are no images: 5 (drawing.eps, notes.txt, page.pdf, ...)"


def test_order_is_by_relative_path_with_slashes(tmp_path):
    put(tmp_path, "b/a.jpg", "b-a.jpg", "b.jpg", "a.jpg")
    assert listed(tmp_path) == ["a.jpg", "b-a.jpg", "b.jpg", "b/a.jpg"]
    assert listed(tmp_path, deep=False) == ["a.jpg", "b-a.jpg", "b.jpg"]
    assert said(lambda: listed(tmp_path, deep=False)) == "folders: 1 (b)"


def test_all_places_that_list_images_use_the_rule(tmp_path):
    """LUPerson, crops, Market, SYSU, PRCC, one's own images, parsing, reconstructions."""
    junk = ("@eaDir/t.jpg", "._x.jpg")
    root = put(tmp_path / "LUPerson", "part1/a.jpg", *(f"part1/{name}" for name in junk))
    (root / "part2").symlink_to(put(tmp_path / "elsewhere", "b.webp"))
    two = [str(root / "part1/a.jpg"), str(root / "part2/b.webp")]
    with pytest.warns(files.LeftOut):
        assert [s.path for s in datasets.load("luperson", tmp_path).train] == two
    with pytest.warns(files.LeftOut):
        assert own_images.listed("--gallery", str(root)) == two
    with pytest.warns(files.LeftOut):
        assert [str(image) for image, _ in parse.listed(root, tmp_path / "masks")] == two
    crops = put(tmp_path / "prsnet_pretrain", "mix/a.jpg", *(f"mix/{name}" for name in junk))
    (crops / "coco").symlink_to(tmp_path / "elsewhere")
    (crops / "manifest.jsonl").write_text("{}\n{}\n")
    with pytest.warns(files.LeftOut):
        found = datasets.load("person_crops", tmp_path)
    assert [(os.path.basename(s.path), s.camid) for s in found.train] == [("b.webp", 0), ("a.jpg", 1)]
    write_sysu(tmp_path)
    before = datasets.load("sysu", tmp_path)
    put(tmp_path / "SYSU-MM01/cam1/0001", *junk)
    person = tmp_path / "SYSU-MM01/cam2/0001"
    person.rename(tmp_path / "moved")
    person.symlink_to(tmp_path / "moved")
    with pytest.warns(files.LeftOut):
        assert datasets.load("sysu", tmp_path) == before
    names = ("train/001/A_1.jpg", "test/A/002/1.jpg", "test/B/002/1.jpg", "test/C/002/1.jpg")
    put(tmp_path / "prcc/rgb", *names, *(f"test/A/002/{name}" for name in junk))
    with pytest.warns(files.LeftOut):
        assert len(datasets.load("prcc", tmp_path).gallery) == 1
    args = prsnet_test.parse_args(["--weights", "w", "--images", str(root)])
    with pytest.warns(files.LeftOut):
        assert prsnet_test.pictures(None_run(), args, (8, 4)).shape == (2, 3, 8, 4)


class None_run:
    """What `pictures` needs of a run."""

    device = "cpu"


def test_a_folder_of_leftovers_of_a_whole_camera_gives_one_warning(tmp_path):
    write_sysu(tmp_path)
    for pid in range(1, 9):
        (tmp_path / f"SYSU-MM01/cam1/{pid:04d}/Thumbs.db").touch()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        datasets.load("sysu", tmp_path)
    messages = [str(one.message) for one in found if one.category is files.LeftOut]
    assert len(messages) == 1 and "hidden or system entries: 8" in messages[0]


def test_the_check_says_what_was_left_out_and_runs_without_threads(tmp_path, capsys):
    root = write_market(tmp_path, train_ids=2, test_ids=1) / "market1501"
    (root / "query" / "Thumbs.db").touch()
    with pytest.warns(files.LeftOut, match="query: left out hidden or system entries: 1 .Thumbs.db"):
        assert command.main(["check", "market", "--data-dir", str(tmp_path), "-j", "0"]) == 0
    assert "0 broken" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.parse_args(["check", "market", "-j", "-1"])
    assert "--workers must be at least 0, not -1" in capsys.readouterr().err


def gbk(folder: Path, name: str) -> Path:
    """An image whose name is GBK bytes, as it comes out of a Chinese zip."""
    put(folder, "a.jpg")
    place = Path(os.fsdecode(os.fsencode(folder) + b"/" + name.encode("gbk")))
    os.rename(folder / "a.jpg", place)
    return place


def test_names_that_are_no_utf8_can_be_listed_checked_and_printed(tmp_path, capsys):
    place = gbk(tmp_path / "LUPerson", "\u4eba.jpg")
    place.write_bytes(b"no image")
    assert command.main(["check", "luperson", "--data-dir", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "\u4eba.jpg: cannot be decoded" in out and "1 images opened, 1 broken" in out
    assert (
        files.shown(os.fsdecode(b"a\xff.jpg")) == "a\\xff.jpg" and files.shown("\u4eba\u00e9.jpg") == "\u4eba\u00e9.jpg"
    )


# --------------------------------------------------------------------------------------------------------------- lists
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "gbk"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_text_in_every_encoding_and_line_end_is_read(tmp_path, encoding):
    names = "Visible/\u4eba/1.bmp" if encoding not in ("utf-16-le", "utf-16-be") else "Visible/1/1.bmp"
    content = f"  .\\{names.replace('/', chr(92))}  7\r\n\r\n{names}\t12\r{names} 3\n"
    (tmp_path / "a.txt").write_bytes(content.encode(encoding))
    found = [(number, *lists.path_and_label(line)) for number, line in lists.lines(tmp_path / "a.txt")]
    assert found == [(1, names, 7), (3, names, 12), (4, names, 3)]


@pytest.mark.parametrize("line", ["a.bmp", "a.bmp x", "a.bmp -1", "a.bmp \u00b2", ""])
def test_a_line_without_a_number_is_none(line):
    assert lists.path_and_label(line) is None


WRONG = {
    "a web page": b"\xef\xbb\xbf\n<!DOCTYPE html><html>",
    "a zip archive": b"PK\x03\x04rest",
    "a gzip archive": b"\x1f\x8b\x08rest",
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "a MATLAB file": b"MATLAB 5.0 MAT-file, Platform: GLNX86",
    "no text in UTF-8": b"\x00\x01\x02\xff\xfe\x00\x00\x81",
}


@pytest.mark.parametrize("kind", WRONG)
def test_lists_of_another_format_are_named_by_every_data_set(tmp_path, kind):
    write_regdb(write_sysu(tmp_path))
    lines = {"train": "0000/0000_000_01_x_0_0.jpg 0", "val": "0000/0000_000_01_x_0_1.jpg 0"}
    for name in ("train", "val", "query", "gallery"):
        put(tmp_path / "MSMT17_V1", "train/x.jpg", "test/x.jpg")
        (tmp_path / f"MSMT17_V1/list_{name}.txt").write_text(lines.get(name, lines["val"]))
    places = {
        "sysu": "SYSU-MM01/exp/val_id.txt",
        "regdb": "RegDB/idx/test_thermal_1.txt",
        "msmt17": "MSMT17_V1/list_val.txt",
    }
    for name, place in places.items():
        (tmp_path / place).write_bytes(WRONG[kind])
        with pytest.raises(ValueError, match=f"{tmp_path / place} is .*{kind}"):
            datasets.load(name, tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_lists_of_windows_give_the_same_data_sets(tmp_path, encoding):
    write_regdb(write_sysu(tmp_path))
    before = [datasets.load(name, tmp_path) for name in ("sysu", "regdb")]
    for file in sorted(tmp_path.glob("*/*/*.txt")):
        text = file.read_text()
        text = text.replace("/", "\\").replace(" ", "  \t") if "idx" in file.parts else text.replace(",", ", ")
        file.write_bytes(text.replace("\n", "\r\n").encode(encoding))
    assert [datasets.load(name, tmp_path) for name in ("sysu", "regdb")] == before


@pytest.mark.parametrize("on_disk", ["utf-8", "gbk"])
@pytest.mark.parametrize("in_list", ["utf-8", "gbk"])
def test_listed_names_are_found_in_the_spelling_of_the_disk(tmp_path, on_disk, in_list):
    place = put(tmp_path, "\u4eba.jpg") / "\u4eba.jpg" if on_disk == "utf-8" else gbk(tmp_path, "\u4eba.jpg")
    (tmp_path / "list.txt").write_bytes("\u4eba.jpg 3\n".encode(in_list))
    ((_, line),) = lists.lines(tmp_path / "list.txt")
    assert lists.place(tmp_path, lists.path_and_label(line)[0]) == place
    apart = put(tmp_path / "mac", "e\u0301.jpg") / "e\u0301.jpg"
    assert (
        lists.place(tmp_path / "mac", "\u00e9.jpg") == apart
        and lists.place(tmp_path, "gone.jpg") == tmp_path / "gone.jpg"
    )


# --------------------------------------------------------------------------------------------------- the .mat of cuhk03
NAMES = ["1_001_1_01.png", "1_001_2_06.png", "1_002_1_01.png", "1_002_2_06.png", "2_001_1_01.png"]
LISTS = {
    "filelist": np.array([[name] for name in NAMES], dtype=object),
    "labels": np.array([[1], [1], [2], [2], [3]]),
    "train_idx": np.array([[2], [1]]),
    "query_idx": np.array([[3]]),
    "gallery_idx": np.array([[4], [5]]),
}
LIST = "cuhk03_new_protocol_config_detected.mat"


@pytest.mark.parametrize("images", ["", "cuhk03_release/"])
@pytest.mark.parametrize("place", ["", "cuhk03_release/"])
@pytest.mark.parametrize("tree", ["", "cuhk03"])
def test_cuhk03s_lists_lie_inside_or_beside_its_release(tmp_path, tree, place, images):
    put(tmp_path / tree, *(f"{images}images_detected/{name}" for name in NAMES))
    (tmp_path / tree / place).mkdir(exist_ok=True)
    savemat(tmp_path / tree / place / LIST, LISTS)
    data = datasets.load("cuhk03", tmp_path)
    assert [(s.pid, s.camid) for s in data.train + data.query + data.gallery] == [
        (1, 0),
        (1, 1),
        (2, 0),
        (2, 1),
        (3, 0),
    ]


V73 = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(384) + b"\x89HDF\r\n\x1a\n"


@pytest.mark.parametrize(
    "change, words",
    [
        (b"<!DOCTYPE html><html>", "is a web page"),
        (V73, "HDF5 and needs a package that is not among ours"),
        (b"\x89HDF\r\n\x1a\n", "is an HDF5 file and needs"),
        (b"", "is an empty file, expected a MATLAB file"),
        (150, "is not readable as a MATLAB file"),
        (b"random text, no MATLAB file at all" * 9, "is not readable as a MATLAB file"),
        ({"train_idx": None}, "has no variable train_idx; it is another file"),
        ({"query_idx": np.array([[6]])}, "query_idx does not number its 5 images"),
        ({"query_idx": np.array([[0]])}, "query_idx does not number its 5 images"),
        ({"labels": np.array([["a"]] * 5)}, "labels does not number"),
        ({"labels": np.array([[1]])}, "1 labels for 5 images"),
        ({"filelist": np.array([["x.jpg"]] * 5, dtype=object)}, "x.jpg.*not a name like 1_001_1_01.png"),
    ],
)
def test_a_list_of_cuhk03_that_is_something_else_is_named(tmp_path, change, words):
    put(tmp_path, *(f"images_detected/{name}" for name in NAMES))
    changed = {**LISTS, **(change if isinstance(change, dict) else {})}
    savemat(tmp_path / LIST, {name: value for name, value in changed.items() if value is not None})
    if isinstance(change, (bytes, int)):
        whole = (tmp_path / LIST).read_bytes()
        (tmp_path / LIST).write_bytes(whole[:change] if isinstance(change, int) else change)
    with pytest.raises(ValueError, match=words) as caught:
        datasets.load("cuhk03", tmp_path)
    assert str(tmp_path / LIST) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["cuhk03_release", "cuhk03/cuhk03_release", "cuhk03"])
def test_where_only_the_original_archive_lies_the_way_from_it_is_said(tmp_path, place):
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "cuhk-03.mat").write_bytes(V73)
    with pytest.raises(FileNotFoundError, match=r"cuhk-03.mat is HDF5, .*h5py.*README, Datasets") as caught:
        datasets.load("cuhk03", tmp_path)
    assert str(tmp_path / place) in str(caught.value) and "\n" not in str(caught.value)
