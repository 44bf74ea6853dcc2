"""evaluate_models.py — retrieval results of one model or an ensemble (SPEC §10).

It turns checkpoints, native or official, or saved score matrices into one score matrix, and
computes every metric from that. torch and transformers are imported inside functions, once the
options are parsed, so that `--help` answers at once.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from common.cli import parse, parse_in_all, pick_device, print_line, run
from common.config import Precision
from common.errors import InputError, check_range, require
from common.files import check_writable, write_array, write_json
from common.layout import files_of, read_groups_of_scores, split_files
from common.results import MSCOCO_IMAGES, EvaluationResult
from common.score_files import SUFFIX, map_scores, parse_part, write_part
from common.world import ALONE, World

if TYPE_CHECKING:
    import numpy as np
    import torch

    from checkpoint.evaluated import EvaluatedModel

log = logging.getLogger(__name__)

DESCRIPTION = """Evaluate one DIME model, or an ensemble of several, on a split.

  python evaluate_models.py --model_path runs/f30k/i2t/model_best.pth.tar --data_path data
  python evaluate_models.py --model_path I2T.pth.tar T2I.pth.tar --data_path data --fold5
  python evaluate_models.py --scores i2t.npy t2i.npy --bootstrap 1000

Prints R@1 R@5 R@10, median and mean rank in both directions; for 5,000 images as the mean of five
folds (MSCOCO 1K) and for all images (5K). Reads this project's checkpoints, the official ones, and
.safetensors."""

EvaluatedSplit = Literal["dev", "test", "testall"]
THEIRS = " (default: the checkpoint's)"
LEAST_SAMPLES = 100  # of the bootstrap: with fewer, a single sample would be a bound
GROUPS = {
    "models and data": ("model_path", "scores", "data_path", "data_name", "bert_path", "split"),
    "metrics": ("fold5", "bootstrap", "shortlist"),
    "output": ("save_scores", "json", "part"),
    "hardware": ("device", "precision", "compile", "workers"),
}


@dataclass(frozen=True)
class EvaluateConfig:
    """Every option of evaluation. Data, BERT and precision default to the checkpoints'."""

    model_path: Annotated[
        list[str] | None, "checkpoints, native, official or .safetensors; several are an ensemble"
    ] = None
    scores: Annotated[
        list[str] | None,
        "instead of models: saved score matrices, whose mean is an ensemble's; also pass "
        "--data_path, --data_name and --split to say which split they belong to",
    ] = None
    data_path: Annotated[str | None, "folder of the data sets' folders" + THEIRS] = None
    data_name: Annotated[str | None, "data set's folder, like f30k_precomp" + THEIRS] = None
    bert_path: Annotated[str | None, "folder of the BERT it was trained with" + THEIRS] = None
    split: Annotated[EvaluatedSplit | None, "default: test; --fold5: testall, if it exists"] = None
    fold5: Annotated[bool, "mean of five equal slices of the images (MSCOCO 1K)"] = False
    bootstrap: Annotated[int, "95 %% intervals from so many samples, at least 100; 0: none"] = 0
    shortlist: Annotated[
        int | None,
        "approximate: score only the best N captions of an image and images of a caption, by the "
        "product of their pooled vectors",
    ] = None
    save_scores: Annotated[str | None, "write the score matrix (images, captions), .npy"] = None
    json: Annotated[str | None, "write the result, unrounded"] = None
    part: Annotated[
        str | None,
        "i/n: score only part i of n of the images and write it to --save_scores, a .safetensors "
        "file; scripts/merge_scores.py makes one matrix of all parts",
    ] = None
    device: Annotated[str, "auto, cpu, cuda, cuda:1, mps, ..."] = "auto"
    precision: Annotated[Precision | None, "of products; tf32: CUDA only" + THEIRS] = None
    compile: Annotated[bool | None, "compile the routing (default: if it saves time)"] = None
    workers: Annotated[int, "processes that read features; 0: the program itself"] = 2

    def __post_init__(self) -> None:
        if bool(self.model_path) == bool(self.scores):
            raise InputError("expected either --model_path or --scores")
        paths = self.model_path or self.scores or []
        is_distinct = len({os.path.realpath(path) for path in paths}) == len(paths)
        require(is_distinct, f"{', '.join(paths)}: one file twice; expected different ones")
        check_range(self, ("workers", "bootstrap"), 0)
        check_range(self, ("shortlist",), 1)
        if 0 < self.bootstrap < LEAST_SAMPLES:
            raise InputError(
                f"--bootstrap {self.bootstrap}: expected 0 or at least {LEAST_SAMPLES}"
            )
        if self.part is not None:
            parse_part(self.part)
            self._check_unused("--part", "scores", "fold5", "bootstrap", "shortlist", "json")
            suits = str(self.save_scores).endswith(SUFFIX)
            require(suits, f"--save_scores {self.save_scores}: expected {SUFFIX} with --part")
        if self.scores:
            names = ("shortlist", "precision", "bert_path", "compile", "device", "workers")
            self._check_unused("--scores", *names)
            if (self.data_path or self.data_name) and not (
                self.data_path and self.data_name and self.split
            ):
                raise InputError("--scores: give --data_path, --data_name and --split together")

    def _check_unused(self, option: str, *names: str) -> None:
        """Raise InputError if one of the named options is given, too."""
        for name in names:
            is_default = getattr(self, name) == getattr(EvaluateConfig, name)
            require(is_default, f"--{name} cannot be given with {option}")


def main(argv: Sequence[str] | None = None) -> None:
    world = World.of()
    config = parse_in_all(lambda: parse(EvaluateConfig, argv, DESCRIPTION, groups=GROUPS), world)
    if config.part is not None:
        problem = f"--part {config.part}: cannot be given under torchrun, which divides the work"
        require(world.size == 1, problem)
        _score_part(config)
        return
    if config.scores:  # nothing to share out
        if world.rank == 0:
            _run(config)
        return
    from common.distributed import connected

    with connected(world):
        _run(config, world)


def _run(config: EvaluateConfig, world: World = ALONE) -> None:
    """Evaluate, print and write. Of several processes only rank 0 has a result."""
    done = _evaluate(config, world)
    if done is not None:
        _write(config, *done, printed=True)


def evaluate(
    model_paths: str | Path | Sequence[str | Path] | None = None,
    data_path: str | Path | None = None,
    data_name: str | None = None,
    bert_path: str | Path | None = None,
    split: EvaluatedSplit | None = None,
    fold5: bool = False,
    **options: Any,
) -> EvaluationResult:
    """Return the result of one model, or of an ensemble: the mean of the models' score matrices.

    `options` are further options of `EvaluateConfig`; `scores=[paths]` evaluates saved matrices.
    Data, BERT and precision default to the checkpoints'; the split is test, or with `fold5` testall
    if it exists. Raises InputError if a file or a combination cannot be used.
    """
    require(options.get("part") is None, "part: is an option of the command line only")
    config = EvaluateConfig(
        model_path=_as_list(model_paths),
        scores=_as_list(options.pop("scores", None)),
        data_path=None if data_path is None else str(data_path),
        data_name=data_name,
        bert_path=None if bert_path is None else str(bert_path),
        split=split,
        fold5=fold5,
        **options,
    )
    done = _evaluate(config)
    assert done is not None  # of one process
    _write(config, *done)
    return done[0]


def _as_list(paths: str | Path | Sequence[str | Path] | None) -> list[str] | None:
    if paths is None:
        return None
    return [str(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]


def _evaluate(
    config: EvaluateConfig, world: World = ALONE
) -> tuple[EvaluationResult, np.ndarray] | None:
    """Return the result and the score matrix, at rank 0; nothing is written yet."""
    from evaluation import evaluate_folds, evaluate_whole

    read = _scores_of_files if config.scores else _scores_of_models
    about, scores, owner = read(config, world)
    if world.rank > 0:
        return None
    images, captions = scores.shape
    folds = config.fold5 or images == MSCOCO_IMAGES
    unknown = dict.fromkeys(("models", "scores", "fingerprints", "seconds", "shortlist"))
    result = EvaluationResult(
        **unknown | about,
        images=images,
        captions=captions,
        whole=evaluate_whole(scores, owner, config.bootstrap),
        fold5=evaluate_folds(scores, owner, config.bootstrap) if folds else None,
        fold5_asked=config.fold5,
    )
    return result, scores


def _write(
    config: EvaluateConfig, result: EvaluationResult, scores: np.ndarray, printed: bool = False
) -> None:
    """Write every output. Raises InputError, but even then prints the result."""
    try:
        if config.json:
            write_json(Path(config.json), result.to_json())
        if config.save_scores:
            write_array(Path(config.save_scores), scores)
    finally:  # a full disk does not lose what hours of scoring gave
        if printed:
            print_line(result.to_text())


def _check_outputs(config: EvaluateConfig, inputs: Sequence[str | Path]) -> None:
    """Raise InputError before the long work if an output cannot be written or is an input."""
    outputs = [Path(path) for path in (config.save_scores, config.json) if path]
    for number, path in enumerate(outputs):
        check_writable(path, [*inputs, *outputs[:number]])


def _scores_of_files(
    config: EvaluateConfig, world: World
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Return what the options say about saved score matrices, their mean, and `owner`."""
    import numpy as np

    import evaluation as ev
    from checkpoint.checkpoint import warn_of_selection

    paths, split = config.scores or [], config.split
    folder = Path(config.data_path) / str(config.data_name) if config.data_path and split else None
    _check_outputs(config, [*paths, *(files_of(folder, split) if folder and split else [])])
    matrices = [map_scores(Path(path)) for path in paths]
    groups = read_groups_of_scores(Path(paths[0]), matrices[0].shape, folder, split)
    if folder is None:
        log.info("five captions an image are assumed, since --data_path is not given")
    for path, matrix in zip(paths, matrices, strict=True):
        if matrix.shape != matrices[0].shape:
            raise InputError(
                f"{path}: shape {matrix.shape}; expected {matrices[0].shape}, that of {paths[0]}"
            )
        warn_of_selection(path, split)
        if ev.is_reranked(matrix):
            log.warning("%s: looks like scores of a shortlist; the result is approximate", path)
    if config.fold5:
        ev.check_folds(groups.images, paths[0])
    about = {"scores": paths, "data_name": config.data_name, "split": split}
    dtype = np.result_type(np.float32, *matrices)
    mean = ev.mean_matrix(np.array(matrix, dtype) for matrix in matrices)
    return about, mean, groups.image_of_caption


def _scores_of_models(
    config: EvaluateConfig, world: World
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Return what is known of models and data, the mean of the models' scores, and `owner`."""
    from checkpoint.evaluated import identify
    from common.distributed import agreed, check_equal, device_name

    with agreed(world):
        device = pick_device(device_name(config.device, world), config.precision)
        models, data_name, split = _open_models(config, device, world)
    if world.size > 1:  # one process need not hash its files
        check_equal(world, identify(models))
    since = time.monotonic()
    scores, limits = _ensemble_scores(models, config, device, world=world)
    about = {
        "models": config.model_path,
        "data_name": data_name,
        "split": split,
        "fingerprints": [model.fingerprints for model in models],
        "seconds": round(time.monotonic() - since, 2),
        "shortlist": limits,
    }
    return about, scores, models[0].split.groups.image_of_caption


def _score_part(config: EvaluateConfig) -> None:
    """Write some rows of the scores, with what they are of. Raises InputError."""
    import numpy as np

    from checkpoint.evaluated import identify
    from evaluation import rows_of_part

    part, device = parse_part(str(config.part)), pick_device(config.device, config.precision)
    models, _, _ = _open_models(config, device)
    split = models[0].split
    rows = rows_of_part(split.images, part)
    log.info(
        "part %s: %d of %d images, from %d on", config.part, len(rows), split.images, rows.start
    )
    scores = np.empty((0, len(split.captions)), np.float32)
    if rows:
        scores, _ = _ensemble_scores(models, config, device, rows)
    about: dict[str, object] = {"number": part.rank + 1, "count": part.size, "first": rows.start}
    about |= {"images": split.images, "captions": len(split.captions)}
    write_part(Path(str(config.save_scores)), scores, identify(models) | about)


def _open_models(
    config: EvaluateConfig, device: torch.device, world: World = ALONE
) -> tuple[list[EvaluatedModel], str, EvaluatedSplit]:
    """Return all models with the split they are evaluated on, the data set's name, the split's."""
    from checkpoint.bert_files import bert_files
    from checkpoint.checkpoint import (
        APART,
        bert_folder,
        common_option,
        json_beside,
        read_checkpoint,
    )
    from checkpoint.evaluated import EvaluatedModel
    from evaluation import check_folds

    paths = config.model_path or []
    checkpoints = [read_checkpoint(path) for path in paths]
    widths = sorted({checkpoint.config.img_dim for checkpoint in checkpoints})
    require(
        len(widths) == 1,
        f"--model_path: models of features {widths} wide; expected one width; {APART}",
    )
    data_name = config.data_name or common_option(checkpoints, "data_name")
    folder = Path(config.data_path or common_option(checkpoints, "data_path")) / data_name
    split = config.split
    if split is None:
        has_testall = os.path.isfile(split_files(folder, "testall")[0])
        split = "testall" if config.fold5 and has_testall else "test"
    of_models = [json_beside(Path(path)) for path in paths]
    of_berts = [f for c in checkpoints for f in bert_files(bert_folder(c, config.bert_path))]
    if world.rank == 0:
        _check_outputs(config, [*paths, *of_models, *of_berts, *files_of(folder, split)])
    # Every model is opened before the first one is run: a fault of the second is not found late.
    place, choices = (folder, split, device), (config.bert_path, config.precision)
    models = [EvaluatedModel.open(each, *place, *choices) for each in checkpoints]
    if config.fold5:
        check_folds(models[0].split.images, models[0].split.path)
    return models, data_name, split


def _ensemble_scores(
    models: Sequence[EvaluatedModel],
    config: EvaluateConfig,
    device: torch.device,
    rows: range | None = None,
    world: World = ALONE,
) -> tuple[np.ndarray, dict[str, Any] | None]:
    """Return the mean of the models' scores, at rank 0; with --shortlist also what it left out.

    With `rows`, they are the scores of these images.
    """
    import numpy as np
    import torch

    import evaluation as ev
    from common.distributed import agreed, send_from_first

    encoded: list[ev.Encoded] = []
    for each in models:
        log.info(
            "%s (%s on %s): %d images and %d captions of %s",
            *(each.checkpoint.path, each.model.direction, device),
            *(each.split.images, len(each.split.captions), each.split.path),
        )
        inputs = (each.model, each.split, each.bert.vocabulary)
        with agreed(world):
            items = ev.encode_split(*inputs, device=device, rows=rows, workers=config.workers)
        encoded.append(items)
    runs = [(m.model, e, str(m.checkpoint.path)) for m, e in zip(models, encoded, strict=True)]
    if config.shortlist is None:
        for each, items in zip(models, encoded, strict=True):  # a part as all of the matrix
            pairs = each.split.images * len(items.captions)
            each.model.compile_if_it_pays(config.compile, pairs)
        matrices = (ev.score_all(m, e, device, name, world=world) for m, e, name in runs)
        return ev.mean_matrix(matrices), None
    coarse = ev.mean_matrix(items.coarse_scores() for items in encoded)
    wanted = ev.shortlist(coarse, config.shortlist)
    # Processors of other types may round the products, so also rank them, in another way.
    send_from_first(world, [torch.from_numpy(wanted.view(np.uint8))])
    for model, _, _ in runs:  # one query at a time is scored, and compiled code takes at least two
        model.compile_if_it_pays(bool(config.compile), 0)
    matrices = (ev.score_some(m, e, wanted, device, name, world) for m, e, name in runs)
    exact = ev.mean_matrix(matrices)
    bound = ev.recall_upper_bound(wanted, models[0].split.groups.image_of_caption)
    share = float(wanted.mean())
    limits = {"count": config.shortlist, "share": share, "recall_upper_bound": bound}
    return ev.rank_last(exact, coarse, wanted) if world.rank == 0 else exact, limits


if __name__ == "__main__":
    run(main)
