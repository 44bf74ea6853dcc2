"""compare_scoring.py — what ways of scoring cost and change, on a trained model and real data.

    python -m scripts.compare_scoring --model_path runs/f30k/i2t/model_best.pth.tar --split dev
    python -m scripts.compare_scoring ... --images 1000 --ways fp32 bf16 --shortlist 50 100

Ways are named by their precision. `fp32-all` sends every pair through every cell, `fp32` skips
closed cells, and `fp32-compiled` is compiled, which skips none; `bf16` likewise. Each is given as
it is, and with a shortlist of every length asked for. Differences are to the scores of the first
way; its shares of closed gates are told, too. Seconds are those of scoring alone, without those of
encoding and of compiling. Run it on an idle machine.

Where an evaluation of the whole split kept its scores (evaluate_models.py --save_scores), --scores
has the differences taken to those, and the way that they were made in can be left out of --ways.
"""

import logging
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np

from checkpoint.checkpoint import build_model, warn_of_selection
from common import provenance
from common.cli import parse, pick_device, print_line, run, warn_if_bf16_is_slow
from common.errors import check_range, require
from common.files import check_writable, write_json
from common.layout import CAPTIONS_PER_IMAGE
from evaluation import ceiling, image_of_caption, map_scores, retrieval
from scoring import Scorer, behind, encode_split, shortlist, shortlisted
from scripts.parts.opened import ModelOnSplit
from scripts.parts.reports import scoring_rows, scoring_tables

log = logging.getLogger(__name__)

Way = Literal["fp32-all", "fp32", "fp32-compiled", "bf16-all", "bf16", "bf16-compiled"]
WARM_UP = (2, 10)  # images and captions that are scored before the time is taken


@dataclass(frozen=True, kw_only=True)
class Options(ModelOnSplit):
    images: Annotated[int, "first images of the split, each with its five captions"] = 200
    ways: Annotated[list[Way] | None, "which ways of scoring (default: all)"] = None
    shortlist: Annotated[list[int], "lengths of shortlists"] = (100,)
    scores: Annotated[str | None, "saved scores of this model and split, to compare with"] = None
    json: Annotated[str | None, "write the rows here"] = None

    def __post_init__(self) -> None:
        check_range(self, ("images",), 1)
        least = min(self.shortlist)
        require(least >= 1, f"--shortlist {least}: expected 1 or more")


class Comparison:
    """The ways of scoring a split's first images with one model."""

    def __init__(self, options: Options) -> None:
        self.options, self.device = options, pick_device(options.device)
        self.checkpoint, self.bert, self.split = options.open()
        selected_on = self.checkpoint.state.get("dev_data")
        warn_of_selection(options.model_path, options.split, selected_on, self.split.fingerprint)
        self.images = min(options.images, self.split.images)
        self.first: np.ndarray | None = None  # the scores that the others are compared with
        self.closed: list[list[float]] = []  # [layers][cells] share of the first way's closed gates
        taken = options.files(self.checkpoint, self.split)
        if options.scores:
            self.first = self._saved()
            taken.append(options.scores)
        if options.json:
            check_writable(Path(options.json), taken)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Of saved scores, then of every way: all pairs, and each shortlist."""
        if self.first is not None:
            yield _row("saved", self.first, None, None)
        for way in self.options.ways or get_args(Way):
            scorer = self._scorer(way)
            if way.endswith("-compiled") and not scorer.model.space.is_compiled:
                log.warning("%s: left out, for it could not be compiled", way)
                continue
            scores, seconds = timed(scorer.all_pairs)
            self.closed = self.closed or (scorer.closed / scorer.scored).tolist()
            if self.first is None:
                self.first = scores
            difference = np.abs(scores - self.first, dtype=np.float64)
            changed = {"mean": float(difference.mean()), "largest": float(difference.max())}
            yield _row(way, scores, scorer.scored, seconds) | {"difference": changed}
            products = scorer.encoded.products()
            for count in self.options.shortlist:
                wanted = shortlist(products, count)
                before = scorer.scored
                some, seconds = timed(scorer.some_pairs, wanted)
                found = behind(some, products, wanted)
                limits = {
                    "shortlist": count,
                    "ceiling": ceiling(wanted, image_of_caption(wanted.shape[1])),
                }
                yield _row(way, found, scorer.scored - before, seconds) | limits

    def _saved(self) -> np.ndarray:
        """The saved scores of the images that are compared."""
        scores = map_scores(Path(self.options.scores))
        fits = len(scores) == self.split.images
        found = f"{self.options.scores}: scores of {len(scores)} images"
        require(fits, f"{found}; {self.split.path} has {self.split.images}")
        # Of vectors that are not of unit length no score tells whether it is of a shortlist.
        all_pairs = self.checkpoint.config.no_imgnorm or not shortlisted(scores)
        require(all_pairs, f"{self.options.scores}: scores of a shortlist; expected all pairs'")
        return scores[: self.images, : CAPTIONS_PER_IMAGE * self.images]

    def _scorer(self, way: Way) -> Scorer:
        """A model that scores in this way, ready to."""
        precision, _, how = way.partition("-")
        warn_if_bf16_is_slow(precision, self.device)
        model = build_model(self.checkpoint, self.bert, self.device)
        model.precision = precision
        if how == "all":
            model.space.skip_nothing()
        model.compile_where_it_pays(how == "compiled", 0)
        vocabulary, words = self.bert.vocabulary, self.checkpoint.config.max_words
        where = {"device": self.device, "images": self.images}
        encoded = encode_split(model, self.split, vocabulary, words, **where)
        few = np.zeros((self.images, len(encoded.text)), dtype=bool)
        few[: WARM_UP[0], : WARM_UP[1]] = True
        Scorer(model, encoded, self.device).some_pairs(few)
        return Scorer(model, encoded, self.device, str(self.checkpoint.path))


def timed(work: Any, *given: Any) -> tuple[Any, float]:
    """What it gives, and its seconds; scores leave a GPU before it ends."""
    since = time.perf_counter()
    return work(*given), time.perf_counter() - since


def _row(way: str, scores: np.ndarray, pairs: int | None, seconds: float | None) -> dict[str, Any]:
    found = retrieval(scores, image_of_caption(scores.shape[1]))
    return {
        "way": way,
        "shortlist": None,
        "pairs": pairs,
        "seconds": seconds and round(seconds, 2),
        "pairs_per_s": seconds and round(pairs / seconds, 1),
        "difference": None,
        "ceiling": None,
        "metrics": found.as_dict(),
    }


def main() -> None:
    options = parse(Options, None, __doc__)
    comparison = Comparison(options)
    command = shlex.join(["python", "-m", "scripts.compare_scoring", *sys.argv[1:]])
    found = provenance.of(command, comparison.device) | {
        "direction": comparison.checkpoint.config.direction,
        "split": options.split,
        "images": comparison.images,
        "cells": comparison.checkpoint.config.cell_names,
        "closed": [],
        "rows": [],
    }
    for row in comparison.rows():
        found["rows"].append(row)
        found["closed"] = comparison.closed
        log.info("%s", scoring_rows([row]).splitlines()[-1])
        if options.json:  # at once: the next row may take an hour
            write_json(Path(options.json), found)
    require(bool(found["closed"]), "--ways: none of them could be taken, see above")
    print_line(scoring_tables(found))


if __name__ == "__main__":
    run(main)
