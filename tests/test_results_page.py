"""results/index.html: one page without other files, that shows what the README shows and leads to the result files."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
from miniature import result
from PIL import Image

from common.visualize import Curve
from results import page, render, schema, svg, tables

ROOT = Path(__file__).resolve().parents[1]
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Reader(HTMLParser):
    """Text, tags with attributes and the tags that are left open or close another."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.open, self.faults = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append((tag, self.getpos()))

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def real():
    return (ROOT / "results" / page.NAME).read_text(encoding="utf-8")


def show(root):
    assert render.main(["--record"], root) == 0
    return (root / "results" / page.NAME).read_text(encoding="utf-8")


def numbers(markdown):
    """The numbers in the cells of markdown tables, without links, marks and footnotes."""
    cells = [cell for line in markdown.splitlines() if line.startswith("|") for cell in line.strip("|").split("|")]
    plain = [re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", cell) for cell in cells]
    return set(re.findall(r"[+−]?\d+\.\d+(?: ± \d+\.\d+)?", "\n".join(plain)))


# ------------------------------------------------------------------------------------------------------- the real page


def test_every_number_of_the_readme_is_on_the_page(real):
    shown = " ".join(Reader(real).words)
    wanted = numbers((ROOT / "results" / "README.md").read_text(encoding="utf-8"))
    assert len(wanted) > 300
    assert sorted(number for number in wanted if number not in shown) == []


def test_the_page_parses_and_closes_every_tag(real):
    reader = Reader(real)
    assert reader.faults == [] and reader.open == []
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_page_loads_nothing_and_runs_nothing(real):
    reader = Reader(real)
    assert reader.all("script") == reader.all("link") == reader.all("iframe") == []
    assert all(attributes["src"].startswith("data:image/jpeg;base64,") for attributes in reader.all("img"))
    assert not re.search(r"@import|url\(|\bon\w+=", re.sub(r'src="data:[^"]*"', "", real))
    assert not any(k in attributes for _, attributes in reader.tags for k in ("srcset", "background", "poster"))
    assert len(real) < 3_000_000


def test_every_link_leads_to_a_file_or_a_place_on_the_page(real):
    reader = Reader(real)
    places = {"#" + attributes["id"] for _, attributes in reader.tags if "id" in attributes}
    targets = {attributes["href"] for attributes in reader.all("a")}
    inside = {target for target in targets if target.startswith("#")}
    assert inside - places == set() and len(inside) > 30
    files = {unquote(target) for target in targets - inside if not re.match(r"[a-z]+:", target)}
    assert sorted(file for file in files if not (ROOT / "results" / file).exists()) == []
    results = {path.relative_to(ROOT / "results").as_posix() for path in (ROOT / "results").glob("*/*/**/seed*.json")}
    listed = {link for link in files if link.endswith(".json")} | {
        path for path in results if path.rpartition("/")[0] in files
    }
    assert results - listed == set()


def test_the_five_papers_are_in_the_navigation_and_every_picture_is_described(real):
    reader = Reader(real)
    projects = schema.projects(ROOT)
    assert len(projects) == 5
    assert {f"#{name}" for name in projects} <= {attributes["href"] for attributes in reader.all("a")}
    assert all(attributes["alt"].strip() for attributes in reader.all("img"))


def test_dark_light_narrow_and_print_are_styled(real):
    for words in ("prefers-color-scheme: dark", "@media print", "overflow-x: auto", "position: sticky"):
        assert words in real
    light, dark = re.findall(r":root \{(.*?)\}", real, re.DOTALL)[:2]
    names = re.compile(r"(--[\w-]+):")
    assert set(names.findall(light)) == set(names.findall(dark))


# ------------------------------------------------------------------------------------------------- a page of our making


def test_a_number_leads_to_its_file_and_shows_its_command(root):
    result(root, command='python fake/train.py --row "table2/market" --note <b>')
    reader = Reader(show(root))
    (link,) = [a for a in reader.all("a") if a["href"] == "fake/market/table2/market/seed0.json" and "title" in a][:1]
    assert link["title"] == 'python fake/train.py --row "table2/market" --note <b>'
    assert "79.1" in reader.words and "+0.3" in reader.words and "−0.9" in reader.words
    assert reader.words.count(link["title"]) >= 1  # listed below the table too


def test_synthetic_numbers_stand_in_lines_of_their_own_without_a_difference(root):
    result(root, data="market-synthetic-small", metrics={"mAP": 0.4321, "rank1": 0.5}, args__lr=0.3)
    text = show(root)
    line = re.search(r'<tr class="synthetic">.*?</tr>', text)[0]
    assert "43.2" in line and ">synthetic small<" in line and "* n=1" in line
    assert "43.2" not in re.sub(r'<tr class="synthetic">.*?</tr>', "", text).partition("<svg")[0]
    assert 'class="difference"' not in text and "--lr 0.3 (row: 0.1)" in text


def test_texts_are_escaped(root):
    layout = (root / "fake" / "tables.yaml").read_text()
    layout = layout.replace("two columns are swapped in the paper", '"<script>alert(1)</script> & `a<b`"')
    (root / "fake" / "tables.yaml").write_text(layout.replace("title: Unsupervised", 'title: "A < B & C"'))
    (root / "fake" / "README.md").write_text("# Fake <i>\n")
    reader = Reader(show(root))
    assert reader.all("script") == reader.all("i") == [] and reader.faults == []
    assert "<script>alert(1)</script> & " in reader.words and "a<b" in reader.words
    assert "Table 2. A < B & C" in reader.words and "Fake <i>" in reader.words


def test_logs_sweeps_and_ranks_become_curves_that_parse(root):
    ranks = {"mAP": 0.79, "rank1": 0.9, "rank5": 0.95, "rank10": 0.97, "before.rank1": 0.1}
    path = result(root, metrics=ranks)
    result(root, row="extra")
    lines = {"epoch": 1, "loss": 2.5, "mAP": 0.2}, {"epoch": 2, "loss": 1.5, "mAP": 0.4, "once.mAP": 0.5}
    path.with_suffix(".log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = show(root)
    charts = re.findall(r"<svg.*?</svg>", text)
    assert [ElementTree.fromstring(chart).attrib["aria-label"] for chart in charts] == [
        "mAP (%) by eps",
        "rank-k (%) by k",
        "loss by epoch",
        "mAP (%) by epoch",
    ]  # one point of once.mAP is no curve
    assert text.count("Training curves") == 2 and 'fake-cmc"' in text


def test_rank_curves_are_means_over_the_seeds_of_a_row(root):
    for seed, first in enumerate((0.5, 0.7)):
        result(root, seed=seed, metrics={"mAP": 0.5, "rank1": first, "rank5": 0.8, "rank10": 0.9})
    loaded = tables.load(root, "fake")
    text = page._cmc(loaded)
    assert text.count("<path d=") == 1 and "table2/market, mean of 2" in text
    alone = page._cmc(tables.Project("fake", [], loaded.results[:1], [], []))
    assert svg.chart([Curve("x", [1, 5, 10], [60.0, 80.0, 90.0])], "k", "rank-k (%)") in text != alone


def test_a_curve_is_drawn_at_its_numbers():
    chart = ElementTree.fromstring(svg.chart([Curve("a<b", [1, 2, 3], [10.0, 30.0, 20.0])], "epoch", 'loss "x"'))
    spots = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in chart.iter("circle")]
    (x1, y1), (x2, y2), (x3, y3) = spots
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.11) and y2 < y3 < y1
    assert (y1 - y3) == pytest.approx((y1 - y2) / 2, abs=0.11)
    assert all(0 < x < svg.WIDTH and 0 < y < svg.HEIGHT for x, y in spots)
    labels = {t.text: (float(t.attrib["x"]), float(t.attrib["y"])) for t in chart.iter("text")}
    assert labels["2"][0] == pytest.approx(x2, abs=0.11) and labels["20"][1] - 3 == pytest.approx(y3, abs=0.11)


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [1e-7, 3e-7], [-2.0, 1e6]])
def test_a_curve_of_one_value_or_an_odd_range_has_finite_places(values):
    text = svg.chart([Curve("a", list(range(len(values))), values)], "x", "y")
    assert "nan" not in text and "inf" not in text and ElementTree.fromstring(text) is not None


def test_pictures_of_a_project_are_shown_with_the_readmes_caption(root):
    figures = root / "results" / "figures"
    figures.mkdir()
    Image.effect_noise((2400, 1600), 90).convert("RGB").save(figures / "fake-rank_list.png")
    Image.new("RGBA", (60, 40), (200, 0, 0, 128)).save(figures / "fake-heat-maps.png")
    (root / "fake" / "README.md").write_text("# Fake\n\n![Right ones green](../results/figures/fake-rank_list.png)\n")
    text = show(root)
    images = {image["alt"]: image for image in Reader(text).all("img")}
    assert set(images) == {"Right ones green", "heat maps"}
    large = images["Right ones green"]
    assert int(large["width"]) <= page.WIDEST and int(large["width"]) / int(large["height"]) == pytest.approx(1.5, 0.01)
    assert (images["heat maps"]["width"], images["heat maps"]["height"]) == ("60", "40")
    assert len(text) < 3_000_000


def test_the_check_covers_the_page_but_not_the_bytes_of_pictures(root, capsys):
    figures = root / "results" / "figures"
    figures.mkdir()
    Image.new("RGB", (60, 40), "red").save(figures / "fake-a.png")
    path, text = root / "results" / page.NAME, show(root)
    assert render.main(["--check"], root) == 0 and show(root) == text
    path.write_text(text.replace("base64,", "base64,AAAA"), encoding="utf-8")
    assert render.main(["--check"], root) == 0  # another encoder
    path.write_text(text.replace("78.8", "79.8"), encoding="utf-8")
    assert render.main(["--check"], root) == 1
    assert "results/index.html differs" in capsys.readouterr().err
    path.write_text(text, encoding="utf-8")
    Image.new("RGB", (60, 40), "blue").save(figures / "fake-a.png")
    assert render.main(["--check"], root) == 1  # another picture


def test_a_mean_leads_to_the_folder_of_its_files(root):
    for seed in (0, 1):
        result(root, seed=seed, metrics={"mAP": 0.79 + seed / 100, "rank1": 0.9})
    text = show(root)
    assert '<a href="fake/market/table2/market" title="python fake/train.py">79.5 ± 0.7</a>' in text
    assert "fake/market/table2/market/seed1.json" in text
