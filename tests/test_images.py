"""images.py: files of all kinds become upright RGB, found whatever their names look like."""

import os
from pathlib import Path

import numpy as np
import pytest
from conftest import save_noise
from PIL import Image

from common.errors import InputError
from scripts.parts import images
from scripts.parts.images import find_images, list_images, read_image


def test_images_are_found_with_and_without_subfolders(tmp_path: Path) -> None:
    names = {"1": "a/1.jpg", "2": "b/2.jpg", "3": "3.jpg"}
    flat = {"1": tmp_path / "1.jpg", "2": tmp_path / "2.jpg", "3": tmp_path / "3.jpg"}
    assert find_images(tmp_path, names) == flat
    (tmp_path / "a").mkdir()
    assert find_images(tmp_path, names) == flat | {"1": tmp_path / "a/1.jpg"}
    with pytest.raises(InputError, match=r"3\.jpg; expected subfolders"):
        find_images(tmp_path, {"1": "a/3.jpg", "2": "3.jpg", "3": "b/3.jpg"})
    with pytest.raises(InputError, match="File name too long"):
        read_image(tmp_path / ("a" * 300))


def test_names_in_another_unicode_form_are_found(tmp_path: Path) -> None:
    (tmp_path / "cafe\u0301").mkdir()
    path = tmp_path / "cafe\u0301/u\u0308\u0301.png"
    path.write_bytes(b"")
    assert find_images(tmp_path, {"1": "caf\u00e9/\u01d8.png"}) == {"1": path}
    assert find_images(tmp_path, {"1": "caf\u00e9/\u01d6.png"})["1"].name == "\u01d6.png"
    path.with_name("\u00fc\u0301.png").write_bytes(b"")
    with pytest.raises(InputError, match="2 files"):
        find_images(tmp_path, {"1": "caf\u00e9/\u01d8.png"})
    exact = path.with_name("\u01d8.png")
    exact.write_bytes(b"")
    assert find_images(tmp_path, {"1": "cafe\u0301/\u01d8.png"}) == {"1": exact}


def test_images_of_all_kinds(tmp_path: Path) -> None:
    """Each becomes 8-bit RGB with the colours that are seen."""
    path = tmp_path / "image"
    deep = Image.fromarray(np.full((9, 9), 100 * 257, np.uint16))
    palette = Image.new("P", (9, 9), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    frames = [Image.new("RGB", (9, 9), name) for name in ("red", "blue")]
    for image, kind, options, expected in (
        (Image.new("L", (9, 9), 77), "PNG", {}, (77, 77, 77)),
        (Image.new("1", (9, 9), 1), "PNG", {}, (255, 255, 255)),
        (deep, "PNG", {}, (100, 100, 100)),
        (deep, "TIFF", {}, (100, 100, 100)),
        (Image.new("RGBA", (9, 9), (255, 0, 0, 0)), "PNG", {}, (255, 255, 255)),
        (palette, "PNG", {}, (9, 8, 7)),
        (palette, "PNG", {"transparency": 1}, (255, 255, 255)),
        (Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "TIFF", {}, (255, 0, 0)),
        (frames[0], "GIF", {"save_all": True, "append_images": frames[1:]}, (255, 0, 0)),
    ):
        image.save(path, kind, **options)
        decoded = read_image(path)
        assert decoded.mode == "RGB" and decoded.getpixel((0, 0)) == expected, (kind, expected)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (30, 20)).save(path, "JPEG", exif=exif)
    assert read_image(path).size == (20, 30)


def test_images_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image"

    def assert_refused(reason: str) -> None:
        with pytest.raises(InputError) as error:
            read_image(path)
        assert f"{path}: " in str(error.value) and reason in str(error.value)

    save_noise(path, 99, 99).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:1000])
    assert_refused("truncated")
    path.write_bytes(b"")
    assert_refused("JPEG, PNG")
    Image.new("RGB", (9, 9)).save(path, "EPS")
    assert_refused("JPEG, PNG")
    for mode, size in (("RGB", (7, 99)), ("RGB", (8, 900)), ("1", (9000, 9000))):
        Image.new(mode, size).save(path, "PNG")
        assert_refused(f"{size[0]} x {size[1]} pixels")
    monkeypatch.setattr(images.Image, "MAX_IMAGE_PIXELS", 1000)
    assert_refused(f"(81000000 pixels); expected at most {2**26} pixels")
    os.truncate(path, 2**30 + 1)  # sparse
    assert_refused("1073741825 bytes")


def test_images_of_a_folder(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "sub/c.webp", "sub/.d.png", ".e/f.png", "g.txt", "h"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list_images(tmp_path) == ["a.png", "b.JPG", "sub/c.webp"]
    for folder in (tmp_path / ".e/none", tmp_path / "g.txt", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=str(folder)):
            list_images(folder)
