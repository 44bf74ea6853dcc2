"""prepare_captions.py: both kinds of JSON to SCAN's layout, and bad input."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run_here

from scripts import prepare_captions


def karpathy(splits: list[str], **more: object) -> dict:
    sentences = [[{"raw": f"image {i} text\n {s} "} for s in range(6)] for i in range(len(splits))]
    images = [
        {"imgid": i, "filename": f"{i}.jpg", "split": split, "sentences": sentences[i]} | more
        for i, split in enumerate(splits)
    ]
    return {"dataset": "own", "images": images}


def annotations(ids: list[int]) -> dict:
    texts = [(i, s) for s in range(6) for i in ids]
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in ids],
        "annotations": [
            {"id": n, "image_id": i, "caption": f"{i} text {s}"} for n, (i, s) in enumerate(texts)
        ],
    }


@pytest.fixture
def prepare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run the program on JSON files that are given by name; return what it printed as error."""

    def run(*options: str, status: int = 0, **files: dict) -> str:
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        paths = [tmp_path / f"{name}.json" for name in files]
        argv = [*paths, "--out", tmp_path / "out", *options]
        assert run_here(monkeypatch, prepare_captions.main, argv) == status
        return capsys.readouterr().err

    return run


def ids_in(folder: Path) -> dict[str, list[str]]:
    return {p.name.split("_")[0]: p.read_text().split() for p in folder.glob("*_ids.txt")}


def test_karpathy_splits(tmp_path: Path, prepare: Callable[..., str]) -> None:
    prepare(own=karpathy(["test", "restval", "val", "train"]))
    out = tmp_path / "out"
    assert ids_in(out) == {"train": ["1", "3"], "dev": ["2"], "test": ["0"]}
    captions = (out / "train_caps.txt").read_text().splitlines()
    assert captions == [f"image {i} text {s}" for i in (1, 3) for s in range(5)]
    assert json.loads((out / "id_mapping.json").read_text())["3"] == "3.jpg"


def test_first_images_of_train(tmp_path: Path, prepare: Callable[..., str]) -> None:
    prepare("--train", "2", own=karpathy(["train", "val", "restval", "val", "train"]))
    assert ids_in(tmp_path / "out") == {"train": ["0", "2"], "dev": ["1", "3"]}


def test_mscoco_has_testall(
    tmp_path: Path, prepare: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_captions, "TEST_1K", 2)
    content = karpathy(["test"] * 3, filepath="val2014")
    for image in content["images"]:
        image["cocoid"] = 70 + image["imgid"]
    prepare(coco=content)
    assert ids_in(tmp_path / "out") == {"test": ["70", "71"], "testall": ["70", "71", "72"]}
    names = json.loads((tmp_path / "out/id_mapping.json").read_text())
    assert names["70"] == "val2014/0.jpg"


def test_annotations_of_mscoco(
    tmp_path: Path, prepare: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_captions, "HELD_OUT", 2)
    prepare(captions_train2014=annotations([9, 8]), captions_val2014=annotations([5, 4, 3, 2, 1]))
    out = tmp_path / "out"
    splits = {"train": ["8", "9", "5"], "dev": ["1", "2"], "test": ["3", "4"]}
    assert ids_in(out) == splits | {"testall": ["3", "4"]}
    assert (out / "dev_caps.txt").read_text().splitlines()[4] == "1 text 4"
    names = json.loads((out / "id_mapping.json").read_text())
    assert (names["9"], names["1"]) == ("train2014/9.jpg", "val2014/1.jpg")


def test_sizes_of_mscoco_are_karpathys(tmp_path: Path, prepare: Callable[..., str]) -> None:
    prepare(captions_val2014=annotations(list(range(10_003))))
    sizes = {name: len(ids) for name, ids in ids_in(tmp_path / "out").items()}
    assert sizes == {"train": 3, "dev": 5000, "test": 1000, "testall": 5000}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c["images"].append({"id": 8, "file_name": "b"}), "id 8 belongs to 2 images"),
        (lambda c: c["annotations"][0].update(caption=3), "image 1: AttributeError"),
        (lambda c: c["annotations"][0].update(image_id=[]), "captions_train2014.json"),
        (lambda c: c["images"][0].pop("file_name"), "file_name"),
        (lambda c: c.update(images=3), "no images"),
    ],
)
def test_bad_annotations(prepare: Callable[..., str], change: Callable, expected: str) -> None:
    content = annotations([9, 8])
    change(content)
    error = prepare(status=2, captions_train2014=content)
    assert "captions_train2014.json: " in error and expected in error


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"sentences": [{"raw": "one"}] * 4}, "0.jpg: 4 sentences"),
        ({"sentences": [{"raw": " "}] * 5}, "0.jpg, sentence 1: ''"),
        ({"sentences": [{"raw": "\ud800"}] * 5}, "image 0: UnicodeEncodeError"),
        ({"sentences": [{"tokens": []}] * 5}, "image 0: KeyError: 'raw'"),
        ({"split": "validation"}, "0.jpg: split 'validation'"),
        ({"filename": "../0.jpg"}, "'../0.jpg'"),
        ({"imgid": "x\ny"}, "0.jpg: id"),
        ({"imgid": 7}, "id 7 belongs to 2 images"),
    ],
)
def test_bad_images(tmp_path: Path, prepare: Callable[..., str], more: dict, expected: str) -> None:
    error = prepare(status=2, own=karpathy(["train", "val"], **more))
    assert "own.json: " in error and expected in error
    assert not (tmp_path / "out").exists()


def test_captions_of_other_images_are_not_written_beside_features(
    tmp_path: Path, prepare: Callable[..., str]
) -> None:
    prepare(own=karpathy(["train"]))
    (tmp_path / "out/train_ims.npy").write_bytes(b"")
    prepare(own=karpathy(["train"]))
    renamed = karpathy(["train"], filename="another.jpg")  # under the same id
    for other in (karpathy(["train", "train"]), renamed):
        assert "train_ims.npy" in prepare(status=2, own=other)


def test_json_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "id_mapping.json"
    path.write_text(json.dumps(karpathy(["train"])))
    before = path.read_text()
    assert run_here(monkeypatch, prepare_captions.main, [path, "--out", tmp_path]) == 2
    assert "id_mapping.json" in capsys.readouterr().err
    assert path.read_text() == before


def test_split_that_the_json_lacks_is_refused(tmp_path: Path, prepare: Callable[..., str]) -> None:
    """Otherwise its ids would get the file names of other images."""
    prepare(own=karpathy(["train", "val"]))
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert "dev_caps.txt" in prepare(status=2, own=karpathy(["train", "train"]))
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
