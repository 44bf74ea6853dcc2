"""scripts/eccv_caption.py against plain loops over the package's correct answers."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run_here

from common.errors import InputError
from scripts import eccv_caption


@pytest.fixture(scope="module")
def package() -> Any:
    """The package's answers for the first 80 test images."""
    found = eccv_caption.load_metrics()
    gts = found.eccv_gts
    assert max(len(r) for way in gts.values() for r in way.values()) <= eccv_caption.BEST
    found.coco_ids = found.coco_ids[:400]
    captions = {int(c) for c in found.coco_ids}
    images = {found.coco_gts["t2i"][c][0] for c in captions}
    for name in ("coco_gts", "cxc_gts", "eccv_gts"):
        gts = getattr(found, name)
        cut = {}
        for way, queries, items in (("i2t", images, captions), ("t2i", captions, images)):
            kept = {q: [i for i in right if i in items] for q, right in gts[way].items()}
            cut[way] = {q: right for q, right in kept.items() if q in queries and right}
        setattr(found, name, cut)
    return found


def folder_of(package: Any, path: Path, order: np.ndarray, mapped: bool = False) -> Path:
    """Write the ids of the images in some order into a data folder."""
    ids = [package.coco_gts["t2i"][int(c)][0] for c in package.coco_ids[::5][order]]
    if mapped:
        files = {str(n): f"val2014/COCO_val2014_{i:012d}.jpg" for n, i in enumerate(ids)}
        (path / "id_mapping.json").write_text(json.dumps(files))
        ids = list(range(len(ids)))
    (path / "testall_ids.txt").write_text("".join(f"{i}\n" for i in ids))
    return path


@pytest.mark.parametrize("mapped", [False, True])
def test_figures_equal_plain_loops(package: Any, mapped: bool, tmp_path: Path) -> None:
    order = np.random.default_rng(1).permutation(80)
    scores = np.random.default_rng(0).random((80, 400), dtype=np.float32)
    scores[np.arange(400) // 5, np.arange(400)] += 0.5  # somewhat right
    captions = eccv_caption.caption_ids(
        package, folder_of(package, tmp_path, order, mapped), "testall", 80
    )
    assert np.array_equal(captions, package.coco_ids.reshape(80, 5)[order])
    found = eccv_caption.compute(package, scores, captions)
    names = {"eccv_r1", "eccv_map_at_r", "eccv_rprecision", "cxc_r1", "cxc_r5", "cxc_r10"}
    assert found.keys() == names
    flat, image_ids = captions.ravel(), [package.coco_gts["t2i"][int(c[0])][0] for c in captions]
    for way, matrix, queries, items in (
        ("i2t", scores, image_ids, flat.tolist()),
        ("t2i", scores.T, flat.tolist(), image_ids),
    ):
        expected: dict[str, list[float]] = {name: [] for name in names}
        for row, query in zip(matrix, queries, strict=True):
            ranked = [items[k] for k in np.argsort(-row)]
            right = package.cxc_gts[way].get(query)
            for k in (1, 5, 10) if right else ():
                expected[f"cxc_r{k}"].append(float(bool(set(ranked[:k]) & set(right))))
            right = package.eccv_gts[way].get(query)
            if right:
                marks = [item in right for item in ranked[: len(set(right))]]
                precisions = [sum(marks[: r + 1]) / (r + 1) for r in range(len(marks))]
                expected["eccv_r1"].append(marks[0])
                expected["eccv_rprecision"].append(precisions[-1])
                expected["eccv_map_at_r"].append(np.dot(marks, precisions) / len(marks))
        for name, values in expected.items():
            assert len(values) > 10
            assert found[name][way] == pytest.approx(100 * np.mean(values)), (name, way)


def test_ids_name_each_test_image_once(package: Any, tmp_path: Path) -> None:
    path = folder_of(package, tmp_path, np.arange(80)) / "testall_ids.txt"
    ids = path.read_text().split()
    for wrong in (ids[:1] * 80, [*ids[:-1], f"0{ids[1]}"], [*ids[:-1], "9" * 5000], ids[:-1]):
        path.write_text("".join(f"{key}\n" for key in wrong))
        with pytest.raises(InputError, match=r"testall_ids\.txt: "):
            eccv_caption.caption_ids(package, tmp_path, "testall", len(wrong))


def test_the_program_averages_scores_and_prints_figures(
    package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(eccv_caption, "load_metrics", lambda: package)
    folder = folder_of(package, tmp_path, np.arange(80))
    matrices = np.random.default_rng(0).random((2, 80, 400))
    paths = [tmp_path / "a.npy", tmp_path / "b.npy"]
    for path, matrix in zip(paths, matrices, strict=True):
        np.save(path, matrix)
    argv = ["--scores", *paths, "--data", folder]
    assert run_here(monkeypatch, eccv_caption.main, argv) == 0
    expected = eccv_caption.compute(package, matrices.mean(0), package.coco_ids.reshape(80, 5))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{k}: i2t {v['i2t']:.1f}, t2i {v['t2i']:.1f}" for k, v in expected.items()]
    np.save(paths[1], matrices[1, :79, :395])
    assert run_here(monkeypatch, eccv_caption.main, argv) == 2
    assert "--scores" in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "eccv_caption", None)
    with pytest.raises(InputError, match="pip install eccv_caption"):
        eccv_caption.load_metrics()
