"""Human parsing of a folder of images into masks, by SCHP trained on ATR.

    python -m pixel_sampling.parse --root /data --ckpt exp-schp-201908301523-atr.pth   # PRCC: prcc/rgb -> prcc/mask
    python -m pixel_sampling.parse --root photos --ckpt CHECKPOINT --out masks --overlays 32
    python -m pixel_sampling.parse --root photos --ckpt none --out masks                # random weights, a trial

Every image gives one palette PNG of its own size under the same relative path: the six parts, or with --labels atr18
the 18 ATR labels. What exists already is skipped, so an interrupted run continues.
"""

import sys
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import flags
from pixel_sampling.flags import parsing_args as parse_args

if __name__ == "__main__":
    flags.answer(parse_args)  # torch is loaded below

import numpy as np
import torch
from tqdm import tqdm

from common import devices, pixels, visualize
from common.datasets import files, prcc
from pixel_sampling import schp
from pixel_sampling.masks import LUT, PARTS, palette, write_labels


def folders(root: Path, out: str | None, labels: str = "part6") -> tuple[Path, Path]:
    """Where the images lie and where the masks go. Raises: FileNotFoundError, ValueError."""
    trees = (*(root / tree / "rgb" for tree in prcc.TREES), root / "rgb")
    source = next((tree for tree in trees if tree.is_dir()), root)
    if not source.is_dir():
        raise FileNotFoundError(f"no folder {root}; give --root a folder of images")
    if out is None and source == root:
        raise ValueError(f"{root} is no PRCC tree; say with --out where the masks shall go")
    if out is not None and Path(out).resolve() == source.resolve():
        raise ValueError(
            f"--out {out} is the folder of the images; give the masks a folder of their own, even inside it"
        )
    return source, Path(out) if out else source.parent / prcc.MASK_FORMATS[labels][0]


def listed(source: Path, out: Path) -> list[tuple[Path, Path]]:
    """(image, mask) paths, sorted, without images below `out`. Raises: ValueError for none, or two for one mask."""
    images = map(Path, files.images(source, without=out))
    pairs = [(image, (out / image.relative_to(source)).with_suffix(".png")) for image in images]
    if not pairs:
        raise ValueError(f"{source} holds no image")
    seen: dict[Path, Path] = {}
    for image, mask in pairs:
        if seen.setdefault(mask, image) != image:
            raise ValueError(
                f"{image} and {seen[mask]} would both be written to {mask}; parse one of them from a folder of "
                "its own (links will do)"
            )
    return pairs


def read(path: Path) -> torch.Tensor | str:
    """The image uint8 (3, H, W), or a sentence on why it cannot be read."""
    try:
        return torch.from_numpy(np.array(pixels.read(path))).permute(2, 0, 1)
    except (OSError, ValueError) as error:
        return str(error)


def network(ckpt: str, device: torch.device) -> schp.SCHP:
    """The parser on the device, in eval mode."""
    torch.manual_seed(0)
    net = schp.SCHP(len(LUT))
    if ckpt == "none":
        print("random weights: the masks mean nothing")
    else:
        print(f"{ckpt}: {schp.load_official(net, ckpt)} tensors")
    return net.eval().to(device, memory_format=torch.channels_last)


@torch.inference_mode()
def parse(net: schp.SCHP, images: list[torch.Tensor], size: int, amp: str = "off") -> list[np.ndarray]:
    """ATR labels (H, W) uint8 of each image uint8 (3, H, W), at its own size."""
    device = next(net.parameters()).device
    batch = torch.stack([schp.letterbox(image.to(device), size) for image in images]).contiguous(
        memory_format=torch.channels_last
    )
    with torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16"):
        logits = net(batch).fusion
    return [schp.labels_at(one, *image.shape[1:], size).cpu().numpy() for one, image in zip(logits, images)]


def write_all(net, pairs: list[tuple[Path, Path]], args: Namespace) -> tuple[np.ndarray, list[str]]:
    """Parse and write all pairs, reading a batch ahead; returns pixel counts of the six parts, and what failed."""
    counts, faults, pending = np.zeros(6, np.int64), [], []
    blocks = [pairs[i : i + args.batch_size] for i in range(0, len(pairs), args.batch_size)]
    with (
        ThreadPoolExecutor(max(1, args.workers)) as pool,
        tqdm(total=len(pairs), desc="parse", unit="img", disable=None) as bar,
    ):
        ahead = [pool.submit(read, image) for image, _ in blocks[0]] if blocks else []
        for number, block in enumerate(blocks):
            images = [future.result() for future in ahead]
            ahead = [pool.submit(read, image) for image, _ in blocks[number + 1]] if number + 1 < len(blocks) else []
            faults += [image for image in images if isinstance(image, str)]
            good = [(image, mask) for image, (_, mask) in zip(images, block) if not isinstance(image, str)]
            for labels, (_, mask) in zip(
                parse(net, [image for image, _ in good], args.size, args.amp) if good else [], good
            ):
                counts += np.bincount(LUT[labels].ravel(), minlength=6)
                pending.append(pool.submit(write_labels, mask, LUT[labels] if args.labels == "part6" else labels))
            bar.update(len(block))
        for future in pending:
            future.result()
    return counts, faults


def overlay(image: Path, mask: Path) -> np.ndarray:
    """The image half covered by the colours of its mask, uint8 (H, W, 3); white below what is wider than 2 : 1."""
    mixed = 0.5 * np.asarray(pixels.read(image)) + 0.5 * palette(18)[pixels.labels(mask)]
    height, width = mixed.shape[:2]
    below = ((0, max(0, width // 2 - height)), (0, 0), (0, 0))
    return np.pad(mixed.round().astype(np.uint8), below, constant_values=255)


def draw_overlays(path: Path, pairs: list[tuple[Path, Path]], number: int) -> Path:
    """A sheet of `number` overlays, eight a row, spread evenly over all pairs."""
    chosen = [pairs[i] for i in np.unique(np.linspace(0, len(pairs) - 1, min(number, len(pairs))).astype(int))]
    pictures = [overlay(*pair) for pair in chosen]
    return visualize.grid(
        path, [pictures[i : i + 8] for i in range(0, len(pictures), 8)], title="masks over their images"
    )


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        source, out = folders(Path(args.root), args.out, args.labels)
        pairs = listed(source, out)
        todo = [(image, mask) for image, mask in pairs if not mask.is_file()]
        masked = len(pairs) - len(todo)
        print(f"{len(pairs)} images under {files.shown(source)}, {masked} have a mask under {files.shown(out)}")
        faults: list[str] = []
        if todo:
            net = network(args.ckpt, devices.choose())
            counts, faults = write_all(net, todo, args)
            shares = counts / max(1, counts.sum())
            print("per cent of pixels: " + ", ".join(f"{name} {100 * share:.1f}" for name, share in zip(PARTS, shares)))
        done = [(image, mask) for image, mask in pairs if mask.is_file()]
        if args.overlays and done:
            print("overlays:", files.shown(draw_overlays(out / "overlays.png", done, args.overlays)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if faults:
        print(
            "\n".join(
                [*faults, f"error: {len(faults)} of {len(todo)} images were not read; replace them and run again"]
            ),
            file=sys.stderr,
        )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
