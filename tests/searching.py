"""Shared by the tests of search: images, tiny models that were trained with them, an index."""

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import transformers
from conftest import GOLDEN, draw, run_here

import train
from scripts import extract_regions, prepare_captions, search

WIDTH = 8  # of the tiny backbone's features
SIZES = {"embed_size": 8, "max_words": 12, "num_head_IMRC": 2, "hid_IMRC": 6, "hid_router": 5}
HOSTILE = "<script>window.hacked = 1</script> a man ${6 * 7} {{value}} & co"
SENTENCES = [f"a man in {word} {i}" for i in range(3) for word in ("red", "blue", "black")]


def save_backbone(folder: Path) -> None:
    """Save a tiny random ViT with its image processor."""
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "image_size": 48, "patch_size": 6}
    transformers.AutoModel.from_config(transformers.ViTConfig(**sizes)).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 48, "width": 48}).save_pretrained(folder)


def model_of(world: Path, name: str) -> Path:
    """Return the checkpoint of i2t, t2i or encoders."""
    return next((world / name).glob("*/model_best.pth.tar"))


def train_tiny(folder: Path, name: str, *more: str) -> None:
    """Train a model for a step on the features in `folder`."""
    paths = {"data_path": folder / "data", "bert_path": GOLDEN / "i2t/bert"}
    paths |= {"logger_name": folder / name}
    small = {"batch_size": 4, "workers": 0, "max_steps": 1, "val_captions": 5}
    options = {**paths, "data_name": "own", **SIZES, **small}
    train.main([x for key, value in options.items() for x in (f"--{key}", str(value))] + [*more])


def write_world(folder: Path) -> Path:
    """Write images, a backbone, the features of a split of them, and three trained models."""
    with pytest.MonkeyPatch.context() as patch:
        captions = draw(folder / "images", 10)
        data = folder / "data/own"
        assert run_here(patch, prepare_captions.main, [captions, "--out", data]) == 0
        captions.unlink()
        torch.manual_seed(0)
        save_backbone(folder / "vit")
        how = ["--model", "hf", "--weights", folder / "vit", "--images", folder / "images"]
        how += ["--workers", 0, "--batch_size", 3]
        assert run_here(patch, extract_regions.main, ["--data", data, *how]) == 0
    train_tiny(folder, "i2t", "--direction", "i2t")
    train_tiny(folder, "t2i", "--direction", "t2i")
    train_tiny(folder, "encoders", "--num_layer_routing", "0")
    (folder / "sentences.txt").write_text("\n".join(SENTENCES) + "\n")
    return folder


def options_of(world: Path, *more: object) -> list[object]:
    """Options of `index` for the two routed models."""
    models = [model_of(world, name) for name in ("i2t", "t2i")]
    options = ["index", "--model_path", *models, "--images", world / "images"]
    return [*options, "--weights", world / "vit", "--workers", 0, "--batch_size", 3, *more]


Searching = Callable[..., str]  # runs scripts.search; returns what it prints, or its error


def searching(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Searching:
    """Return a function that runs scripts.search in this process."""

    def run(*argv: object, status: int = 0) -> str:
        capsys.readouterr()
        code = run_here(monkeypatch, search.main, list(argv))
        printed = capsys.readouterr()
        assert code == status, printed.err
        return printed.err.splitlines()[-1] if status else printed.out

    return run


class Elements(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]
