"""``burnish tokens select``: real image files in, chosen frames, a contact sheet and a record out."""

import json
import subprocess
import sys

import pytest
import torch

from burnish.cli import main

pytest.importorskip("PIL", reason="needs Pillow: pip install pillow")

from PIL import Image, ImageDraw

from burnish.methods.tokens_select import IMAGES, Folder, SelectOptions, thumbnail_descriptor
from burnish.ops.farthest_frames import farthest_frames


def view(kind, exposure=1.0, size=(96, 64)):
    """A drawn scene: seven layouts, any exposure."""
    image = Image.new("RGB", size, (70, 110, 150))
    pen = ImageDraw.Draw(image)
    w, h = size
    pen.rectangle((kind * w // 8, kind * h // 9, kind * w // 8 + w // 4, kind * h // 9 + h // 3), fill=(220, 180, 40))
    pen.ellipse((w - (kind + 2) * w // 9, h // 3, w - (kind + 1) * w // 9, h - 4), fill=(30, 40 + 25 * kind, 20))
    return image.point(lambda v: min(255, round(v * exposure)))


@pytest.fixture
def folder(tmp_path):
    """Three views, four pictures of each that differ in exposure, named so that text order is not number order."""
    root = tmp_path / "scene"
    root.mkdir()
    for i in range(12):
        view(i // 4, 0.7 + 0.1 * (i % 4)).save(root / f"img{i}.png")
    (root / "notes.txt").write_text("no image")
    (root / "depth").mkdir()
    return root


def select(capfd, *arguments):
    code = main(["tokens", "select", *map(str, arguments)])
    out, err = capfd.readouterr()
    return code, out, err


def test_one_frame_of_each_view(folder, tmp_path, capfd):
    before = sorted(p.name for p in folder.iterdir())
    code, out, err = select(capfd, folder, "--count", 3, "--output", tmp_path / "out")
    assert code == 0 and not err
    record = json.loads((tmp_path / "out" / "selection.json").read_text())
    frames = [s["frame"] for s in record["selected"]]
    assert frames[0] == 0 and [f // 4 for f in frames] == [0, 1, 2] and record["frames"] == 12
    files = [s["file"] for s in record["selected"]]
    assert files == [f"img{f}.png" for f in frames]  # img10 comes after img9
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*files, "contact_sheet.jpg", "selection.json"}
    with Image.open(tmp_path / "out" / "contact_sheet.jpg") as sheet:
        assert sheet.width > 2 * 192 and sheet.height > 128
        colours = sheet.convert("RGB").resize((60, 40)).getcolors(2400)
        assert len(colours) > 50  # pictures, not a blank sheet
    assert f"3 of 12 frames; every frame is within cosine distance {record['coverage_radius']:.4f}" in out
    assert out.splitlines()[1].split() == ["0", "img0.png"]
    assert sorted(p.name for p in folder.iterdir()) == before  # the source is as it was


def test_the_set_is_that_of_farthest_frames(folder, tmp_path, capfd):
    images = [Image.open(p).convert("RGB") for p in Folder(folder, 1).files]
    described = torch.stack([thumbnail_descriptor(x, 8) for x in images])
    select(capfd, folder, "--count", 5, "--start", 6, "--size", 8, "--output", tmp_path / "a")
    record = json.loads((tmp_path / "a" / "selection.json").read_text())
    assert [s["frame"] for s in record["selected"]] == farthest_frames(described, 5, start=6).tolist()
    select(capfd, folder, "--count", 2, "--every", 4, "--output", tmp_path / "b")
    record = json.loads((tmp_path / "b" / "selection.json").read_text())
    assert record["frames"] == 3 and {s["file"] for s in record["selected"]} <= {"img0.png", "img4.png", "img8.png"}


def test_exposure_is_ignored_and_layout_is_not():
    same = [thumbnail_descriptor(view(2, e)) for e in (0.6, 1.0)]
    other = thumbnail_descriptor(view(5))
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(*same, dim=0) > 0.999 and cosine(same[1], other, dim=0) < 0.9
    flat = thumbnail_descriptor(Image.new("RGB", (9, 9), (5, 5, 5)))
    assert flat.shape == (3 * 16 * 16,) and flat.abs().max() == 0


def test_default_output_and_all_frames(folder, capfd):
    code, out, _ = select(capfd, folder, "--count", 99)
    target = folder.with_name("scene-selected")
    assert code == 0 and len(list(target.glob("img*.png"))) == 12 and "12 of 12 frames" in out and "0.0000" in out
    code, _, err = select(capfd, folder, "--count", 2)
    assert code == 2 and "--output must be a new or an empty folder; got" in err


def test_descriptors_from_a_file(folder, tmp_path, capfd):
    import numpy as np

    given = torch.randn(12, 6)
    np.save(tmp_path / "d.npy", given.numpy())
    select(capfd, folder, "--count", 4, "--descriptors", tmp_path / "d.npy", "--output", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "selection.json").read_text())
    assert [s["frame"] for s in record["selected"]] == farthest_frames(given, 4).tolist()
    assert record["descriptor"].endswith("d.npy")
    np.save(tmp_path / "short.npy", given[:5].numpy())
    np.save(tmp_path / "ints.npy", np.ones((12, 3), dtype=np.int64))
    (tmp_path / "text.npy").write_text("x")
    for name, words in (
        ("short", "--descriptors must hold a row for each of the 12 frames; got 5"),
        ("ints", "--descriptors must hold floats (frames, D); got torch.int64 (12, 3)"),
        ("text", "cannot be read as a .npy array"), ("none", "cannot be read as a .npy array"),
    ):  # fmt: skip
        code, _, err = select(
            capfd, folder, "--count", 4, "--descriptors", tmp_path / f"{name}.npy", "--output", tmp_path / "new"
        )
        assert code == 2 and words in err and err.count("\n") == 1 and not (tmp_path / "new").exists()


def test_bad_input_is_one_line(folder, tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"not a picture")
    (tmp_path / "text.txt").write_text("x")
    cases = [
        ((tmp_path / "nowhere", "--count", 2), "nowhere: no such folder or video"),
        ((tmp_path / "empty", "--count", 2), f"holds no images ({', '.join(IMAGES)})"),
        ((tmp_path / "broken", "--count", 2), "a.png cannot be read as an image"),
        ((tmp_path / "text.txt", "--count", 2), "is neither a folder of images nor a video"),
        ((folder, "--count", 0), "--count must be at least 1; got 0"),
        ((folder, "--count", 2, "--start", 12), "--start must be one of the 12 frames, from 0; got 12"),
        ((folder, "--count", 2, "--every", 0), "--every must be at least 1; got 0"),
        ((folder, "--count", 2, "--output", folder), "--output must be another folder than the frames' own"),
        ((folder, "--count", 2, "--output", tmp_path / "text.txt"), "--output must be a new or an empty folder"),
        ((folder,), "the following arguments are required: --count"),
    ]
    for arguments, words in cases:
        code, out, err = select(capfd, *arguments)
        assert code == 2 and not out and words in err and err.count("\n") == 1, (arguments, err)
    assert not list(tmp_path.glob("*-selected"))


@pytest.mark.parametrize(
    "missing, suffix, words", [("PIL", "", "Pillow: pip install pillow"), ("av", ".mp4", "PyAV: pip install av")]
)
def test_a_missing_package_is_named(folder, tmp_path, missing, suffix, words):
    source = folder
    if suffix:
        source = tmp_path / f"clip{suffix}"
        source.write_bytes(b"x")
    code = f"import sys; sys.modules[{missing!r}] = None; from burnish.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "tokens", "select", str(source), "--count", "2"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


def test_a_video(tmp_path, capfd):
    av = pytest.importorskip("av", reason="needs PyAV: pip install av")
    clip = tmp_path / "clip.mp4"
    with av.open(str(clip), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i in range(12):
            for packet in stream.encode(av.VideoFrame.from_image(view(i // 4))):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
    code, text, err = select(capfd, clip, "--count", 3, "--every", 2)
    assert code == 0 and not err and "3 of 6 frames" in text
    record = json.loads((tmp_path / "clip-selected" / "selection.json").read_text())
    assert [s["frame"] // 2 for s in record["selected"]] == [0, 1, 2]
    for s in record["selected"]:
        assert s["file"] == f"frame_{2 * s['frame']:06d}.png"
        with Image.open(tmp_path / "clip-selected" / s["file"]) as image:
            assert image.size == (96, 64)
    clip.write_bytes(b"not a video")
    code, _, err = select(capfd, clip, "--count", 3, "--output", tmp_path / "new")
    assert code == 2 and "cannot be read as a video" in err and err.count("\n") == 1


def test_options_know_their_target(tmp_path):
    folder = tmp_path / "a.b"
    folder.mkdir()
    (tmp_path / "a.mp4").write_bytes(b"")
    assert SelectOptions(folder, 1).target.name == "a.b-selected"
    assert SelectOptions(tmp_path / "a.mp4", 1).target.name == "a-selected"
