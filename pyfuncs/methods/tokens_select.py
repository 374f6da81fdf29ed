"""``burnish tokens select``: the frames of a folder or video that cover it best, copied, with a contact sheet.

Descriptors need no weights: each image is brought to ``size`` x ``size`` pixels (area average), each colour channel to
mean 0 and deviation 1, and the whole laid out as one vector.  That tells views apart by layout, and ignores exposure
and colour cast; it is not a place-recognition network, and not what arXiv 2605.23892 used (MegaLoc).  Others can be
given as a file.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ops.farthest_frames import coverage_radius, farthest_frames

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
VIDEOS = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v")
SHEET, RECORD = "contact_sheet.jpg", "selection.json"


@dataclass(frozen=True)
class SelectOptions:
    """As the command's flags.  ``output``: by default the source's name with "-selected", beside it."""

    source: Path
    count: int
    output: Path | None = None
    start: int = 0
    every: int = 1
    size: int = 16
    descriptors: Path | None = None

    @property
    def target(self) -> Path:
        source = self.source.resolve()
        return self.output or source.with_name(f"{source.stem if source.is_file() else source.name}-selected")

    def check(self) -> SelectOptions:
        """ValueError for what can be seen before any work."""
        for name, least in (("count", 1), ("start", 0), ("every", 1), ("size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}; got {getattr(self, name)}")
        if not self.source.exists():
            raise ValueError(f"{self.source}: no such folder or video")
        if self.source.is_file() and self.source.suffix.lower() not in VIDEOS:
            raise ValueError(f"{self.source} is neither a folder of images nor a video ({', '.join(VIDEOS)})")
        if self.target.resolve() == self.source.resolve():
            raise ValueError(f"--output must be another folder than the frames' own; got {self.target}")
        if self.target.exists() and (not self.target.is_dir() or any(self.target.iterdir())):
            raise ValueError(f"--output must be a new or an empty folder; got {self.target}")
        return self


def _pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageDraw
        import PIL.ImageOps
    except ImportError as error:
        raise ValueError(f"burnish tokens select needs Pillow: pip install pillow ({error})") from error
    return PIL


def _bar(items: Iterable, about: str, total: int | None = None) -> Iterable:
    """A progress bar on a terminal, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=about, unit="frame", total=total, disable=None)


class Folder:
    """Images of a folder in the order of their names, numbers in them as numbers."""

    def __init__(self, path: Path, every: int):
        found = (p for p in path.iterdir() if p.is_file() and p.suffix.lower() in IMAGES)
        self.files = sorted(found, key=lambda p: _natural(p.name))[::every]
        if not self.files:
            raise ValueError(f"{path} holds no images ({', '.join(IMAGES)})")
        self.length: int | None = len(self.files)

    def __iter__(self) -> Iterator[Any]:
        pillow = _pillow()
        for file in self.files:
            try:
                with pillow.Image.open(file) as image:
                    yield pillow.ImageOps.exif_transpose(image).convert("RGB")
            except OSError as error:  # what Pillow raises for a file that is no image, too
                raise ValueError(f"{file} cannot be read as an image ({error})") from error

    def save(self, chosen: list[int], target: Path) -> list[str]:
        for i in chosen:
            shutil.copy2(self.files[i], target / self.files[i].name)
        return [self.files[i].name for i in chosen]


class Video:
    """Every ``every``-th frame of a video, decoded by PyAV."""

    def __init__(self, path: Path, every: int):
        try:
            import av
        except ImportError as error:
            raise ValueError(
                f"reading a video needs PyAV: pip install av ({error}); or give a folder of its frames"
            ) from error
        self.path, self.every, self.length = path, every, None
        self._av = av

    def __iter__(self) -> Iterator[Any]:
        try:
            with self._av.open(str(self.path)) as container:
                for i, frame in enumerate(container.decode(video=0)):
                    if i % self.every == 0:
                        yield frame.to_image()
        except (self._av.error.FFmpegError, IndexError) as error:
            raise ValueError(f"{self.path} cannot be read as a video ({error})") from error

    def save(self, chosen: list[int], target: Path) -> list[str]:
        wanted, names = set(chosen), []
        for i, image in enumerate(self):
            if i in wanted:
                names.append(f"frame_{i * self.every:06d}.png")
                image.save(target / names[-1])
        return names


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"([0-9]+)", name.lower()) if part]


def thumbnail_descriptor(image: Any, size: int = 16) -> Tensor:
    """fp32 (3 size^2,) of a Pillow image in RGB; see the top of this file.  A channel of one value gives zeros."""
    small = image.resize((size, size), _pillow().Image.Resampling.BOX)
    pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).float().view(size * size, 3)
    deviation, mean = torch.std_mean(pixels, 0, correction=0)
    return ((pixels - mean) / deviation.clamp_min(1e-3)).flatten()


def run(options: SelectOptions) -> str:
    """Select, copy, draw and record; returns what the command prints.  ValueError for input that cannot be read."""
    _pillow()
    source: Folder | Video = (Video if options.source.is_file() else Folder)(options.source, options.every)
    descriptors, kind = _descriptors(source, options)
    n = len(descriptors)
    if options.start >= n:
        raise ValueError(f"--start must be one of the {n} frames, from 0; got {options.start}")
    selected = farthest_frames(descriptors, options.count, start=options.start)
    chosen = selected.tolist()
    radius = float(coverage_radius(descriptors, selected))
    target = options.target
    target.mkdir(parents=True, exist_ok=True)
    names = source.save(chosen, target)
    _sheet([target / name for name in names], chosen).save(target / SHEET, quality=90)
    record = {
        "source": str(options.source), "frames": n, "every": options.every, "start": options.start, "descriptor": kind,
        "coverage_radius": radius, "selected": [{"frame": i, "file": f} for i, f in zip(chosen, names, strict=True)],
    }  # fmt: skip
    (target / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    rows = [f"{i:>6}  {name}" for i, name in zip(chosen, names, strict=True)]
    last = f"{len(chosen)} of {n} frames; every frame is within cosine distance {radius:.4f} of one; in {target}"
    return "\n".join([" frame  file", *rows, last])


def _descriptors(source: Folder | Video, options: SelectOptions) -> tuple[Tensor, str]:
    if options.descriptors is None:
        found = [thumbnail_descriptor(x, options.size) for x in _bar(source, "reading", source.length)]
        if not found:
            raise ValueError(f"{options.source} holds no frames")
        return torch.stack(found), f"thumbnail {options.size} x {options.size}, channels normalised"
    import numpy as np

    try:
        given = torch.from_numpy(np.load(options.descriptors, allow_pickle=False))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{options.descriptors} cannot be read as a .npy array ({error})") from error
    if given.ndim != 2 or not given.is_floating_point() or 0 in given.shape:
        raise ValueError(f"--descriptors must hold floats (frames, D); got {given.dtype} {tuple(given.shape)}")
    if source.length is None:  # a video tells its length by being read
        source.length = sum(1 for _ in _bar(source, "counting"))
    if len(given) != source.length:
        raise ValueError(f"--descriptors must hold a row for each of the {source.length} frames; got {len(given)}")
    return given.float(), str(options.descriptors)


def _sheet(files: list[Path], frames: list[int], width: int = 192, gap: int = 6) -> Any:
    """The chosen images in rows, each with its number."""
    pillow = _pillow()
    tiles = []
    for file in files:
        with pillow.Image.open(file) as image:
            image = pillow.ImageOps.exif_transpose(image).convert("RGB")
            tiles.append(image.resize((width, max(1, round(image.height * width / image.width)))))
    height = max(tile.height for tile in tiles) + 14  # the number's line
    across = min(len(tiles), math.ceil((len(tiles) * height / width) ** 0.5))  # about as wide as it is high
    down = -(-len(tiles) // across)
    sheet = pillow.Image.new("RGB", (across * (width + gap) + gap, down * (height + gap) + gap), "white")
    pen = pillow.ImageDraw.Draw(sheet)
    for i, (tile, frame) in enumerate(zip(tiles, frames, strict=True)):
        x, y = gap + i % across * (width + gap), gap + i // across * (height + gap)
        sheet.paste(tile, (x, y + 14))
        pen.text((x, y), str(frame), fill="black")
    return sheet
