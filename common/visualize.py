"""Pictures for people: rank lists, image grids, heat maps, CMC and other curves. Functions take arrays or paths and
write one file each.

An image is a path, a PIL image, a uint8 array (H, W, 3), or a tensor (3, H, W), uint8 or float in [0, 1] (undo the
normalisation first). Nothing here touches matplotlib's global state (no pyplot), so it is safe in training processes
and threads.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from common import distances, pixels
from common.runfiles import replace

GREEN, RED, BLUE = (22, 150, 72), (214, 39, 40), (38, 84, 160)  # match, mismatch, query
INK, FAINT, PAPER = (32, 32, 32), (120, 120, 120), (255, 255, 255)


class Cell(NamedTuple):
    """One place of a sheet: an image (None leaves the place empty), a frame colour and a caption below."""

    image: object = None
    frame: tuple[int, int, int] | None = None
    caption: str = ""


class Curve(NamedTuple):
    """One line of a plot: x (n,), y (n,), optional error bars (n,); `paper` draws dashed, with open markers, and says
    so in the legend.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None
    paper: bool = False


def picture(image) -> Image.Image:
    """The image as PIL RGB. Raises: ValueError for another shape, type or range."""
    if isinstance(image, (str, Path)):
        return pixels.read(image)
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        if image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"an image tensor is (3, H, W), not {tuple(image.shape)}")
        if image.is_floating_point():
            if not (image.min() >= -1e-3 and image.max() <= 1 + 1e-3):
                raise ValueError(
                    f"a float image lies in [0, 1], not [{image.min():.2f}, {image.max():.2f}]: undo the normalisation"
                )
            image = (image.float().clamp(0, 1) * 255).round().to(torch.uint8)
        image = image.permute(1, 2, 0).numpy()
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image array is uint8 (H, W, 3), not {image.dtype} {image.shape}")
    return Image.fromarray(np.ascontiguousarray(image))


def grid(
    path,
    rows: Sequence[Sequence],
    *,
    row_titles: Sequence[str] = (),
    column_titles: Sequence[str] = (),
    title: str = "",
    height: int = 192,
    gap_after: int | None = None,
) -> Path:
    """Write a sheet of images and return its path. `rows` hold images or Cells; rows may differ in length.

    `height` is the pixel height of every image (width follows the image, places of a column share the widest);
    `gap_after=1` leaves a wider gap after the first column. The file's suffix (.png, .jpg) gives the format.
    """
    cells = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows]
    if not cells or not max(len(row) for row in cells):
        raise ValueError("grid: no images to draw")
    images = [[None if cell.image is None else _scaled(picture(cell.image), height) for cell in row] for row in cells]
    font, small = _font(max(12, height // 12)), _font(max(10, height // 15))
    border = max(3, height // 48)
    pad = 2 * border
    widths = _column_widths(images, cells, column_titles, font, small, height // 2)
    left = max([_text_width(name, font) for name in row_titles] or [-pad]) + 2 * pad
    gaps = [2 * border + pad + (4 * pad if gap_after == column + 1 else 0) for column in range(len(widths))]
    edges = [left, *(left + np.cumsum(widths) + np.cumsum(gaps)).tolist()]
    middles = [edge + border + width // 2 for edge, width in zip(edges, widths)]
    top = pad + (_line(font) + pad if title else 0) + (_line(font) if column_titles else 0)
    step = height + 2 * border + pad + (_line(small) if any(cell.caption for row in cells for cell in row) else 0)
    width = max(edges[-1], _text_width(title, font) + 2 * pad)
    sheet = Image.new("RGB", (width, top + step * len(cells) + pad // 2), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((pad, pad), title, INK, font)
    for middle, name in zip(middles, column_titles):
        draw.text((middle, top - _line(font) // 2), name, INK, font, anchor="mm")
    for r, row in enumerate(cells):
        y = top + r * step + border
        draw.text((pad, y + height // 2), row_titles[r] if r < len(row_titles) else "", INK, font, anchor="lm")
        for image, cell, middle in zip(images[r], row, middles):
            if image is not None:
                _paste(sheet, draw, image, middle, y, cell.frame, border)
            draw.text((middle, y + height + border + 1), cell.caption, cell.frame or FAINT, small, anchor="ma")
    return _save(path, lambda out, kind: sheet.save(out, kind, quality=92))


def data_rank_list(path, data, feats: torch.Tensor, shown: Sequence[int], k: int = 10, title: str = "") -> Path:
    """`rank_list` of the queries `shown` of a data set, from features (Q + G, D) of data.query and data.gallery."""
    q, queries = len(data.query), [data.query[i] for i in shown]
    dist = distances.pairwise(feats[:q][list(shown)], feats[q:])
    ids = [[getattr(s, key) for s in part] for key in ("pid", "camid") for part in (queries, data.gallery)]
    found = top_matches(dist, *ids, k=k)
    return rank_list(path, [s.path for s in queries], [s.path for s in data.gallery], *found, title=title)


def top_matches(dist, query_pids, gallery_pids, query_camids=None, gallery_camids=None, k: int = 10):
    """The first k gallery places of each query with junk left out (pid -1, or the query's own pid and camid).

    Args: dist (Q, G), smaller is closer; pids and camids (Q,) and (G,); camids may be left out where no camera rule
    holds.
    Returns: indices (Q, k) int64, -1 where the list ends early; matches (Q, k) bool; distances (Q, k) float64, nan
    where it ends early.
    """
    dist = np.asarray(torch.as_tensor(dist).cpu(), dtype=np.float64)
    query_pids, gallery_pids = np.asarray(query_pids), np.asarray(gallery_pids)
    if dist.shape != (len(query_pids), len(gallery_pids)):
        raise ValueError(
            f"distances are {dist.shape} but there are {len(query_pids)} queries and {len(gallery_pids)} gallery images"
        )
    junk = np.broadcast_to(gallery_pids == -1, dist.shape).copy()
    if query_camids is not None and gallery_camids is not None:
        same_camera = np.asarray(query_camids)[:, None] == np.asarray(gallery_camids)[None]
        junk |= (query_pids[:, None] == gallery_pids[None]) & same_camera
    indices = np.full((len(dist), k), -1, dtype=np.int64)
    distances = np.full((len(dist), k), np.nan)
    for q in range(len(dist)):
        kept = np.flatnonzero(~junk[q])
        best = kept[np.argsort(dist[q, kept], kind="stable")[:k]]
        indices[q, : len(best)], distances[q, : len(best)] = best, dist[q, best]
    matches = (indices >= 0) & (gallery_pids[indices] == query_pids[:, None])
    return indices, matches, distances


def rank_list(
    path,
    query_images: Sequence,
    gallery_images: Sequence,
    indices,
    matches,
    distances=None,
    *,
    title: str = "",
    query_names: Sequence[str] = (),
    height: int = 192,
) -> Path:
    """Write the rank lists of Q queries: the query, then its gallery images, best first, framed green (match) or red
    (other person).

    Args: query_images Q images; gallery_images G images (paths are opened only where shown); indices (Q, k) into the
    gallery, junk already left out (see top_matches), -1 draws nothing; matches (Q, k) bool; distances (Q, k) printed
    below; query_names one caption a query.
    """
    indices, matches = np.asarray(indices), np.asarray(matches, dtype=bool)
    if indices.shape != matches.shape or len(indices) != len(query_images):
        raise ValueError(
            f"{len(query_images)} queries, indices {indices.shape}, matches {matches.shape}: give one row a query"
        )
    rows = []
    for q, image in enumerate(query_images):
        row = [Cell(image, BLUE, query_names[q] if q < len(query_names) else "query")]
        for place, index in enumerate(indices[q]):
            if index < 0:
                row.append(Cell())
                continue
            mark = "\u2713" if matches[q, place] else "\u2717"  # readable without telling green from red
            caption = mark if distances is None else f"{mark} {float(distances[q][place]):.3f}"
            row.append(Cell(gallery_images[int(index)], GREEN if matches[q, place] else RED, caption))
        rows.append(row)
    columns = ["query", *(f"rank {place + 1}" for place in range(indices.shape[1]))]
    return grid(path, rows, column_titles=columns, title=title, height=height, gap_after=1)


def heat_map(image, values, *, alpha: float = 0.5, colormap: str = "jet", scale: bool = True) -> np.ndarray:
    """The image with a map laid over it, uint8 (H, W, 3), for grid().

    `values` (h, w) is enlarged bilinearly to the image. `scale=True` stretches it to [0, 1] first (a constant map
    becomes 0); with scale=False it must lie in [0, 1] already, so that maps of several images stay comparable.
    """
    base = picture(image)
    values = np.asarray(torch.as_tensor(values).detach().cpu(), dtype=np.float32)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise ValueError(f"a heat map is finite and (h, w), not {values.shape}")
    if scale:
        values = (values - values.min()) / max(float(np.ptp(values)), 1e-12)
    elif values.min() < 0 or values.max() > 1:
        raise ValueError(
            f"heat map in [{values.min():.3g}, {values.max():.3g}] with scale=False: give values in [0, 1]"
        )
    large = np.asarray(Image.fromarray(values).resize(base.size, Image.BILINEAR)).clip(0, 1)
    colours = matplotlib.colormaps[colormap](large)[..., :3] * 255
    return (np.asarray(base) * (1 - alpha) + colours * alpha).round().astype(np.uint8)


def grad_cam(
    model: nn.Module, layer: nn.Module, images: torch.Tensor, target: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Grad-CAM maps (B, h, w) in [0, 1] of `layer`'s output (B, C, h, w): ReLU of the channels weighted by their mean
    gradient, min-max per image.

    `target` turns the model's output into one score per image (B,), e.g. the class logit or the similarity to another
    image. The model runs in the mode it is in (use eval()); its hooks are removed, its parameters' gradients stay as
    they were.
    """
    kept = []
    hook = layer.register_forward_hook(lambda module, inputs, output: kept.append(output))
    try:
        with torch.enable_grad():
            scores = target(model(images.detach().requires_grad_(True)))
    finally:
        hook.remove()
    if not kept or kept[-1].ndim != 4:
        raise ValueError(
            f"grad_cam: the layer gave {[tuple(out.shape) for out in kept] or 'nothing'}; it must give (B, C, h, w)"
        )
    if scores.shape != (len(images),):
        raise ValueError(f"grad_cam: target gave {tuple(scores.shape)}, expected one score per image, ({len(images)},)")
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(scores.sum(), kept[-1])
    weights = gradient.mean(dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
    maps = (weights * kept[-1].detach()).sum(1).clamp(min=0).float()  # (B, h, w)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-12)


def cmc_curve(
    path,
    curves: Mapping[str, Sequence[float]],
    *,
    mAP: Mapping[str, float] | None = None,
    max_rank: int = 20,
    title: str = "",
) -> Path:
    """Plot CMC curves {name: cmc (>= 1,) fractions}, rank 1 to max_rank in per cent; mAP {name: fraction} goes to the
    legend.
    """
    lines = []
    for name, cmc in curves.items():
        shown = np.asarray(cmc, dtype=np.float64)[:max_rank] * 100
        label = f"{name} (mAP {mAP[name] * 100:.1f})" if mAP and name in mAP else name
        lines.append(Curve(label, np.arange(1, len(shown) + 1), shown))
    return plot(path, {"Matching rate (%)": lines}, x_label="Rank", title=title)


def plot(path, panels: Mapping[str, Sequence[Curve]], *, x_label: str = "", title: str = "") -> Path:
    """Plot one panel per entry, at most four side by side: {label of the y axis: curves}. A curve keeps its colour by
    name over all panels.
    """
    if not panels or not any(len(curve.x) for curves in panels.values() for curve in curves):
        raise ValueError(f"plot {path}: no points to draw")
    rows = -(-len(panels) // 4)
    columns = -(-len(panels) // rows)
    figure = Figure(figsize=(1.0 + 4.6 * columns, 3.6 * rows), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(curve.name for curves in panels.values() for curve in curves))
    palette = matplotlib.colormaps["tab10"].colors
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, (y_label, curves) in zip(axes, panels.items()):
        for curve in curves:
            colour = palette[names.index(curve.name) % len(palette)]
            style = {"ls": "-", "marker": "o" if len(curve.x) <= 30 else ""}
            if curve.paper:
                style = {"ls": "--" if len(curve.x) > 1 else "", "marker": "o", "mfc": "white"}
            label = f"{curve.name}, paper" if curve.paper else curve.name
            axis.errorbar(
                curve.x, curve.y, yerr=curve.error, color=colour, ms=4, lw=1.5, capsize=2, label=label, **style
            )
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        if all(float(x).is_integer() for curve in curves for x in curve.x):
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if curves:
            axis.legend(frameon=False, fontsize=8)
    if title:
        figure.suptitle(textwrap.fill(title, int(12.5 * figure.get_figwidth())), fontsize=11)  # letters an inch
    return _save(path, lambda out, kind: figure.savefig(out, format=kind))


def _scaled(image: Image.Image, height: int) -> Image.Image:
    width = max(1, round(image.width * height / image.height))
    return image.resize((width, height), Image.BICUBIC)


def _column_widths(images, cells, titles, font, small, empty: int) -> list[int]:
    """Per column the widest of its images, captions and title; `empty` where a column has no image."""
    widths = []
    for column in range(max(len(row) for row in cells)):
        found = [row[column].width for row in images if column < len(row) and row[column] is not None] or [empty]
        found += [_text_width(row[column].caption, small) for row in cells if column < len(row)]
        found += [_text_width(titles[column], font)] if column < len(titles) else []
        widths.append(max(found))
    return widths


def _paste(sheet, draw, image: Image.Image, middle: int, y: int, frame, border: int) -> None:
    x = middle - image.width // 2
    if frame:
        draw.rectangle((x - border, y - border, x + image.width + border - 1, y + image.height + border - 1), frame)
    sheet.paste(image, (x, y))


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as shipped with matplotlib: the same on every machine."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _line(font: ImageFont.FreeTypeFont) -> int:
    return round(font.size * 1.5)


def _text_width(text: str, font: ImageFont.FreeTypeFont) -> int:
    return int(np.ceil(font.getlength(text)))


def _save(path, write: Callable[[object, str], None]) -> Path:
    """Write through a temporary file, so that a reader never sees half a picture."""
    path = Path(path)
    kinds = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg"}
    if path.suffix.lower() not in kinds:
        raise ValueError(f"{path}: pictures are written as .png or .jpg")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, lambda file: write(file, kinds[path.suffix.lower()]))
    return path
