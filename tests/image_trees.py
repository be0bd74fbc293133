"""Writes small folders of images in the layouts that data sets and users have."""

import io
import pathlib

import numpy as np
from PIL import Image, ImageDraw


def picture(number: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A smooth colour picture (width, height) that differs with `number`."""
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)


def save(path: pathlib.Path, image: Image.Image, **options) -> np.ndarray:
    """Saves an image in the format of its suffix and returns the pixels that Pillow reads back, RGB."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    with Image.open(path) as written:
        return np.asarray(written.convert("RGB"))


def webvision(folder: pathlib.Path, classes: int = 52, per_class: int = 2, flickr: bool = True) -> dict:
    """WebVision's published layout: info/*.txt, google/, flickr/, val_images_256/.

    Returns:
      `{"google"|"flickr"|"val": [(name, label, pixels), ...], "wnids": [...]}`.
    """
    # Not in alphabetical order: labels must be mapped through wnids.
    wnids = [f"n{(number * 7_919_001) % 9_000_000 + 1_000_000:08d}" for number in range(classes)]
    info = folder / "info"
    info.mkdir(parents=True)
    (info / "synsets.txt").write_text("".join(f"{wnid} word {i}, other word\n" for i, wnid in enumerate(wnids)))
    (info / "queries_google.txt").write_text("".join(f"word {i}\n" for i in range(classes)))
    content = {"wnids": wnids}
    number = 0
    for part in ("google", "flickr", "val") if flickr else ("google", "val"):
        lines, content[part] = [], []
        for label in range(classes):
            for k in range(per_class):
                number += 1
                if part == "val":
                    listed = f"val{number:06d}.jpg"
                    name = f"val_images_256/{listed}"
                else:
                    name = listed = f"{part}/q{label:04d}/img {k}_{number}.jpg"
                pixels = save(folder / name, picture(number), quality=95)
                lines.append(f"{listed} {label}\n")
                content[part].append((name, label, pixels))
        file = "val_filelist.txt" if part == "val" else f"train_filelist_{part}.txt"
        (info / file).write_text("".join(lines))
    return content


def imagenet(folder: pathlib.Path, wnids: list[str], per_class: int, seed: int) -> dict[str, list[np.ndarray]]:
    """`<wnid>/*.JPEG`; returns the pixels by wnid, in the order of the file names."""
    content = {}
    for i, wnid in enumerate(wnids):
        content[wnid] = []
        for k in range(per_class):
            buffer = io.BytesIO()
            picture(seed + i * per_class + k, (50, 60)).save(buffer, "JPEG", quality=95)
            path = folder / wnid / f"{wnid}_{k}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(buffer.getvalue())
            with Image.open(path) as written:
                content[wnid].append(np.asarray(written.convert("RGB")))
    return content


def odd_images(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """One image in each of the formats that real folders hold; name -> the RGB pixels that they mean, upright."""
    folder.mkdir(parents=True, exist_ok=True)
    base = picture(7, (24, 16))
    grey = base.convert("L")
    want = {}

    def put(name, image, meaning=None, **options):
        image.save(folder / name, **options)
        if meaning is None:
            with Image.open(folder / name) as written:
                meaning = np.asarray(written.convert("RGB"))
        want[name] = meaning

    rgb, grey_pixels = np.asarray(base), np.asarray(grey)
    put("plain.png", base, rgb)
    put("plain.jpg", base)
    put("grey.jpg", grey)
    put("grey.png", grey, np.repeat(grey_pixels[..., None], 3, -1))
    put("cmyk.jpg", base.convert("CMYK"))
    put("palette.png", base.convert("P"))
    put("sixteen.png", Image.fromarray(grey_pixels.astype(np.uint16) * 257), np.repeat(grey_pixels[..., None], 3, -1))
    clear = base.convert("RGBA")
    ImageDraw.Draw(clear).rectangle((0, 0, 5, 5), fill=(10, 200, 30, 0))
    seen = rgb.copy()
    seen[:6, :6] = 255  # transparent over white
    put("transparent.png", clear, seen)
    put("animation.gif", base.convert("P"))
    put("bitmap.bmp", base, rgb)
    put("lossless.webp", base, rgb, lossless=True)
    put("scan.tiff", base, rgb)
    for orientation, turn in ((3, 2), (6, 3), (8, 1)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        name = f"turned{orientation}.jpg"
        base.save(folder / name, exif=exif)
        with Image.open(folder / name) as written:
            want[name] = np.rot90(np.asarray(written.convert("RGB")), turn)
    return want


def assert_same_files(got: pathlib.Path, want: pathlib.Path) -> None:
    """Asserts that two folders hold the same files, byte for byte."""
    trees = [{str(f.relative_to(tree)): f for f in sorted(tree.rglob("*")) if f.is_file()} for tree in (got, want)]
    assert list(trees[0]) == list(trees[1])
    assert trees[1], "there are files"
    for name, file in trees[1].items():
        assert trees[0][name].read_bytes() == file.read_bytes(), name
