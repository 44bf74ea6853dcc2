"""prepare_captions.py: each format to SCAN's layout, splits, numbers of captions, and bad input."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run_here

from common.layout import read_groups
from scripts import prepare_captions
from scripts.parts import caption_files

SPLIT = ["--split", "0.5", "0.25", "0.25"]
Prepare = Callable[..., str]


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


def table(images: int, captions: int = 5) -> str:
    """A CSV table of images named a.jpg, b.jpg, ..."""
    lines = [f'{chr(97 + i)}.jpg,"{i}, text {n}"\n' for i in range(images) for n in range(captions)]
    return "image,caption\n" + "".join(lines)


@pytest.fixture
def prepare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Prepare:
    """Run the program on files, given by name; return its standard output, or error."""

    def run(files: dict[str, dict | str], *options: str, status: int = 0) -> str:
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        argv = [*(tmp_path / name for name in files), "--out", tmp_path / "out", *options]
        assert run_here(monkeypatch, prepare_captions.main, argv) == status
        printed = capsys.readouterr()
        return printed.err if status else printed.out

    return run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def ids_in(folder: Path) -> dict[str, list[str]]:
    return {p.name.split("_")[0]: lines(p) for p in folder.glob("*_ids.txt")}


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def names_in(folder: Path) -> dict[str, str]:
    return json.loads((folder / "id_mapping.json").read_text())


# JSON


def test_karpathy_splits(out: Path, prepare: Prepare) -> None:
    content = karpathy(["test", "restval", "val", "train", "train"])
    printed = prepare({"own.json": content}, "--train", "2")  # its first two images
    assert "own.json: Karpathy's JSON, 5 images, 30 captions" in printed
    assert ids_in(out) == {"train": ["1", "3"], "dev": ["2"], "test": ["0"]}
    captions = [f"image {i} text {s}" for i in (1, 3) for s in range(5)]
    assert lines(out / "train_caps.txt") == captions
    assert names_in(out)["3"] == "3.jpg"


def test_mscoco_has_testall(out: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_captions, "TEST_1K", 2)
    content = karpathy(["test"] * 3, filepath="val2014")
    for image in content["images"]:
        image["cocoid"] = 70 + image["imgid"]
    printed = prepare({"coco.json": content})
    assert ids_in(out) == {"test": ["70", "71"], "testall": ["70", "71", "72"]}
    assert names_in(out)["70"] == "val2014/0.jpg"
    assert "3 captions of 3 images are left out" in printed  # test is a part of testall


def test_annotations_of_mscoco(
    out: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caption_files, "HELD_OUT", 2)
    train, val = annotations([9, 8]), annotations([5, 4, 3, 2, 1])
    prepare({"captions_train2014.json": train, "captions_val2014.json": val})
    splits = {"train": ["8", "9", "5"], "dev": ["1", "2"], "test": ["3", "4"]}
    assert ids_in(out) == splits | {"testall": ["3", "4"]}
    assert lines(out / "dev_caps.txt")[4] == "1 text 4"
    assert (names_in(out)["9"], names_in(out)["1"]) == ("train2014/9.jpg", "val2014/1.jpg")


def test_sizes_of_mscoco_are_karpathys(out: Path, prepare: Prepare) -> None:
    prepare({"captions_val2014.json": annotations(list(range(10_003)))})
    sizes = {name: len(ids) for name, ids in ids_in(out).items()}
    assert sizes == {"train": 3, "dev": 5000, "test": 1000, "testall": 5000}


def test_own_annotations_have_no_splits(out: Path, prepare: Prepare) -> None:
    prepare({"own.json": annotations([1, 2, 3, 4])}, *SPLIT)
    assert ids_in(out).keys() == {"train", "dev", "test"}
    assert names_in(out)["1"] == "1.jpg"


# Lines and tables

FIVE = [f"Un café, n° {n}" for n in range(5)]


@pytest.mark.parametrize(
    ("name", "content", "form"),
    [
        ("f.token", "".join(f"a b#1.jpg#{n}\t{c}\r\n" for n, c in enumerate(FIVE)), "token file"),
        (
            "results.csv",
            "image_name| comment_number| comment\n"
            + "".join(f"a b#1.jpg| {n}| {c} \n" for n, c in enumerate(FIVE[:4]))
            + f"a b#1.jpg| 4   {FIVE[4]}\n",
            "bar-separated file",
        ),
        ("captions.txt", "image,caption\n" + "".join(f'a b#1.jpg,"{c}"\r\n' for c in FIVE), "CSV"),
        (
            "m.csv",
            "text,File_Name,other\n\n" + "".join(f'"{c}",a b#1.jpg,3\n' for c in FIVE),
            "CSV",
        ),
        (
            "m.jsonl",
            "\n".join(json.dumps({"file_name": "a b#1.jpg", "caption": c}) for c in FIVE),
            "JSON lines",
        ),
        ("m.json", json.dumps({"text": FIVE[0], "image": "a b#1.jpg"}), "JSON lines"),
    ],
)
def test_lines_and_tables(out: Path, prepare: Prepare, name: str, content: str, form: str) -> None:
    """The image a b#1.jpg stands before three others of the same format."""
    others = [content.replace("a b#1.jpg", f"{x}.jpg") for x in "xyz"]
    if not content.startswith(("{", "a")):  # they have a header
        others = [text.split("\n", 1)[1] for text in others]
    joint = "".join(text.removesuffix("\n") + "\n" for text in (content, *others))
    printed = prepare({name: joint}, *SPLIT)
    assert f"{name}: {form}" in printed and ", 4 images" in printed
    assert names_in(out) == {key: key for key in ("a b#1.jpg", "x.jpg", "y.jpg", "z.jpg")}
    expected = FIVE[:1] if name == "m.json" else FIVE
    assert lines(out / "dev_caps.txt") == lines(out / "test_caps.txt") == expected
    assert {len(ids) for ids in ids_in(out).values()} == {1, 2}


def test_captions_of_an_image_need_not_be_consecutive(out: Path, prepare: Prepare) -> None:
    text = 'image,caption,split\nb.jpg," a\n\tman \u2028 runs",train\na.jpg,two,train\n'
    prepare({"c.csv": f"{text}b.jpg,three,train\n"})
    assert lines(out / "train_caps.txt") == ["a man runs", "three", "two"]  # one space each
    assert ids_in(out) == {"train": ["b.jpg", "b.jpg", "a.jpg"]}


@pytest.mark.parametrize(
    "text", ["image,caption,split\na.jpg,a man,test\n", json.dumps(karpathy(["test"]))]
)
def test_a_byte_order_mark_is_taken_off(out: Path, prepare: Prepare, text: str) -> None:
    prepare({"own": "\ufeff" + text})
    assert ids_in(out).keys() == {"test"}


def test_unusual_spaces_in_file_names(out: Path, prepare: Prepare) -> None:
    names = ["a\u00a0b.jpg", "a\u3000b.jpg", "\u00a0c.jpg", "👨\u200d👩.jpg"]
    text = "".join(f"{name},a man,test\n" for name in names)
    prepare({"c.csv": f"image,caption,split\n{text}"})
    ids = ids_in(out)["test"]  # readers of the file strip its lines
    assert ids == [name.strip() for name in names] and [names_in(out)[i] for i in ids] == names


# Splits


def test_folder_of_an_image_is_its_split(out: Path, prepare: Prepare) -> None:
    rows = "train/a.jpg,one\nvalidation/b/c.jpg,two\ntest/d.jpg,three\n"
    prepare({"images.csv": f"file_name,text\n{rows}"})
    expected = {"train": "train/a.jpg", "dev": "validation/b/c.jpg", "test": "test/d.jpg"}
    assert ids_in(out) == {name: [key] for name, key in expected.items()}


def test_folder_of_metadata_is_a_split(out: Path, prepare: Prepare) -> None:
    row = '{"file_name": "0.jpg", "text": "a man"}\n'
    prepare({"train/metadata.jsonl": row, "valid/metadata.csv": "file_name,text\n0.jpg,a dog\n"})
    assert ids_in(out) == {"train": ["train/0.jpg"], "dev": ["valid/0.jpg"]}
    assert names_in(out)["valid/0.jpg"] == "valid/0.jpg"


def test_split_is_a_seeded_share_of_the_images(out: Path, prepare: Prepare) -> None:
    content = table(20)
    prepare({"captions.txt": content}, "--split", "0.7", "0.2", "0.1")
    first = ids_in(out)
    assert {name: len(ids) for name, ids in first.items()} == {"train": 14, "dev": 4, "test": 2}
    assert sorted(key for ids in first.values() for key in ids) == [
        f"{chr(97 + i)}.jpg" for i in range(20)
    ]
    assert first["train"] == sorted(first["train"])  # the order of the file
    header, *rows = content.splitlines()
    prepare({"captions.txt": "\n".join([header, *reversed(rows)])}, "--split", "0.7", "0.2", "0.1")
    assert ids_in(out) == {name: ids[::-1] for name, ids in first.items()}
    prepare({"captions.txt": content}, "--split", "0.7", "0.2", "0.1", "--seed", "1")
    assert ids_in(out) != first


@pytest.mark.parametrize(
    ("files", "options", "expected"),
    [
        ({"test/c.txt": table(4)}, [], ("test/c.txt", "--split")),  # only of metadata is it a split
        ({"c.json": karpathy(["train"])}, SPLIT, ("c.json", "--split")),
        ({"c.txt": table(4)}, ["--split", "0.8", "0.1", "0.1"], ("--split 0.1", "test")),
        ({"c.txt": table(4)}, ["--split", "0.8", "0.1"], ("--split 0.8 0.1",)),
        ({"c.txt": table(4)}, ["--split", "0.8", "0.1", "0.2"], ("--split 0.8 0.1 0.2",)),
        ({"c.txt": table(4)}, ["--split", "1.5", "-0.3", "-0.2"], ("--split 1.5",)),
        ({"c.txt": "image,caption\ntest/a,b\nc/d,e\n"}, [], ("c.txt", "c/d", "split")),
        (
            {"c.txt": "image,caption,split\na,b,train\na,c,test\n"},
            [],
            ("c.txt: line 3", "'test'", "'train'"),
        ),
        ({"c.json": karpathy(["train"]), "d.txt": table(2)}, [], ("d.txt", "--split")),
    ],
)
def test_bad_splits(
    out: Path, prepare: Prepare, files: dict, options: list[str], expected: tuple[str, ...]
) -> None:
    error = prepare(files, *options, status=2)
    assert all(part in error for part in expected) and not out.exists()


# Captions an image


@pytest.mark.parametrize(
    ("counts", "option", "kept"),
    [
        ((5, 5, 5), "5", (5, 5, 5)),
        ((5, 5, 5), "all", (5, 5, 5)),
        ((7, 5, 6), "5", (5, 5, 5)),
        ((7, 5, 6), "all", (7, 5, 6)),
        ((7, 1, 3), "5", (5, 1, 3)),
        ((1, 1, 1), "5", (1, 1, 1)),
    ],
)
def test_captions_an_image(
    out: Path, prepare: Prepare, counts: tuple[int, ...], option: str, kept: tuple[int, ...]
) -> None:
    rows = [f"{i}.jpg,{i} text {n},dev\n" for i, count in enumerate(counts) for n in range(count)]
    text = "image,caption,split\n" + "".join(rows)
    printed = prepare({"c.csv": text}, "--captions_per_image", option)
    assert lines(out / "dev_caps.txt") == [
        f"{i} text {n}" for i, k in enumerate(kept) for n in range(k)
    ]
    are_five = set(kept) == {5}
    ids = [f"{i}.jpg" for i, k in enumerate(kept) for _ in range(1 if are_five else k)]
    assert ids_in(out) == {"dev": ids}
    assert tuple(read_groups(out, "dev", sum(kept), len(kept)).counts) == kept
    span = f"{min(kept)} to {max(kept)}" if len(set(kept)) > 1 else f"{kept[0]}"
    assert (f"captions an image: {span};" in printed) != are_five
    left_out = sum(counts) - sum(kept)
    assert (f"{left_out} captions of" in printed) == (left_out > 0)


# Bad input


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c["images"].append({"id": 8, "file_name": "b"}), "id 8 belongs to 2 images"),
        (lambda c: c["images"].append({"id": 7, "file_name": "b"}), "train2014/b: no caption"),
        (lambda c: c["annotations"][0].update(caption=3), "image 1: AttributeError"),
        (lambda c: c["annotations"][0].update(image_id=[]), "captions_train2014.json"),
        (lambda c: c["images"][0].pop("file_name"), "file_name"),
        (lambda c: c.update(images=3), "no images"),
        (lambda c: c.update(images=[]), "no image"),
    ],
)
def test_bad_annotations(prepare: Prepare, change: Callable, expected: str) -> None:
    content = annotations([9, 8])
    change(content)
    error = prepare({"captions_train2014.json": content}, status=2)
    assert "captions_train2014.json: " in error and expected in error


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"sentences": []}, "0.jpg: no caption"),
        ({"sentences": [{"raw": " "}] * 5}, "0.jpg, caption 1: ''"),
        ({"sentences": [{"raw": "a" * 10_001}]}, "0.jpg, caption 1: 'aaa"),
        ({"sentences": [{"raw": "\ud800"}] * 5}, "image 0: UnicodeEncodeError"),
        ({"sentences": [{"tokens": []}] * 5}, "image 0: KeyError: 'raw'"),
        ({"split": "other"}, "0.jpg: split 'other'"),
        ({"filename": "../0.jpg"}, "'../0.jpg'"),
        ({"filename": "a\x1b.jpg"}, r"'a\x1b.jpg'"),
        ({"filename": "a\udc80.jpg"}, r"'a\udc80.jpg'"),
        ({"imgid": "x\ny"}, "0.jpg: id"),
        ({"imgid": 7}, "id 7 belongs to 2 images"),
    ],
)
def test_bad_images(out: Path, prepare: Prepare, more: dict, expected: str) -> None:
    error = prepare({"own.json": karpathy(["train", "val"], **more)}, status=2)
    assert "own.json: " in error and expected in error
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "''"),
        ("a man runs\n", "'a man runs'"),
        ("id,label\n1,2\n", "'id,label'"),
        ("image,caption\n", "no image"),
        ("image,caption\na.jpg,a man, who runs\n", "line 2: 3 fields"),
        ('image,caption\na.jpg,"a man\nb.jpg,"a dog"\n', "line 3"),
        ('image,caption\na.jpg,"a man\n', "line 2"),
        ("image,caption\na.jpg,\n", "a.jpg, caption 1: ''"),
        ("image,caption\n../a.jpg,a man\n", "'../a.jpg'"),
        ("a.jpg#0\ta man\n\na.jpg 1 a dog\n", "line 3 is 'a.jpg 1 a dog'"),
        ('{"file_name": "a", "text": "b"}\n{"file_name"', "line 2: not JSON"),
        ('{"file_name": "a", "text": "b"}\n[]', "line 2"),
        ('{"file_name": "a", "text": "b"}\n{"file_name": "a"}', "line 2: None"),
        ('{"file_name": "a", "text": ["b"]}', "line 1: list"),
        ('{"images": [}', "not JSON"),
        ('{"images": []} {}', "'{}' after"),
        ('{"info": {}}', "'info'"),
    ],
)
def test_bad_lines(out: Path, prepare: Prepare, content: str, expected: str) -> None:
    error = prepare({"own.txt": content}, *SPLIT, status=2)
    assert "own.txt: " in error and expected in error
    assert not out.exists()


# Files that are there


def test_captions_of_other_images_are_not_written_beside_features(
    out: Path, prepare: Prepare
) -> None:
    prepare({"own.json": karpathy(["train"])})
    (out / "train_ims.npy").write_bytes(b"")
    prepare({"own.json": karpathy(["train"])}, "--captions_per_image", "all")
    assert len(lines(out / "train_ids.txt")) == 6
    prepare({"own.json": karpathy(["train"])})
    renamed = karpathy(["train"], filename="another.jpg")  # under the same id
    for other in (karpathy(["train", "train"]), renamed):
        assert "train_ims.npy" in prepare({"own.json": other}, status=2)


def test_an_input_is_not_overwritten(tmp_path: Path, prepare: Prepare) -> None:
    content = karpathy(["train"])
    assert "id_mapping.json" in prepare({"out/id_mapping.json": content}, status=2)
    assert json.loads((tmp_path / "out/id_mapping.json").read_text()) == content


def test_split_that_the_files_lack_is_refused(out: Path, prepare: Prepare) -> None:
    """Otherwise its ids would get the file names of other images."""
    prepare({"own.json": karpathy(["train", "val"])})
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert "dev_caps.txt" in prepare({"own.json": karpathy(["train", "train"])}, status=2)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
