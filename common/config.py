"""config.py — what a model and its data are: the options that several programs share (SPEC §9).

Imports no torch, so that `--help` answers at once.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from common.errors import check_range, require

Direction = Literal["i2t", "t2i"]
Precision = Literal["fp32", "tf32", "bf16"]
Routing = Literal["soft", "uniform", "hard"]
AffinityNorm = Literal[
    "clipped_l2norm", "l2norm", "l1norm", "clipped_l1norm", "clipped", "softmax", "no_norm"
]
CellName = Literal["ric", "glgc", "imrc", "cmrc"]
CELLS: tuple[CellName, ...] = get_args(CellName)  # the paper's order, and that of the out-paths

LAYERS = 3  # PAPER: three layers of cells, the last of which merges
CELL_NAMES = ",".join(CELLS).upper()
MOST_LAYERS = 100
LARGEST = 2**16  # width of a layer, items of a batch; more is a typing error
NO_SCORE = " (i2t with routing: changes no score, only the choice of --shortlist)"


@dataclass(frozen=True)
class ModelConfig:
    """What a model is. Defaults are the published ones."""

    direction: Annotated[
        Direction, "modality that is refined: i2t = regions see words, t2i = words see regions"
    ] = "i2t"
    embed_size: Annotated[int, "joint size of regions and words"] = 256
    img_dim: Annotated[int, "width of the region features in *_ims.npy"] = 2048
    max_words: Annotated[
        int, "WordPieces of a caption, [CLS] and [SEP] included; cut or padded"
    ] = 32
    num_head_IMRC: Annotated[int, "attention heads of intra-modal reasoning"] = 16
    hid_IMRC: Annotated[int, "inner width of intra-modal reasoning"] = 512
    raw_feature_norm_CMRC: Annotated[
        AffinityNorm, "normalisation of the affinities in cross-modal refinement"
    ] = "clipped_l2norm"
    lambda_softmax_CMRC: Annotated[
        float, "inverse temperature of cross-modal attention", "--lambda_softmax"
    ] = 4.0
    hid_router: Annotated[int, "inner width of a router"] = 512
    use_abs: Annotated[bool, "absolute value of the image embedding" + NO_SCORE] = False
    no_imgnorm: Annotated[bool, "do not normalise the image embedding" + NO_SCORE] = False
    routing: Annotated[
        Routing, "ablation: uniform opens every gate, hard only the largest of each out-path"
    ] = "soft"
    num_layer_routing: Annotated[
        int, "ablation: layers of cells, the last of which merges; 0: the two encoders alone"
    ] = LAYERS
    cells: Annotated[str, "ablation: the cells of a layer, some of the default ones"] = CELL_NAMES

    def __post_init__(self) -> None:
        sizes = ("embed_size", "img_dim", "num_head_IMRC", "hid_IMRC", "hid_router")
        check_range(self, sizes, 1, LARGEST)
        check_range(self, ("num_layer_routing",), 0, MOST_LAYERS)
        require(
            ",".join(self.cell_names).upper() == self.cells != "",
            f"--cells {self.cells}: expected some of {CELL_NAMES}, in this order",
        )
        require(self.max_words >= 2, f"--max_words {self.max_words}: [CLS] and [SEP] need 2")
        require(
            self.embed_size % self.num_head_IMRC == 0,
            f"--embed_size {self.embed_size} is no multiple of "
            f"--num_head_IMRC {self.num_head_IMRC}",
        )

    @property
    def cell_names(self) -> list[CellName]:
        """The cells of a layer."""
        return [name for name in CELLS if name.upper() in self.cells.split(",")]


@dataclass(frozen=True)
class DataConfig:
    """Where the data is, and what a batch holds. Defaults are the published ones."""

    data_path: Annotated[str, "folder that holds the data sets' folders"] = "/data"
    data_name: Annotated[str, "data set's folder: f30k_precomp, coco_precomp, or your own"] = (
        "precomp"
    )
    batch_size: Annotated[int, "matching pairs of a training step"] = 32
    extra_stc: Annotated[int, "extra captions for each pair, negatives only (i2t)"] = 0
    extra_img: Annotated[int, "extra images for each pair, negatives only (t2i)"] = 0
    workers: Annotated[int, "processes that read data; 0 reads in the program itself"] = 2
    seed: Annotated[int, "seed of initial weights, order, extra negatives and dropout"] = 0

    def __post_init__(self) -> None:
        check_range(self, ("batch_size",), 1, LARGEST)
        check_range(self, ("extra_stc", "extra_img", "workers"), 0, LARGEST)
        check_range(self, ("seed",), 0, 2**63 - 1)
