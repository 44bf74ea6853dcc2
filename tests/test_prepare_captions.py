"""scripts/prepare_captions.py: both kinds of JSON to SCAN's layout, and each fault."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run_here

from scripts import prepare_captions


def karpathy(splits: list[str], **more: object) -> dict:
    return {
        "dataset": "own",
        "images": [
            {
                "imgid": i,
                "filename": f"{i}.jpg",
                "split": split,
                "sentences": [{"raw": f"picture {i} said\n {s} "} for s in range(6)],
            }
            | more
            for i, split in enumerate(splits)
        ],
    }


def annotations(ids: list[int]) -> dict:
    said = [(i, s) for s in range(6) for i in ids]
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in ids],
        "annotations": [
            {"id": n, "image_id": i, "caption": f"{i} said {s}"} for n, (i, s) in enumerate(said)
        ],
    }


def prepare(monkeypatch: pytest.MonkeyPatch, folder: Path, **files: dict) -> int:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    paths = [folder / f"{name}.json" for name in files]
    return run_here(monkeypatch, prepare_captions.main, [*paths, "--out", folder / "out"])


def test_karpathys_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = karpathy(["test", "restval", "val", "train"])
    assert prepare(monkeypatch, tmp_path, own=content) == 0
    out = tmp_path / "out"
    found = {path.name: path.read_text() for path in out.glob("*_ids.txt")}
    assert found == {"train_ids.txt": "1\n3\n", "dev_ids.txt": "2\n", "test_ids.txt": "0\n"}
    captions = (out / "train_caps.txt").read_text().splitlines()
    assert captions == [f"picture {i} said {s}" for i in (1, 3) for s in range(5)]
    assert json.loads((out / "id_mapping.json").read_text())["3"] == "3.jpg"


def test_less_of_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps(karpathy(["train", "val", "restval", "val", "train"])))
    for number, kept in (("2", "0\n2\n"), ("9", "0\n2\n4\n")):
        argv = [path, "--out", tmp_path / number, "--train", number]
        assert run_here(monkeypatch, prepare_captions.main, argv) == 0
        assert (tmp_path / number / "train_ids.txt").read_text() == kept
        assert (tmp_path / number / "dev_ids.txt").read_text() == "1\n3\n"
    assert run_here(monkeypatch, prepare_captions.main, [*argv[:-1], "0"]) == 2


def test_mscoco_has_testall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_captions, "TEST_1K", 2)
    content = karpathy(["test"] * 3, filepath="val2014")
    for image in content["images"]:
        image["cocoid"] = 70 + image["imgid"]
    assert prepare(monkeypatch, tmp_path, coco=content) == 0
    out = tmp_path / "out"
    assert (out / "test_ids.txt").read_text() == "70\n71\n"
    assert (out / "testall_ids.txt").read_text() == "70\n71\n72\n"
    assert json.loads((out / "id_mapping.json").read_text())["70"] == "val2014/0.jpg"


def test_annotations_of_mscoco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_captions, "HELD_OUT", 2)
    files = {
        "captions_train2014": annotations([9, 8]),
        "captions_val2014": annotations([5, 4, 3, 2, 1]),
    }
    assert prepare(monkeypatch, tmp_path, **files) == 0
    out = tmp_path / "out"
    found = {path.name: path.read_text().split() for path in out.glob("*_ids.txt")}
    assert found == {
        "train_ids.txt": ["8", "9", "5"],
        "dev_ids.txt": ["1", "2"],
        "test_ids.txt": ["3", "4"],
        "testall_ids.txt": ["3", "4"],
    }
    assert (out / "dev_caps.txt").read_text().splitlines()[4] == "1 said 4"
    names = json.loads((out / "id_mapping.json").read_text())
    assert (names["9"], names["1"]) == ("train2014/9.jpg", "val2014/1.jpg")


def test_the_sizes_of_mscoco_are_karpathys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    val, test = annotations(list(range(10_003))), karpathy(["test"] * 1003)
    for image in test["images"]:
        image["cocoid"] = image["imgid"]
    for content, sizes in (
        ({"captions_val2014": val}, {"train": 3, "dev": 5000, "test": 1000, "testall": 5000}),
        ({"dataset_coco": test}, {"test": 1000, "testall": 1003}),
    ):
        folder = tmp_path / "-".join(content)
        folder.mkdir()
        assert prepare(monkeypatch, folder, **content) == 0
        for name, size in sizes.items():
            assert len((folder / f"out/{name}_ids.txt").read_text().split()) == size


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["images"].append({"id": 8, "file_name": "b"}), "images hold id 8 twice"),
        (lambda c: c["annotations"][0].update(image_id=7), "annotations of image 7, which is not"),
    ],
)
def test_annotations_that_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, change: Callable, said: str
) -> None:
    content = annotations([9, 8])
    change(content)
    assert prepare(monkeypatch, tmp_path, captions_train2014=content) == 2
    assert f"captions_train2014.json: {said}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"sentences": [{"raw": "one"}] * 4}, "own.json: 0.jpg: 4 sentences; expected 5"),
        ({"sentences": [{"raw": " "}] * 5}, "0.jpg, sentence 1: '', 0 characters"),
        ({"sentences": [{"raw": "\ud800"}] * 5}, "0.jpg, sentence 1"),
        ({"sentences": [{"tokens": []}] * 5}, "0.jpg, sentence 1: None; expected text"),
        ({"split": "validation"}, "0.jpg: split 'validation'; expected one of train, restval"),
        ({"filename": "../0.jpg"}, "file name '../0.jpg'; expected one inside"),
        ({"filename": "/etc/0.jpg"}, "file name '/etc/0.jpg'; expected one inside"),
        ({"filename": ""}, "file name ''; expected one inside"),
        ({"imgid": "x"}, "imgid: 'x'; expected a number"),
        ({"imgid": 7}, "id 7 is 2 pictures'"),
    ],
)
def test_problems(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: dict,
    said: str,
) -> None:
    assert prepare(monkeypatch, tmp_path, own=karpathy(["train", "val"], **more)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_captions_beside_features_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(monkeypatch, tmp_path, own=karpathy(["train"])) == 0
    (tmp_path / "out/train_ims.npy").write_bytes(b"")
    assert prepare(monkeypatch, tmp_path, own=karpathy(["train"])) == 0
    assert prepare(monkeypatch, tmp_path, own=karpathy(["train", "train"])) == 2
    assert "train_ims.npy: is of other pictures" in capsys.readouterr().err
    other = karpathy(["train"], filename="another.jpg")  # under the same id
    assert prepare(monkeypatch, tmp_path, own=other) == 2
    assert "train_ims.npy: is of other pictures" in capsys.readouterr().err


def test_the_json_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "id_mapping.json"
    path.write_text(json.dumps(karpathy(["train"])))
    before = path.read_text()
    assert run_here(monkeypatch, prepare_captions.main, [path, "--out", tmp_path]) == 2
    assert "id_mapping.json would be written over" in capsys.readouterr().err
    assert path.read_text() == before


def test_a_split_that_would_stay_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its ids would have the names of other pictures."""
    assert prepare(monkeypatch, tmp_path, own=karpathy(["train", "val"])) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert prepare(monkeypatch, tmp_path, own=karpathy(["train", "train"])) == 2
    assert "dev_caps.txt: is of a split that the JSON has not" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
