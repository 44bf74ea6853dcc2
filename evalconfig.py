"""evalconfig.py — every option of evaluation (SPEC §9, §10), and a check of where it writes.

Kept apart from evaluate_models.py, so that either can be read at one go.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from common.config import Precision
from common.errors import InputError, check_range, require
from common.files import check_writable
from evaluation import Protocol

DESCRIPTION = """Evaluate one DIME model, or an ensemble of several, on a split.

  python evaluate_models.py --model_path runs/f30k/i2t/model_best.pth.tar --data_path data
  python evaluate_models.py --model_path I2T.pth.tar T2I.pth.tar --data_path data --fold5
  python evaluate_models.py --scores i2t.npy t2i.npy --protocols 1k5 5k --bootstrap 1000

Prints R@1 R@5 R@10, median and mean rank, both ways. Reads this project's checkpoints, the
published ones, and .safetensors."""

EvaluatedSplit = Literal["dev", "test", "testall"]
THEIRS = " (default: the checkpoint's)"
LEAST_SAMPLES = 100  # of the bootstrap: of fewer, one or two samples would be a bound


@dataclass(frozen=True)
class EvaluateConfig:
    """Every option of evaluation.

    Data, BERT and precision that are not given are the checkpoints'.
    """

    model_path: Annotated[
        list[str] | None, "checkpoints, own, published or .safetensors; two or more are an ensemble"
    ] = None
    data_path: Annotated[str | None, "folder that holds the data sets' folders" + THEIRS] = None
    data_name: Annotated[str | None, "data set's folder, f30k_precomp or so" + THEIRS] = None
    bert_path: Annotated[str | None, "folder of the BERT that it was trained with" + THEIRS] = None
    split: Annotated[
        EvaluatedSplit | None,
        "default: test; for --fold5, --protocols and --extended testall where there is one",
    ] = None
    fold5: Annotated[bool, "average over five slices of the images (MSCOCO 1K)"] = False
    precision: Annotated[Precision | None, "bf16 computes products in bfloat16" + THEIRS] = None
    device: Annotated[str, "auto, cpu, cuda, cuda:1, ..."] = "auto"
    workers: Annotated[int, "processes that read features; 0 reads in the program itself"] = 2
    shortlist: Annotated[
        int | None,
        "approximate: score only the best N captions of an image and images of a caption, as the "
        "product of their pooled vectors ranks them",
    ] = None
    skip: Annotated[
        bool, "leave out of a cell the pairs whose gates are closed (exact; not if compiled)"
    ] = True
    compile: Annotated[bool | None, "compile the routing (default: where it pays)"] = None
    scores: Annotated[
        list[str] | None,
        "in place of models: saved score matrices, whose mean is an ensemble's; five captions an "
        "image, in order",
    ] = None
    protocols: Annotated[
        list[Protocol] | None,
        "from one matrix: 1k5, five folds averaged (as --fold5), and 5k, the whole split",
    ] = None
    bootstrap: Annotated[
        int, "95 %% intervals from so many samples of the images, 100 or more; 0: none"
    ] = 0
    extended: Annotated[
        bool, "ECCV Caption and CxC figures on MSCOCO's test images (pip install eccv_caption)"
    ] = False
    save_scores: Annotated[
        str | None, "write the matrix (images, captions) here, .npy; float32 of models"
    ] = None
    ranks: Annotated[
        str | None,
        "write every query's rank from 0 here, .npz: i2t [images], t2i [captions]; of several "
        "protocols each name begins with its own, 5k.i2t",
    ] = None
    json: Annotated[str | None, "write the results here, unrounded"] = None

    def __post_init__(self) -> None:
        given = bool(self.model_path), bool(self.scores)
        require(any(given), "no --model_path and no --scores: expected one of them")
        require(not all(given), "--model_path and --scores exclude each other")
        check_range(self, ("workers", "bootstrap"), 0)
        check_range(self, ("shortlist",), 1)
        for name, choice, given in (
            ("split", EvaluatedSplit, [self.split or "test"]),
            ("precision", Precision, [self.precision or "fp32"]),
            ("protocols", Protocol, self.protocols or ()),
        ):
            known = get_args(choice)
            for value in given:
                require(value in known, f"--{name} {value}: expected one of {', '.join(known)}")
        twice = self.fold5 and self.protocols is not None
        require(not twice, "--fold5 and --protocols exclude each other")
        of_models = ("shortlist", "precision", "bert_path", "compile", "device", "workers", "skip")
        for name in of_models if self.scores else ():
            unused = getattr(self, name) == getattr(EvaluateConfig, name)  # the default
            require(unused, f"--{name} goes with --model_path, not with --scores")
        data = (self.data_path, self.data_name)
        whole = not self.scores or data == (None, None) or None not in (*data, self.split)
        require(whole, "--scores: data is named by --data_path, --data_name and --split together")
        several = not 0 < self.bootstrap < LEAST_SAMPLES
        require(several, f"--bootstrap {self.bootstrap}: expected 0, or {LEAST_SAMPLES} or more")

    @property
    def of_whole_split(self) -> bool:
        """Whether what is asked for is of MSCOCO's 5,000 test images, where they are there."""
        return self.fold5 or self.extended or self.protocols is not None

    @property
    def all_protocols(self) -> list[Protocol]:
        """The protocols, each once, in the order given."""
        return list(dict.fromkeys(self.protocols or ["1k5" if self.fold5 else "5k"]))


def check_different(config: EvaluateConfig) -> None:
    """Raise InputError where an ensemble holds one file twice, by whatever names."""
    option = "--scores" if config.scores else "--model_path"
    names: dict[str, str | Path] = {}
    for path in config.scores or config.model_path:
        place = os.path.realpath(path)
        found = f"{option} {path}: is the same file as {names.get(place)}"
        require(place not in names, f"{found}; expected each once in an ensemble")
        names[place] = path


def check_outputs(config: EvaluateConfig, inputs: Sequence[str | Path]) -> None:
    """Raise InputError before the long work where a result could not be written.

    So it is where it would take the place of an input or of another result.
    """
    outputs = {name: getattr(config, name) for name in ("save_scores", "ranks", "json")}
    for name, path in outputs.items():
        if not path:
            continue
        others = [other for key, other in outputs.items() if key != name and other]
        try:
            check_writable(Path(path), [*inputs, *others])
        except InputError as error:
            raise InputError(f"--{name} {error}") from error
