"""extract_regions.py: images of all kinds to SCAN's layout, interrupted and resumed."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT, TSV_WIDTH, run_here, tsv_row
from PIL import Image, ImageDraw
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.transform import resize_boxes
from torchvision.transforms.functional import to_tensor

from common.errors import InputError
from common.lock import LOCK
from scripts import check_data, extract_regions, prepare_captions
from scripts.parts import images, regions
from scripts.parts.images import find_images, read_image
from scripts.parts.regions import Tsv, best_boxes, grid_boxes

CPU = torch.device("cpu")


def draw(folder: Path, count: int = 10) -> Path:
    """Draw an image of a square each; return the path of their captions in Karpathy's form."""
    folder.mkdir()
    entries = []
    for i in range(count):
        image = Image.new("RGB", (60 + i, 48), "white")
        ImageDraw.Draw(image).rectangle((4 * i, 5, 4 * i + 20, 30), fill=(20 * i, 90, 40))
        image.save(folder / f"{i}.png")
        split = "val" if i % 5 == 3 else "test" if i % 5 == 4 else "train"
        texts = [{"raw": f"a man in {word} {i}"} for word in ("red", "blue", "black", "white", "a")]
        entries.append({"imgid": i, "filename": f"{i}.png", "split": split, "sentences": texts})
    path = folder / "dataset.json"
    path.write_text(json.dumps({"dataset": "own", "images": entries}))
    return path


@pytest.fixture
def extract(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run the program on tmp_path/data/own; return standard output, or error after status 2."""

    def run(*more: object, status: int = 0) -> str:
        argv = ["--data", tmp_path / "data/own", "--workers", 0, "--batch_size", 2, *more]
        capsys.readouterr()
        assert run_here(monkeypatch, extract_regions.main, argv) == status
        printed = capsys.readouterr()
        return printed.err if status else printed.out

    return run


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    argv = [draw(tmp_path / "images"), "--out", tmp_path / "data/own"]
    assert run_here(monkeypatch, prepare_captions.main, argv) == 0
    return tmp_path / "data/own"


def write_rows(drawn: Path, *left_out: int) -> list[object]:
    """Write a TSV row for all but some images; return the options that read it."""
    rows = b"".join(tsv_row(key, key) for key in range(10) if key not in left_out)
    (drawn / "rows.tsv").write_bytes(rows)
    return ["--model", "tsv", "--tsv", drawn / "rows.tsv"]


# From files to features


def test_features_of_a_grid(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extract: Callable[..., str]
) -> None:
    """A training reads them; tests/test_demo.py goes on to metrics."""
    (tmp_path / "images/1.png").write_bytes(b"no image")
    (tmp_path / "images/2.png").unlink()
    how = ["--model", "efficientnet_lite2", "--images", tmp_path / "images"]
    assert "1.png" in extract(*how, status=2)
    assert "ids 1, 2" in extract(*how, "--skip_broken", "--workers", 1)
    assert (drawn / "train_ids.txt").read_text().split() == ["0", "5", "6", "7"]
    features, boxes = np.load(drawn / "train_ims.npy"), np.load(drawn / "train_boxes.npy")
    assert features.shape == (4, 36, 1280) and features.std() > 0.1
    assert boxes.shape == (4, 36, 4) and boxes.min() >= 0 and boxes.max() <= 70
    assert (boxes[..., 2:] > boxes[..., :2]).all()
    assert run_here(monkeypatch, check_data.main, [drawn, "--full"]) == 0


def save_detector(path: Path, **sizes: int) -> FasterRCNN:
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None)
    model = FasterRCNN(backbone, 91, **sizes).eval()
    torch.save(model.state_dict(), path)
    return model


def test_boxes_of_a_detector(
    drawn: Path, extract: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regions, "SHORT_SIDE", 32)
    save_detector(tmp_path / "detector.pth")
    how = ["--model", "fasterrcnn", "--images", tmp_path / "images"]
    extract(*how, "--weights", tmp_path / "detector.pth")
    features, boxes = np.load(drawn / "test_ims.npy"), np.load(drawn / "test_boxes.npy")
    assert features.shape == (2, 36, 1024) and features.std(1).max() > 0
    assert boxes.shape == (2, 36, 4) and boxes.min() >= 0
    assert boxes[0, :, 2].max() <= 64 and boxes[0, :, 3].max() <= 48  # the size of image 4
    weights = torch.load(tmp_path / "detector.pth")
    weights["rpn.head.cls_logits.bias"][0] = torch.nan
    torch.save(weights, tmp_path / "nan.pth")
    for path in (tmp_path / "nan.pth", GOLDEN / "i2t/checkpoint.pth.tar"):
        assert path.name in extract(*how, "--weights", path, "--overwrite", status=2)


def save_noise(path: Path, width: int, height: int) -> Image.Image:
    """Save an image that changes if it is turned, mirrored or has its colours swapped."""
    colours = np.random.default_rng(0).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)
    image.save(path, "PNG")
    return image


def test_detector_features_are_those_of_its_boxes(tmp_path: Path) -> None:
    """The image is larger than the detector's input; torchvision's transformation is the oracle."""
    model = save_detector(tmp_path / "detector.pth", min_size=64, max_size=128)
    for module in model.modules():
        if "running_var" in dict(module.named_buffers(recurse=False)):
            module.eps = 0.0
    image = save_noise(tmp_path / "image", 300, 150)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regions, "SHORT_SIDE", 64)
        patch.setattr(regions, "LONG_SIDE", 128)
        source = regions.Detector({"a": tmp_path / "image"}, tmp_path / "detector.pth", CPU)
    features, boxes = source.encode([source.read("a")])
    assert boxes[0, :, 2].max() > 150 and len(np.unique(boxes[0], axis=0)) > 9
    with torch.no_grad():
        batch, _ = model.transform([to_tensor(image)])
        maps, size = model.backbone(batch.tensors), batch.image_sizes
        resized = resize_boxes(torch.from_numpy(boxes[0]), [150, 300], list(size[0]))
        pooled = model.roi_heads.box_roi_pool(maps, [resized], size)
        expected = model.roi_heads.box_head(pooled).numpy()
    assert np.abs(features[0] - expected).max() < 1e-4 < 0.01 < np.ptp(expected, 0).max()


def test_grid_rows_are_its_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = regions.Grid({"a": tmp_path / "image"}, CPU)
    image = save_noise(tmp_path / "image", 300, 150).resize((260, 260), Image.Resampling.BICUBIC)
    features, boxes = source.encode([source.read("a")])
    with torch.no_grad():
        pixels = (torch.from_numpy(np.array(image)).float() - 127) / 128
        maps = source.model.extract_features(pixels.permute(2, 0, 1)[None])
        cells = torch.nn.functional.adaptive_avg_pool2d(maps, 6)[0].numpy()  # [1280, 6, 6]
    for row, (left, top, right, bottom) in enumerate(boxes[0]):
        x, y = round(left / 50), round(top / 25)
        assert (right, bottom) == (left + 50, top + 25)
        assert np.abs(features[0, row] - cells[:, y, x]).max() < 1e-4
    assert np.abs(cells - cells.transpose(0, 2, 1)).max() > 0.1
    monkeypatch.setattr(regions, "LITE2_SHA256", "0" * 8)
    with pytest.raises(InputError, match="SHA-256"):
        regions.Grid({"a": tmp_path / "image"}, CPU)


def test_boxes() -> None:
    boxes = grid_boxes(60, 12)
    assert boxes[0].tolist() == [0, 0, 10, 2] and boxes[7].tolist() == [10, 2, 20, 4]
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 99, 30]])
    scores = torch.tensor([[0.1, 0.9], [0.2, 0.8], [0.5, 0.5]])
    best = best_boxes(boxes[:, None].expand(3, 2, 4), scores, (40, 50))
    assert best[:4].tolist() == [[0, 0, 10, 10], [20, 20, 50, 30], [0, 0, 10, 9], [0, 0, 50, 40]]
    assert len(best) == 36


# TSV files


def assert_rows_of_ids(folder: Path, ids: list[int]) -> None:
    """Assert that the training features and boxes are those that `tsv_row` drew for these ids."""
    features, boxes = np.load(folder / "train_ims.npy"), np.load(folder / "train_boxes.npy")
    assert features.dtype == np.float32 and len(features) == len(boxes) == len(ids)
    for row, key in enumerate(ids):
        rng = np.random.default_rng(key)
        assert np.array_equal(boxes[row], rng.random((36, 4), "float32"))
        assert np.array_equal(features[row], rng.random((36, TSV_WIDTH), "float32"))


def test_rows_of_a_tsv_file(
    drawn: Path, extract: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [tsv_row(key, key) for key in reversed(range(10))]
    damaged = [
        rows[3][:50] + b"\n",
        tsv_row(6, 99),
        tsv_row(77, 0, width=5),
        b"77\t60\t48\t35\t\t\n",
    ]
    damaged += [rows[1].replace(rows[1][-20:-10], b"!" * 10)]
    path = drawn / "rows.tsv"
    path.write_bytes(b"".join([*rows, *damaged]))
    extract("--model", "tsv", "--tsv", path)
    assert_rows_of_ids(drawn, [0, 1, 2, 5, 6, 7])
    (skipped,) = (record.args for record in caplog.records if "skipped" in record.message)
    assert skipped[0] == 5 and "line 12 (image_id 6 again)" in skipped[1]
    with pytest.raises(InputError, match="no complete row"):
        (drawn / "rows.tsv").write_bytes(b"".join(damaged[3:]))
        Tsv([drawn / "rows.tsv"], {"0": "0.png"}, False)


def test_rows_by_name(drawn: Path, extract: Callable[..., str]) -> None:
    """A name may have any letters and belongs to one image."""
    names = {str(key): f"p/é {key}.png" for key in range(10)}
    (drawn / "id_mapping.json").write_text(json.dumps(names))
    how = ["--model", "tsv", "--tsv", drawn / "rows.tsv", "--tsv_key", "name"]
    (drawn / "rows.tsv").write_bytes(b"".join(tsv_row(f"é {key}", key) for key in range(10)))
    extract(*how)
    assert np.load(drawn / "train_ims.npy").shape == (6, 36, 6)
    (drawn / "id_mapping.json").write_text(json.dumps(names | {"1": "q/é 0.jpg"}))
    assert "--tsv_key" in extract(*how, "--overwrite", status=2)


def test_missing_rows_are_left_out(drawn: Path, extract: Callable[..., str]) -> None:
    how = write_rows(drawn, 1, 5)
    assert "1: no complete row" in extract(*how, status=2)
    assert "ids 1, 5" in extract(*how, "--skip_broken")
    assert (drawn / "train_ids.txt").read_text().split() == ["0", "2", "6", "7"]
    captions = (drawn / "train_caps.txt").read_text().splitlines()
    assert len(captions) == 20 and captions[5] == "a man in red 2"
    assert_rows_of_ids(drawn, [0, 2, 6, 7])
    assert not list(drawn.glob("*.new"))
    assert "complete" in extract(*how, "--skip_broken")


# Interrupted and resumed


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_interrupted_and_resumed(
    drawn: Path, extract: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in every batch and at every renaming, a run writes the same files."""
    how, before = [*write_rows(drawn, 5), "--skip_broken"], drawn.with_name("before")
    shutil.copytree(drawn, before)
    extract(*how)
    whole = contents(drawn)

    class Killed(BaseException):
        pass

    real_encode, real_replace = Tsv.encode, Path.replace
    for calls in range(60):
        shutil.rmtree(drawn)
        shutil.copytree(before, drawn)
        left = [calls]

        def counted(real: Callable, left: list[int] = left) -> Callable:
            def run(*args: object) -> object:
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return real(*args)

            return run

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Tsv, "encode", counted(real_encode))
            patch.setattr(Path, "replace", counted(real_replace))
            extract(*how)
            raise Killed
        extract(*how)
        assert contents(drawn) == whole, calls
    assert left[0] >= 0  # the last one was not interrupted


def test_killed_and_resumed(tmp_path: Path) -> None:
    """The program, killed whenever its record has grown, writes the same files."""
    count = 60
    rows = tmp_path / "rows.tsv"
    rows.write_bytes(b"".join(tsv_row(key, key) for key in range(count) if key % 7))
    for folder in (tmp_path / "killed", tmp_path / "whole"):
        folder.mkdir()
        (folder / "train_caps.txt").write_text("a man\n" * 5 * count)
        (folder / "train_ids.txt").write_text("".join(f"{key}\n" for key in range(count)))
        names = {str(key): f"{key}.png" for key in range(count)}
        (folder / "id_mapping.json").write_text(json.dumps(names))

    def start(folder: Path) -> subprocess.Popen:
        argv = ["--data", folder, "--model", "tsv", "--tsv", rows, "--skip_broken", "--workers", 0]
        argv += ["--batch_size", 20]
        program = [sys.executable, "-m", "scripts.extract_regions", *map(str, argv)]
        return subprocess.Popen(program, cwd=ROOT, stderr=subprocess.DEVNULL)

    def rows_done(record: Path) -> int:
        return json.loads(record.read_text())["rows"] if record.exists() else 0

    assert start(tmp_path / "whole").wait() == 0
    record, kills = tmp_path / "killed/train_regions.json", []
    while True:
        done, program = rows_done(record), start(tmp_path / "killed")
        while program.poll() is None and rows_done(record) == done:
            time.sleep(0.001)
        program.kill()
        if program.wait() == 0:
            break
        kills.append(rows_done(record))
    assert len(kills) > 1 and 0 < kills[0] < kills[-1]
    for name in ("killed", "whole"):
        (tmp_path / name / LOCK).unlink()  # names the process
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_ctrl_c_keeps_whole_batches_and_other_options_are_refused(
    drawn: Path, extract: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    how, read = write_rows(drawn), Tsv.read

    def interrupt(source: Tsv, key: str) -> object:
        if key == "2":
            raise KeyboardInterrupt  # as of Ctrl-C
        return read(source, key)

    with monkeypatch.context() as patch:
        patch.setattr(Tsv, "read", interrupt)
        extract(*how, status=130)
    record = json.loads((drawn / "train_regions.json").read_text())
    assert record["rows"] == 2 and not record["complete"]
    assert "batch_size" in extract(*how, "--batch_size", 3, status=2)  # the last bits depend on it
    extract(*how)


def test_other_or_damaged_rows_are_not_resumed(drawn: Path, extract: Callable[..., str]) -> None:
    how, ids = write_rows(drawn, 6), drawn / "train_ids.txt"
    extract(*how, status=2)  # ids 0 1 2 5 are done, 6 has no row
    before = ids.read_text()
    ids.write_text("".join(reversed(before.splitlines(keepends=True))))
    assert "another ids" in extract(*how, status=2)
    ids.write_text(before)
    write_rows(drawn)
    assert "another weights" in extract(*how, status=2)
    write_rows(drawn, 6)
    path = drawn / "train_ims.npy.new"
    os.truncate(path, path.stat().st_size - 1)
    assert str(path) in extract(*how, status=2)
    path.unlink()
    assert str(path) in extract(*how, status=2)
    (drawn / "train_regions.json").write_text("{}")
    extract(*write_rows(drawn), "--overwrite")


def test_complete_features_are_checked(drawn: Path, extract: Callable[..., str]) -> None:
    how = write_rows(drawn)
    extract(*how)
    extract(*how)
    (drawn / "dev_boxes.npy").unlink()
    assert "dev_boxes.npy" in extract(*how, status=2)
    np.save(drawn / "dev_boxes.npy", np.zeros((1, 36, 4), "f4"))
    assert "dev_boxes.npy: 1 rows" in extract(*how, status=2)
    extract(*how, "--overwrite")
    (drawn / "dev_regions.json").write_text("{")
    assert "dev_regions.json" in extract(*how, status=2)


def test_only_one_run_writes(drawn: Path, extract: Callable[..., str]) -> None:
    how = write_rows(drawn)
    hold = "import sys; from pathlib import Path; from common.lock import only_writer\n"
    hold += "with only_writer(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, drawn / LOCK]
    with subprocess.Popen(command, cwd=ROOT, stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout.readline() == "held\n"
        assert f"process {other.pid}" in extract(*how, status=2)
        other.stdin.close()
    extract(*how)


def test_features_of_others_are_not_overwritten(drawn: Path, extract: Callable[..., str]) -> None:
    (drawn / "train_ims.npy").write_bytes(b"theirs")
    error = extract(*write_rows(drawn), status=2)
    assert "train_ims.npy" in error and "--overwrite" in error
    assert (drawn / "train_ims.npy").read_bytes() == b"theirs"


# Bad input


@pytest.mark.parametrize(
    ("argv", "option"),
    [
        (["efficientnet_lite2", "--images", "y", "--weights", "w"], "--weights"),
        (["fasterrcnn", "--images", "y"], "--weights"),
    ],
)
def test_options_that_do_not_fit_the_model(
    extract: Callable[..., str], argv: list[str], option: str
) -> None:
    assert option in extract("--model", *argv, status=2)


# Images


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
    assert_refused("decompression bomb")
    os.truncate(path, 2**30 + 1)  # sparse
    assert_refused("1073741825 bytes")
