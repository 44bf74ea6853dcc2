"""search_options.py — the options of scripts/search.py. Imports no torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from common.config import LARGEST, Precision
from common.errors import check_range, require

BackboneName = Literal["efficientnet_lite2", "fasterrcnn", "hf"]
DEVICES = "auto, cpu, cuda, cuda:1, mps, ..."
PORTS = 65535
MOST = 10**9  # items of an index

# Of an index that is there
BertPath = Annotated[str | None, "folder of BERT (default: the index's)"]
ModelPath = Annotated[
    list[str] | None, "the index's checkpoints, if they were moved (known by their SHA-256)"
]


@dataclass(frozen=True)
class IndexOptions:
    model_path: Annotated[list[str], "checkpoint, native, official or .safetensors; an ensemble"]
    images: Annotated[str, "folder of images, with its subfolders"]
    out: Annotated[str, "folder of the index"]
    first_stage: Annotated[
        str | None, "checkpoint of the encoders alone (--num_layer_routing 0), for many images"
    ] = None
    captions: Annotated[str | None, "text file of sentences to index, one a line"] = None
    bert_path: Annotated[str | None, "folder of BERT (default: the checkpoint's)"] = None
    backbone: Annotated[
        BackboneName | None, "backbone of the images (default: that of the training data)"
    ] = None
    weights: Annotated[
        str, "fasterrcnn: a local .pth or .safetensors; hf: a local transformers folder"
    ] = ""
    faiss: Annotated[
        str | None, "FAISS index of the first stage, a factory string like IVF4096,PQ32"
    ] = None
    dtype: Annotated[
        Literal["float16", "float32"], "type of the stored regions and words; float32 is exact"
    ] = "float16"
    precision: Annotated[
        Precision | None,
        "of products, here and in queries; tf32: CUDA only (default: the models', fp32 if the "
        "device emulates bf16)",
    ] = None
    batch_size: Annotated[int, "images at a time"] = 16
    workers: Annotated[int, "processes that read images; 0 reads in the program itself"] = 2
    device: Annotated[str, DEVICES] = "auto"
    skip_broken: Annotated[bool, "leave out images that cannot be read"] = False
    overwrite: Annotated[bool, "replace an index that is there"] = False

    def __post_init__(self) -> None:
        check_range(self, ("batch_size",), 1, LARGEST)
        check_range(self, ("workers",), 0, LARGEST)
        needs = "--faiss: is for the vectors of a first stage; expected --first_stage, too"
        require(self.faiss is None or self.first_stage is not None, needs)


@dataclass(frozen=True)
class QueryOptions:
    index: Annotated[str, "folder that `index` wrote"]
    text: Annotated[str | None, "a sentence, to find images", "TEXT"] = None
    image: Annotated[str | None, "an image, to find sentences"] = None
    top: Annotated[int, "answers"] = 10
    rerank: Annotated[int, "best items of the first stage that the models score"] = 100
    json: Annotated[str | None, "write the answer to this file"] = None
    html: Annotated[str | None, "write a page of the answer that needs no server"] = None
    device: Annotated[str, DEVICES] = "auto"
    bert_path: BertPath = None
    model_path: ModelPath = None

    def __post_init__(self) -> None:
        check_range(self, ("top",), 1, MOST)
        check_range(self, ("rerank",), 0, MOST)
        is_one = (self.text is None) != (self.image is None)
        require(is_one, "expected a sentence or --image, one of them")


@dataclass(frozen=True)
class ServeOptions:
    index: Annotated[str, "folder that `index` wrote"]
    host: Annotated[str, "address to serve at; 0.0.0.0 is all of this machine's"] = "127.0.0.1"
    port: Annotated[int, "port of the page"] = 7860
    device: Annotated[str, DEVICES] = "auto"
    bert_path: BertPath = None
    model_path: ModelPath = None

    def __post_init__(self) -> None:
        check_range(self, ("port",), 1, PORTS)
