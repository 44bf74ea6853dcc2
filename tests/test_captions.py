"""Any number of captions an image: which are an image's, and all that follows, by slow oracles."""

import csv
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from conftest import GOLDEN, IMG_DIM, REGIONS, tiny_train, write_split
from PIL import Image

from checkpoint.checkpoint import bert_of, build_model, read_checkpoint
from common.bootstrap import bootstrap_ci
from common.config import DataConfig
from common.errors import InputError
from common.layout import CaptionGroups, read_captions
from common.results import Retrieval
from data import Split, TrainingBatches
from evaluation import evaluate_folds, ranks, recall_upper_bound, retrieval
from scripts import check_data, inspect_routes, show_retrievals
from scripts.parts.routes import write_tables
from vocab import Vocabulary

RAGGED = [4, 1, 7, 3, 2, 6, 5, 1, 3, 1]
KINDS = {"one": [1] * 10, "two": [2] * 10, "ragged": RAGGED, "five": [5] * 10}
Run = Callable[..., int]


def owner_of(counts: Sequence[int]) -> list[int]:
    """The image of each caption."""
    return [image for image, count in enumerate(counts) for _ in range(count)]


def slow_ranks(scores: np.ndarray, owner: Sequence[int]) -> tuple[list[int], list[int]]:
    """Ranks from 0 of SPEC §10, query by query: equal scores count against the model."""
    of_images, of_captions = [], []
    for i, row in enumerate(scores):
        best = max(score for score, image in zip(row, owner, strict=True) if image == i)
        others = [score for score, image in zip(row, owner, strict=True) if image != i]
        of_images.append(sum(score >= best for score in others))
    for t, image in enumerate(owner):
        others = [row[t] for i, row in enumerate(scores) if i != image]
        of_captions.append(sum(score >= scores[image, t] for score in others))
    return of_images, of_captions


def slow_recalls(scores: np.ndarray, owner: Sequence[int]) -> list[float]:
    """R@1, R@5, R@10, median and mean rank of both directions."""
    values = []
    for found in slow_ranks(scores, owner):
        values += [100 * sum(rank < k for rank in found) / len(found) for k in (1, 5, 10)]
        values += [int(np.median(found)) + 1, sum(found) / len(found) + 1]
    return values


def values_of(result: Retrieval) -> list[float]:
    sides = result.to_json()
    return [value for way in ("i2t", "t2i") for value in sides[way].values()]


@pytest.mark.parametrize("counts", KINDS.values(), ids=KINDS)
def test_groups_equal_loops(counts: list[int]) -> None:
    groups, owner = CaptionGroups(np.array(counts)), owner_of(counts)
    assert groups.image_of_caption.tolist() == owner and groups.images == 10
    for images in ([3, 0, 3], [9], list(range(10))):
        expected = [t for i in images for t, image in enumerate(owner) if image == i]
        assert groups.captions_of(np.array(images)).tolist() == expected
    for captions in range(len(owner) + 2):
        whole = [i for i in range(10) if sum(counts[: i + 1]) <= captions]
        assert groups.whole_images(captions) == len(whole)
    assert str(groups) == " to ".join(map(str, sorted({min(counts), max(counts)})))


@pytest.mark.parametrize("counts", KINDS.values(), ids=KINDS)
def test_metrics_folds_and_intervals_equal_loops(counts: list[int]) -> None:
    rng, owner = np.random.default_rng(0), np.array(owner_of(counts))
    scores = rng.integers(0, 9, (10, len(owner))).astype(np.float32)  # with ties
    whole = ranks(scores, owner)
    assert [part.tolist() for part in whole] == list(slow_ranks(scores, owner))
    assert values_of(retrieval(scores, owner)) == pytest.approx(slow_recalls(scores, owner))
    blocks = []
    for first in range(0, 10, 2):
        columns = [t for t, image in enumerate(owner) if first <= image < first + 2]
        blocks.append((scores[first : first + 2][:, columns], owner[columns] - first))
    folds = [slow_recalls(*block) for block in blocks]
    assert values_of(evaluate_folds(scores, owner).metrics) == pytest.approx(np.mean(folds, 0))
    rng, drawn = np.random.default_rng(0), []
    for _ in range(20):
        chosen = rng.integers(10, size=10)
        captions = [t for i in chosen for t, image in enumerate(owner) if image == i]
        drawn.append(values_of(Retrieval.of(whole[0][chosen], whole[1][captions])))
    intervals = bootstrap_ci([whole], owner, 20)
    bounds = [bound for way in ("i2t", "t2i") for bound in intervals[way].values()]
    np.testing.assert_allclose(bounds, np.percentile(drawn, (2.5, 97.5), axis=0).T)
    known = scores > 5
    found = [any(known[i, owner == i]) for i in range(10)]
    bound = recall_upper_bound(known, owner)
    assert bound == {
        "i2t": 100 * np.mean(found),
        "t2i": 100 * np.mean(known[owner, range(len(owner))]),
    }


@pytest.mark.parametrize("counts", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("repeat", [False, True])
def test_batches_equal_loops(tmp_path: Path, counts: list[int], repeat: bool) -> None:
    """Every caption once with its image; extra captions and images are drawn from all."""
    write_split(tmp_path, "train", 10, counts=counts, repeat=repeat)
    write_split(tmp_path / "images", "train", 10, counts=counts)
    images, owner = np.load(tmp_path / "images/train_ims.npy"), owner_of(counts)
    split = Split.open(tmp_path, "train", IMG_DIM, training=True)
    vocabulary = Vocabulary.load(GOLDEN / "i2t/bert")
    plain = DataConfig(batch_size=4, workers=0)
    without = TrainingBatches(split, vocabulary, plain, 12, False)
    for extra in ({"extra_stc": 2}, {"extra_img": 2}):
        batches = replace(without, config=replace(plain, **extra))
        paired, others = [], []
        for position in range(len(batches)):
            batch = batches[1, position]
            captions = batch.captions.tolist()
            paired += captions[: batch.pairs]
            expected = np.stack([images[owner[t]] for t in captions[: batch.pairs]])
            assert (batch.regions[: batch.pairs].numpy() == expected).all()
            assert captions[: batch.pairs] == without[1, position].captions.tolist()
            ids, mask = vocabulary.encode([split.captions[t] for t in captions], 12)
            assert torch.equal(batch.ids, ids) and torch.equal(batch.mask, mask)
            for row in batch.regions[batch.pairs :].numpy():
                others.append(int((images == row).all((1, 2)).argmax()))
            others += captions[batch.pairs :]
        assert sorted(paired) == list(range(len(owner))) != paired
        assert len(others) == 2 * len(paired)
        assert set(others) <= set(range(10 if "extra_img" in extra else len(owner)))


@pytest.mark.parametrize(
    ("counts", "repeat"), [([1] * 6, True), ([3, 1, 7, 4, 2, 3], False), ([3, 4, 5, 7, 6, 3], True)]
)
def test_from_files_to_recalls(
    counts: list[int], repeat: bool, tiny: Path, run_train: Run, run_evaluate: Run
) -> None:
    """Scores are those of one pair at a time, recalls those of loops over the scores."""
    for name in ("train", "dev", "test"):
        write_split(tiny / "data/tiny", name, 6, counts=counts, repeat=repeat)
    few = sum(counts[:3]) + counts[3] - 1  # whole images: three, or four of one caption
    options = ("--max_steps", "2", "--val_captions", str(max(few, 4)))
    assert run_train(*tiny_train(tiny, "--extra_stc", "1", *options)) == 0
    model = tiny / "runs/i2t/checkpoint.pth.tar"
    logged = (tiny / "runs/i2t/metrics.jsonl").read_text().splitlines()
    validated = [event for event in map(json.loads, logged) if "rsum" in event]
    for split in ("dev", "test"):
        saved, result = tiny / f"{split}.npy", tiny / f"{split}.json"
        outputs = ("--save_scores", saved, "--json", result, "--workers", "0")
        assert run_evaluate("--model_path", model, "--split", split, *outputs) == 0
        scores, owner = np.load(saved), owner_of(counts)
        assert scores.shape == (6, len(owner))
        metrics = Retrieval.from_json(json.loads(result.read_text())["whole"]["metrics"])
        assert values_of(metrics) == pytest.approx(slow_recalls(scores, owner))
        if split == "test":
            np.testing.assert_allclose(scores, slow_scores(tiny, model, counts), atol=1e-5)
        else:
            images = 4 if counts[0] == 1 else 3
            part = scores[:images, : sum(counts[:images])]
            recalls = slow_recalls(part, owner[: part.shape[1]])
            assert validated[-1]["rsum"] == pytest.approx(sum(recalls[:3] + recalls[5:8]))
    # saved scores need the split, which names the captions of an image
    assert run_evaluate("--scores", tiny / "test.npy") == 2
    data = ("--data_path", tiny / "data", "--data_name", "tiny", "--split", "test")
    assert run_evaluate("--scores", tiny / "test.npy", *data, "--json", tiny / "again.json") == 0
    again = json.loads((tiny / "again.json").read_text())
    assert again["whole"] == json.loads((tiny / "test.json").read_text())["whole"]


def test_scores_without_data_are_of_five_captions_an_image(
    tmp_path: Path, run_evaluate: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """An image may have 3, 5 and 7: a line says what is assumed."""
    np.save(tmp_path / "s.npy", np.random.default_rng(0).random((3, 15)))
    assert run_evaluate("--scores", tmp_path / "s.npy") == 0
    assert "five captions an image" in caplog.text


def slow_scores(tiny: Path, path: Path, counts: Sequence[int]) -> np.ndarray:
    """Scores of the test split, pair by pair from the files."""
    checkpoint = read_checkpoint(path)
    bert = bert_of(checkpoint, tiny / "bert")
    model = build_model(checkpoint, bert).eval()
    write_split(tiny / "images", "test", len(counts), counts=counts)  # a row an image
    features = torch.from_numpy(np.load(tiny / "images/test_ims.npy"))
    ids, mask = bert.vocabulary.encode(read_captions(tiny / "images/test_caps.txt"), 12)
    with torch.no_grad():
        images, captions = model.encode_images(features), model.encode_captions(ids, mask)
        return oracle.score(model, images, captions, mask.sum(1).tolist())[0].numpy()


LETTERS = list("abcdefghij")


@pytest.mark.parametrize(
    ("ids", "rows", "counts", "row_a_caption"),
    [
        (None, "image", [5, 5], False),
        (None, "caption", [5, 5], True),
        (["a", "b"], "caption", [5, 5], True),
        ([*"aaaaabbbbb"], "image", [5, 5], False),
        ([*"aaabccccdd"], "image", [3, 1, 4, 2], False),
        ([*"aaabccccdd"], "caption", [3, 1, 4, 2], True),
        (LETTERS, "image", [1] * 10, True),  # one caption an image
        (LETTERS, "five", [5, 5], False),  # SCAN's ids of captions
        (LETTERS, "five repeated", [5, 5], True),
    ],
)
def test_captions_of_an_image(
    tmp_path: Path, ids: list[str] | None, rows: str, counts: list[int], row_a_caption: bool
) -> None:
    write_captions(tmp_path, 10, ids)
    features = np.random.default_rng(0).random((len(counts), REGIONS, IMG_DIM), dtype="f")
    repeated = rows in ("caption", "five repeated")
    np.save(tmp_path / "dev_ims.npy", np.repeat(features, counts, 0) if repeated else features)
    split = Split.open(tmp_path, "dev", IMG_DIM)
    assert split.groups.counts.tolist() == counts and split.row_a_caption == row_a_caption
    assert np.array_equal(split.regions(np.arange(len(counts))), features)
    of_captions = split.regions(split.groups.image_of_caption)
    assert np.array_equal(of_captions, np.repeat(features, counts, 0))


def write_captions(folder: Path, count: int, ids: Sequence[object] | None) -> None:
    (folder / "dev_caps.txt").write_text("".join(f"a {i}\n" for i in range(count)))
    if ids is not None:
        (folder / "dev_ids.txt").write_text("".join(f"{key}\n" for key in ids))


THREE = np.random.default_rng(0).random((30, REGIONS, IMG_DIM), dtype="f")  # 30 rows


@pytest.mark.parametrize(
    ("ids", "features", "expected"),
    [
        (None, THREE[:10], "dev_ims.npy: rows 0 to 4 differ"),  # one caption an image
        (None, np.tile(THREE[:2], (5, 1, 1)), "dev_ims.npy: rows 0 to 4 differ"),
        # captions' ids, and another number than one row or five for an image
        (LETTERS, np.tile(THREE[:2], (5, 1, 1)), "dev_ims.npy: rows repeat: 10 of 10"),
        (LETTERS, np.tile(THREE[:5], (2, 1, 1)), "dev_ims.npy: rows repeat: 10 of 10"),
        (LETTERS, np.repeat(THREE[:5], 2, 0), "dev_ims.npy: rows repeat: 10 of 10"),
        (LETTERS, np.repeat(THREE[:5], [1, 3, 3, 2, 1], 0), "dev_ims.npy: rows repeat: 8 of 10"),
        (LETTERS, THREE[[0, 1, 0, 1, 1, 0, 0, 1, 0, 1]], "dev_ims.npy: rows repeat: 10 of 10"),
        ([*"aaabccccdd"], THREE[[0, 0, 0, 1]], "dev_ims.npy: rows repeat: 3 of 4"),
        ([*"aaabccccdd"], np.tile(THREE[:2], (5, 1, 1)), "dev_ims.npy: rows 0 to 2 differ"),
        ([*"aaabccccdd"], THREE[:10], "dev_ims.npy: rows 0 to 2 differ"),
        ([*"abcccccccc"], np.repeat(THREE[:5], 2, 0), "dev_ims.npy: rows 2 to 9 differ"),
        ([*"aaabccccdd"], THREE[:2], "dev_ims.npy: 2 rows for 10 captions of 4 images"),
        ([*"aaabccccda"], THREE[:4], "dev_ids.txt: line 10 repeats 'a' of line 1"),
        (["a", "", *"bcdefghi"], THREE[:10], "dev_ids.txt: line 2 is empty"),
        ([*"aaabcccc"], THREE[:3], "dev_ids.txt: ends at line 8, but there are 3 rows for 10 cap"),
        (LETTERS[:4], THREE[:4], "dev_ids.txt: ends at line 4"),
    ],
)
def test_rows_and_ids_that_do_not_fit_are_named(
    tmp_path: Path,
    ids: list[str] | None,
    features: np.ndarray,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_captions(tmp_path, 10, ids)
    np.save(tmp_path / "dev_ims.npy", features)
    with pytest.raises(InputError) as error:
        Split.open(tmp_path, "dev", IMG_DIM)
    assert expected in str(error.value)
    monkeypatch.setattr("data.SMALL_FILE", 0)  # a sample of a large file is compared, too
    with pytest.raises(InputError) as error:
        Split.open(tmp_path, "dev", IMG_DIM)
    assert expected in str(error.value)


@pytest.mark.parametrize("small", [0, 2**28])
def test_a_few_images_twice_and_empty_rows_are_read(
    tmp_path: Path, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data sets have some images twice, and extractions that were cut off leave zeros."""
    monkeypatch.setattr("data.SMALL_FILE", small)
    write_captions(tmp_path, 10, LETTERS)
    for rows in ([0, 0, 1, 1, 2, 3, 4, 5, 6, 7], [29] * 8 + [0, 1]):
        features = np.where(np.arange(30)[:, None, None] == 29, np.float32(0), THREE)[rows]
        np.save(tmp_path / "dev_ims.npy", features)
        assert Split.open(tmp_path, "dev", IMG_DIM).groups.counts.tolist() == [1] * 10


def test_drawings_on_white_may_share_their_first_region(tmp_path: Path) -> None:
    write_captions(tmp_path, 10, LETTERS)
    features = THREE[:10]
    np.save(tmp_path / "dev_ims.npy", np.append(features[[0] * 10, :1], features, axis=1))
    assert Split.open(tmp_path, "dev", None).images == 10


def test_a_sample_of_a_large_file_shows_repeated_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.SMALL_FILE", 0)
    write_captions(tmp_path, 420, range(420))
    some = np.random.default_rng(0).random((210, 2, 3), dtype="f")
    for times in (2, 3, 5, 7):
        images = some[: 420 // times]
        for rows in (np.tile(images, (times, 1, 1)), np.repeat(images, times, 0)):
            np.save(tmp_path / "dev_ims.npy", rows)
            if times == 5 and np.array_equal(rows[0], rows[1]):  # SCAN's
                assert Split.open(tmp_path, "dev", 3).images == 84
                continue
            with pytest.raises(InputError, match="rows repeat: 16 of 16"):
                Split.open(tmp_path, "dev", 3)


EVEN = THREE[:4, :, :12]
WIDE = np.random.default_rng(0).random((4, REGIONS, 32), dtype="f")
NUMBERS = {
    "float32": (EVEN, None),
    "large": (EVEN * 1e6, None),
    "small float16": (EVEN.astype("f2") / 1000, None),  # some are subnormal
    "a few subnormal": (np.where(EVEN[:, :1, :1] == EVEN, np.float32(1e-40), EVEN), None),
    "many subnormal": (np.where(EVEN < 0.1, np.float32(1e-40), EVEN), "subnormal"),
    "one too large": (np.where(EVEN.max() == EVEN, np.float32(2e6), EVEN), "2e+06"),
    "float16 as float32": (np.maximum(EVEN - 0.5, 0).astype("f2").view("f4"), "subnormal"),
    "dense float16 as float32": (WIDE.astype("f2").view("f4"), "float16"),
    "float32 of float16": (WIDE.astype("f2").astype("f4"), None),
    "float64 as float32": (EVEN.astype("f8").view("f4"), "read as float32"),
    "integers as float16": ((EVEN * 200).astype("u2").view("f2"), "read as float16"),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_that_no_feature_can_be_are_refused(tmp_path: Path, kind: str) -> None:
    features, expected = NUMBERS[kind]
    write_captions(tmp_path, 20, None)
    np.save(tmp_path / "dev_ims.npy", features)
    if expected is None:
        Split.open(tmp_path, "dev", None)
        return
    with pytest.raises(InputError, match=r"dev_ims\.npy: rows 0 to 3") as error:
        Split.open(tmp_path, "dev", None)
    assert expected in str(error.value)


def test_fingerprints_of_scans_layout_stay_and_others_differ(tmp_path: Path) -> None:
    write_split(tmp_path, "dev", 3)
    split = Split.open(tmp_path, "dev", IMG_DIM)
    digest = hashlib.sha256("\n".join(split.captions).encode())
    digest.update(f"(3, {REGIONS}, {IMG_DIM}) <f4".encode())
    digest.update(np.load(tmp_path / "dev_ims.npy").tobytes())
    assert split.fingerprint == digest.hexdigest()
    prints = {split.fingerprint}
    for ids in ("a" * 5 + "b" * 5 + "c" * 5, "a" * 5 + "b" * 4 + "c" * 6, "a" * 13 + "bc"):
        (tmp_path / "dev_ids.txt").write_text("\n".join(ids))
        prints.add(Split.open(tmp_path, "dev", IMG_DIM).fingerprint)
    assert len(prints) == 3  # the first ids are SCAN's layout again


def test_a_first_image_with_more_than_val_captions_is_refused(
    tiny: Path, run_train: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    write_split(tiny / "data/tiny", "dev", 3, counts=[7, 1, 2])
    assert run_train(*tiny_train(tiny, "--val_captions", "6")) == 2
    assert "--val_captions 6" in capsys.readouterr().err


def test_check_data_and_inspect_routes_follow(trained: Path, tmp_path: Path) -> None:
    counts = [3, 1, 7]
    write_split(trained / "data/tiny", "test", 3, counts=counts, repeat=True)
    report = check_data.check(check_data.Options(str(trained / "data/tiny")))
    assert not report.problems
    assert [row[1:4] for row in report.rows if row[0] == "test"] == [["3", "1 to 7", "3"]]
    model = str(trained / "runs/i2t/checkpoint.pth.tar")
    data = {"data_path": str(trained / "data"), "bert_path": str(trained / "bert")}
    options = inspect_routes.Options(model, "out", **data, device="cpu", count=2, pair=[0, 5])
    pairs, _ = inspect_routes.open_pairs(options)
    assert len(pairs.encoded.images) == 3  # caption 5 is image 2's
    assert len(pairs.encoded.text) == 11
    gates = pairs.routes(2)
    write_tables(pairs, gates, None, tmp_path)
    with (tmp_path / "routes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["image"]) for row in rows] == [0, 0, 0, 1]
    assert np.array_equal(gates[3], pairs.route(1, [3])[0])


def test_show_retrievals_follows(tmp_path: Path) -> None:
    files = [tmp_path / f"{k}.png" for k in range(3)]
    for path in files:
        Image.new("RGB", (12, 9)).save(path)
    owner = np.array(owner_of([2, 1, 3]))
    scores = np.eye(3, dtype="f")[:, owner]  # each caption finds its image first
    captions = [f"caption {k}" for k in range(6)]
    above, below = show_retrievals.draw(scores, owner, captions, files).subfigs
    marks = [axes.get_xlabel() for axes in above.axes if axes.get_xlabel()]
    assert marks == ["right", "wrong", "wrong"] * 3
    answers = [[text.get_text()[:5] for text in axes.texts] for axes in below.axes[1::2]]
    assert [answer.count("right") for answer in answers] == [2, 1, 3]
