"""check_data.py: each fault is made, and its message read; a large file takes little memory."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, IMG_DIM, REGIONS, ROOT, run_here, write_split

from checkpoint.bert import bert_config, bert_parameters
from common import layout
from scripts import check_data
from scripts.parts import data_needs, data_problems

GROWTH = 500e6  # bytes
SCAN = (113_287, 36, 2048)  # MSCOCO's training features: 31 GiB


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole data set in both row ratios, with ids."""
    folder = tmp_path / "tiny"
    for name, images, repeat in (("train", 11, False), ("dev", 7, True), ("test", 10, False)):
        write_split(folder, name, images, repeat=repeat)
        write_ids(folder, name, [f"{name}{i}.jpg" for i in range(images)])
    return folder


def write_ids(folder: Path, name: str, ids: list[str]) -> None:
    (folder / f"{name}_ids.txt").write_text("\n".join(ids) + "\n")


@pytest.fixture
def check(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, dict[str, object]]]:
    """Exit status and report of a check."""

    def run(*argv: object) -> tuple[int, dict[str, object]]:
        out = tmp_path / "out.json"
        status = run_here(monkeypatch, check_data.main, [*argv, "--json", out])
        report = json.loads(out.read_text())
        printed = capsys.readouterr().out
        assert all(line in printed for line in [*report["faults"], *report["remarks"]])
        return status, report

    return run


def test_a_whole_data_set(folder: Path, check: Callable[..., tuple[int, dict]]) -> None:
    status, report = check(folder)
    assert (status, report["faults"]) == (0, [])
    splits = {split["name"]: split for split in report["splits"]}
    assert list(splits) == ["train", "dev", "test"]
    assert [splits[name]["images"] for name in splits] == [11, 7, 10]
    assert [splits[name]["rows_per_image"] for name in splits] == [1, 5, 1]
    assert [splits[name]["rows_read"] for name in splits] == [11, 35, 10]
    assert splits["dev"]["shape"] == [35, REGIONS, IMG_DIM]
    assert splits["train"]["dtype"] == "float32"
    assert splits["train"]["bytes"] == (folder / "train_ims.npy").stat().st_size


def change(name: str, work: Callable[[np.ndarray], np.ndarray | None]) -> Callable[[Path], None]:
    """Change a split's features."""

    def changed(folder: Path) -> None:
        features = np.load(folder / f"{name}_ims.npy")
        new = work(features)
        np.save(folder / f"{name}_ims.npy", features if new is None else new)

    return changed


def put(index: object, value: float) -> Callable[[np.ndarray], None]:
    return lambda features: features.__setitem__(index, value)


def cut(folder: Path) -> None:
    path = folder / "train_ims.npy"
    os.truncate(path, path.stat().st_size - 100)


def lengthen(folder: Path) -> None:
    with (folder / "train_ims.npy").open("ab") as file:
        file.write(b"12345")


def captions(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / f"{name}_caps.txt").write_text(text) and None


def ids(name: str, *lines: str) -> Callable[[Path], None]:
    return lambda folder: write_ids(folder, name, list(lines))


def mapping(folder: Path) -> None:
    names = [f"{name}{i}.jpg" for name in ("train", "dev", "test") for i in range(11)]
    names.remove("dev3.jpg")
    (folder / "id_mapping.json").write_text(json.dumps({name: name for name in names}))


def named(name: object) -> Callable[[Path], None]:
    """One picture's file gets another name."""

    def make(folder: Path) -> None:
        names = {
            f"{split}{i}.jpg": "a.jpg" for split in ("train", "dev", "test") for i in range(11)
        }
        (folder / "id_mapping.json").write_text(json.dumps(names | {"dev3.jpg": name}))

    return make


def several(folder: Path) -> None:
    cut(folder)
    change("dev", put((2, 0, 0), np.nan))(folder)
    write_ids(folder, "test", ["a"])


FIVE = [f"{i}.jpg" for i in range(7) for _ in range(5)]
FAULTS = {
    "no features": (lambda f: (f / "dev_ims.npy").unlink(), ["dev_ims.npy: not found"]),
    "no captions": (lambda f: (f / "dev_caps.txt").unlink(), ["dev_caps.txt: not found"]),
    "truncated": (
        cut,
        [
            "train_ims.npy: no whole .npy array of numbers: its header asks for 4132 "
            "bytes, the file has 4032"
        ],
    ),
    "too long": (lengthen, ["train_ims.npy: 5 bytes more than its header asks for"]),
    "doubles": (change("test", lambda a: a.astype(float)), ["float64 features; expected float32"]),
    "flat": (change("test", lambda a: a[:, 0]), [f"shape (10, {IMG_DIM}); expected (rows, reg"]),
    "flat integers": (
        change("test", lambda a: a[:, 0].astype(int)),
        ["shape (10,", "int64 features"],
    ),
    "rows": (change("train", lambda a: a[:9]), ["train_ims.npy: 9 rows for 55 captions"]),
    "count": (captions("test", "a\n" * 49), ["test_caps.txt: 49 captions; expected five an image"]),
    "width": (
        change("dev", lambda a: a[..., :5]),
        ["features are 5 wide; expected 13, as in train"],
    ),
    "void": (captions("dev", ""), ["dev_caps.txt: is empty; expected captions"]),
    "latin": (
        lambda f: (f / "dev_caps.txt").write_bytes(b"a\n\xe9\n"),
        ["dev_caps.txt: line 2 is not UTF"],
    ),
    "no words": (
        captions("train", "a\n" * 6 + "\n" + "b\n" * 10 + " \n" + "c\n" * 37),
        ["train_caps.txt: line 7, 18 is empty; expected a caption"],
    ),
    "endless": (captions("dev", "a" * 10_001 + "\n" + "a\n" * 34), ["line 1 has 10001 characters"]),
    "nan": (change("train", put((4, 2, 1), np.nan)), ["row 4 holds NaN or infinite features"]),
    "many": (
        change("dev", put((slice(5, 10), 0, 0), np.inf)),
        ["row 5, 6, 7 and 2 more holds NaN or infinite"],
    ),
    "unequal": (change("dev", put((18, 0, 0), 7)), ["the five rows of image 3 differ"]),
    "few ids": (
        ids("test", "a", "b"),
        ["test_ids.txt: 2 ids for 10 images; expected one an image"],
    ),
    "same id": (
        ids("test", *"abcdefghb", "j"),
        ["test_ids.txt: b is there twice; expected an image once"],
    ),
    "mixed ids": (
        ids("dev", *FIVE[:13], "x", *FIVE[14:]),
        ["line 14 is 'x'; expected '2.jpg' as in the lines"],
    ),
    "images in two splits": (
        ids("test", "train4.jpg", *"abcdefghi"),
        ["test_ids.txt: train4.jpg is in train_ids.txt, too; expected other images"],
    ),
    "an empty id": (ids("test", *"abc", "", *"efghij"), ["test_ids.txt: line 4 is empty"]),
    **{
        f"file {name}": (
            named(name),
            [f"id_mapping.json: dev3.jpg is {name!r}; expected a file in the pictures' folder"],
        )
        for name in ("../a.jpg", "/a.jpg", "a/../../b.jpg", "..\\a.jpg", "a\nb", "", ".", 7, None)
    },
    "no file of an id": (mapping, ["id_mapping.json: lacks dev3.jpg of dev_ids.txt"]),
    "several": (
        several,
        [
            "its header asks for",
            "dev_ims.npy: row 2 holds",
            "1 ids for 10 images",
            "the five rows of image 0 differ",
        ],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named(
    folder: Path, check: Callable[..., tuple[int, dict]], fault: str
) -> None:
    make, said = FAULTS[fault]
    make(folder)
    status, report = check(folder)
    assert status == 1
    found = report["faults"]
    for text in said:
        assert sum(text in line for line in found) == 1, found
    if fault not in ("many", "nan"):
        assert len(found) == len(said), found


def test_without_a_bert_nothing_is_loaded_that_would_read_one() -> None:
    """transformers and TensorBoard take seconds, and 200 MB."""
    heavy = "{'transformers', 'tensorboard'}"
    program = f"import sys, scripts.check_data; print({heavy} & {{*sys.modules}})"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_ids_of_captions_and_ids_five_times_are_read(
    folder: Path, check: Callable[..., tuple[int, dict]]
) -> None:
    write_ids(folder, "dev", FIVE)
    write_ids(folder, "test", [str(i) for i in range(50)])
    status, report = check(folder)
    assert (status, report["faults"]) == (0, [])
    assert [split["ids"] for split in report["splits"]] == [11, 7, 0]


def test_rows_between_the_samples_are_read_in_full(
    folder: Path, check: Callable[..., tuple[int, dict]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_problems, "SAMPLE", 3)
    change("train", put((1, 0, 0), np.nan))(folder)
    assert check(folder)[0] == 0
    status, report = check(folder, "--full")
    assert status == 1 and "row 1 holds NaN" in report["faults"][0]


def test_remarks_are_no_problems(folder: Path, check: Callable[..., tuple[int, dict]]) -> None:
    captions("test", "a\n" * 49 + "\n")(folder)
    change("test", lambda a: a[:, :3] * 0)(folder)
    (folder / "train_ids.txt").unlink()
    status, report = check(folder)
    assert status == 0
    remarks = "\n".join(report["remarks"])
    assert "test_caps.txt: 1 captions are empty" in remarks
    assert "10 of the 10 rows read hold zeros alone" in remarks
    assert f"images have 3 or {REGIONS} regions, by split" in remarks
    assert "numbers of images are not Flickr30K's (29,000 train" in remarks
    for name in ("ims.npy", "caps.txt", "ids.txt"):
        (folder / f"dev_{name}").unlink()
    assert "holds no dev, which train.py needs" in "\n".join(check(folder)[1]["remarks"])


def test_published_counts_are_known() -> None:
    flickr = {"train": 29_000, "dev": 1_014, "test": 1_000}
    coco = {"train": 113_287, "dev": 1_000, "test": 1_000, "testall": 5_000}
    assert data_problems.counts_remark(flickr) == "the numbers of images are Flickr30K's"
    assert data_problems.counts_remark(coco) == "the numbers of images are MSCOCO's"
    assert "not Flickr30K's" in data_problems.counts_remark(flickr | {"train": 28_999})


def test_captions_are_held_to_a_vocabulary(
    folder: Path, check: Callable[..., tuple[int, dict]]
) -> None:
    bert = GOLDEN / "i2t/bert"
    captions("dev", "a man\n" * 34 + "a man and a dog " * 4 + "\n")(folder)
    status, report = check(folder, "--bert_path", bert, "--max_words", "12")
    assert report["splits"][1]["longest"] == 22 and report["splits"][1]["cut"] == 1
    assert any("dev: 1 captions are longer than --max_words 12" in x for x in report["remarks"])
    captions("dev", "собака\n" * 35)(folder)
    status, report = check(folder, "--bert_path", bert)
    assert status == 1
    assert any("100 % of the WordPieces of dev are [UNK]" in fault for fault in report["faults"])


def test_a_folder_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, said in ((tmp_path / "no", "no: not found"), (tmp_path, "holds no split")):
        assert run_here(monkeypatch, check_data.main, [path]) == 2
        assert said in capsys.readouterr().err


def test_a_vocabulary_alone_is_enough(
    folder: Path, tmp_path: Path, check: Callable[..., tuple[int, dict]]
) -> None:
    (tmp_path / "words").mkdir()
    shutil.copy(GOLDEN / "i2t/bert/vocab.txt", tmp_path / "words")
    status, report = check(folder, "--bert_path", tmp_path / "words")
    assert status == 0 and report["bert_bytes"] is None
    assert report["splits"][0]["longest"] > 2 and report["needs"]
    assert any("the vocabulary alone is made use of" in remark for remark in report["remarks"])


def test_ids_that_no_terminal_takes(
    folder: Path, check: Callable[..., tuple[int, dict]], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "id_mapping.json").write_text(json.dumps({"\ud800\x1b[31m": "../x"}))
    out = folder / "out.json"
    with pytest.MonkeyPatch.context() as patch:
        assert run_here(patch, check_data.main, [folder, "--json", out]) == 1
    assert "\\ud800\\x1b[31m" in capsys.readouterr().out


def test_an_extraction_that_ended_between_two_renamings(
    folder: Path, check: Callable[..., tuple[int, dict]]
) -> None:
    named("a.jpg")(folder)
    names = json.loads((folder / "id_mapping.json").read_text())
    about = {"ids": layout.pictures_digest((folder / "test_ids.txt").read_text().split(), names)}
    (folder / "test_regions.json").write_text(json.dumps({"about": about, "renaming": True}))
    assert "may be of two extractions" in str(check(folder)[1]["faults"])


def test_a_report_takes_no_inputs_place(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bert = GOLDEN / "i2t/bert"
    for path in (folder / "dev_ids.txt", folder / "id_mapping.json", bert / "vocab.txt"):
        argv = [folder, "--bert_path", bert, "--json", path]
        assert run_here(monkeypatch, check_data.main, argv) == 2
        assert f"{path.name}: is an input or another output" in capsys.readouterr().err


PROGRAM = """
import sys
sys.path.insert(0, "tests")
from conftest import Path, run_here
from pytest import MonkeyPatch
from data import ImageBlocks, Split, TrainingBatches
from common.memory import peak_memory, used_memory
from scripts import check_data
from vocab import Vocabulary

folder, bert = Path(sys.argv[1]), sys.argv[2]
before = used_memory(check_data.CPU)
assert run_here(MonkeyPatch(), check_data.main, [folder]) == 0
split = Split.open(folder, "train", 2048, training=True)
batches = TrainingBatches(split, Vocabulary.load(bert), DataConfig(batch_size=64), 32, False)
rows = sum(len(batches[0, place].regions) for place in range(24))
for first in range(0, split.images, 128):
    rows += len(ImageBlocks(split)[first, min(first + 128, split.images)])
print(rows, peak_memory(check_data.CPU) - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is told by Linux")
def test_a_file_of_31_gib_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "train_ims.npy"
    np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(1, *SCAN[1:]))
    header = path.read_bytes()[:128].replace(b"(1, 36, 2048), }     ", b"(113287, 36, 2048), }")
    path.write_bytes(header)
    os.truncate(path, 128 + int(np.prod(SCAN, dtype=np.int64)) * 4)
    assert path.stat().st_size > 31 * 2**30 and path.stat().st_blocks * 512 < 2**20
    text = "".join(f"a man and a dog run {i}\n" for i in range(5 * SCAN[0]))
    (tmp_path / "train_caps.txt").write_text(text)
    command = [sys.executable, "-c", PROGRAM, tmp_path, GOLDEN / "i2t/bert"]
    found = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    rows, growth = map(int, found.stdout.splitlines()[-1].split())
    assert rows == 24 * 64 + SCAN[0]
    assert growth < GROWTH
    assert "train_ims.npy: 200 of the 200 rows read hold zeros alone" in found.stdout


def test_needs_grow_with_the_data(folder: Path, check: Callable[..., tuple[int, dict]]) -> None:
    bert = GOLDEN / "i2t/bert"
    rows = {row["what"]: row for row in check(folder, "--bert_path", bert)[1]["needs"]}
    train = rows["training i2t"]
    pairs, token = 2 * 32 * 32, REGIONS * 256 * 4  # 74 such tensors are kept at 36 regions
    kept = (train["most"] - train["least"]) / (pairs * token)
    assert kept == pytest.approx(74 - (16 * 2 + 3 * 3) * (36 - REGIONS) / 256, abs=0.1)
    hidden = json.loads((bert / "bert_config.json").read_text())["hidden_size"]
    assert train["cache_text"] == 55 * 32 * hidden * 4
    assert rows["evaluation of one model on test"]["scores"] == 10 * 50 * 4
    one, two = (rows[f"evaluation of {n} on test"]["least"] for n in ("one model", "an ensemble"))
    assert one < two
    without = {row["what"]: row for row in check(folder)[1]["needs"]}
    weights = bert_parameters(bert_config(bert))
    assert train["least"] - without["training i2t"]["least"] == 4 * weights


def test_memory_of_a_program_that_ran(folder: Path, tmp_path: Path) -> None:
    """A tiny model on tiny data takes what the libraries take."""
    sizes = "--embed_size 8 --max_words 12 --num_head_IMRC 2 --hid_IMRC 6 --hid_router 5"
    options = f"{sizes} --batch_size 4 --max_steps 1 --direction i2t --workers 0"
    where = ["--data_path", folder.parent, "--data_name", folder.name, "--logger_name", tmp_path]
    bert = ["--bert_path", GOLDEN / "i2t/bert"]
    command = [sys.executable, "train.py", *where, *bert, *options.split()]
    subprocess.run([*map(str, command)], cwd=ROOT, check=True, capture_output=True)
    peak = json.loads((tmp_path / "i2t/run.json").read_text())["peak_memory_bytes"]
    assert 0.6 * peak < data_needs.PROGRAM < 1.6 * peak


def test_too_little_memory_is_a_remark(
    folder: Path, check: Callable[..., tuple[int, dict]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_data, "used_memory", lambda device: 0)  # by other tests
    for free, said in ((2**50, False), (2**20, True)):
        monkeypatch.setattr(check_data, "free_memory", lambda device, free=free: free)
        remarks = check(folder)[1]["remarks"]
        assert any("too little free memory for training i2t" in r for r in remarks) == said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda boxes: boxes[:9], f"shape (9, {REGIONS}, 4), float32; expected (10, {REGIONS}, 4)"),
        (lambda boxes: boxes.astype(int), "int64; expected"),
        (lambda boxes: np.insert(boxes[:9], 3, np.nan, 0), "row 3 holds NaN or infinite numbers"),
        (lambda boxes: boxes, ""),
    ],
)
def test_boxes(
    folder: Path, check: Callable[..., tuple[int, dict]], change: Callable, said: str
) -> None:
    np.save(folder / "test_boxes.npy", change(np.zeros((10, REGIONS, 4), np.float32)))
    status, report = check(folder)
    assert status == bool(said) == len(report["faults"])
    assert all(said in f and f.startswith(f"{folder}/test_boxes.npy: ") for f in report["faults"])


def test_features_of_other_pictures(folder: Path, check: Callable[..., tuple[int, dict]]) -> None:
    """What extract_regions noted is held to the ids and file names that are there now."""
    named("a.jpg")(folder)
    names = json.loads((folder / "id_mapping.json").read_text())
    ids = (folder / "test_ids.txt").read_text().split()
    about = {"ids": layout.pictures_digest(ids, names)}
    (folder / "test_regions.json").write_text(json.dumps({"about": about}))
    assert check(folder)[0] == 0
    (folder / "id_mapping.json").write_text(json.dumps(names | {ids[4]: "b.jpg"}))
    status, report = check(folder)
    assert status == 1 and "test_regions.json: features are of other pictures than" in str(report)
