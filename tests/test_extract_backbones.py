"""extract_regions.py: features of images, made by backbones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import GOLDEN, run_here, save_noise
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.transform import resize_boxes
from torchvision.transforms.functional import to_tensor

from common.errors import InputError
from common.layout import read_backbone
from scripts import check_data
from scripts.parts import detector, lite2
from scripts.parts.regions import (
    ImageFiles,
    grid_boxes,
    open_backbone,
    reopen_backbone,
    require_backbone,
)

CPU = torch.device("cpu")


def test_features_of_a_grid(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extract: Callable[..., str]
) -> None:
    """A training reads them; tests/test_demo.py goes on to metrics."""
    (tmp_path / "images/1.png").write_bytes(b"no image")
    (tmp_path / "images/2.png").unlink()
    how = ["--model", "efficientnet_lite2", "--images", tmp_path / "images"]
    assert "1.png" in extract(*how, status=2)
    assert "ids 1, 2" in extract(*how, "--skip_broken", "--workers", 1)
    assert (drawn / "train_ids.txt").read_text().split() == ["0", "5", "6", "7"]
    assert np.load(drawn / "train_ims.npy").shape == (4, 36, 1280)
    assert run_here(monkeypatch, check_data.main, [drawn, "--full"]) == 0


def save_detector(path: Path, **sizes: int) -> FasterRCNN:
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None)
    model = FasterRCNN(backbone, 91, **sizes).eval()
    torch.save(model.state_dict(), path)
    return model


def test_boxes_of_a_detector(
    drawn: Path, extract: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detector, "SHORT_SIDE", 32)
    path = tmp_path / "detector.pth"
    weights = save_detector(path).state_dict()
    how = ["--model", "fasterrcnn", "--images", tmp_path / "images", "--weights", path]
    extract(*how)
    boxes = np.load(drawn / "test_boxes.npy")
    assert np.load(drawn / "test_ims.npy").shape == (2, 36, 1024) and boxes.shape == (2, 36, 4)
    assert boxes[0, :, 2].max() <= 64 and boxes[0, :, 3].max() <= 48  # the size of image 4
    weights["rpn.head.cls_logits.bias"][0] = torch.nan
    torch.save(weights, path)
    assert "detector.pth" in extract(*how, "--overwrite", status=2)
    shutil.copy(GOLDEN / "i2t/checkpoint.pth.tar", path)
    assert "detector.pth" in extract(*how, "--overwrite", status=2)


def test_detector_features_are_those_of_its_boxes(tmp_path: Path) -> None:
    """The image is larger than the detector's input; torchvision's transformation is the oracle."""
    model = save_detector(tmp_path / "detector.pth", min_size=64, max_size=128)
    for module in model.modules():
        if "running_var" in dict(module.named_buffers(recurse=False)):
            module.eps = 0.0
    image = save_noise(tmp_path / "image", 300, 150)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detector, "SHORT_SIDE", 64)
        patch.setattr(detector, "LONG_SIDE", 128)
        backbone = open_backbone("fasterrcnn", tmp_path / "detector.pth", CPU)
        source = ImageFiles({"a": tmp_path / "image"}, backbone)
    features, boxes = source.encode([source.read("a")])
    assert boxes[0, :, 2].max() > 150 and len(np.unique(boxes[0], axis=0)) > 9
    with torch.no_grad():
        batch, _ = model.transform([to_tensor(image)])
        maps, size = model.backbone(batch.tensors), batch.image_sizes
        resized = resize_boxes(torch.from_numpy(boxes[0]), [150, 300], list(size[0]))
        pooled = model.roi_heads.box_roi_pool(maps, [resized], size)
        expected = model.roi_heads.box_head(pooled).numpy()
    assert np.abs(features[0] - expected).max() < 1e-4 < 0.01 < np.ptp(expected, 0).max()


def test_grid_rows_are_its_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = lite2.Lite2(CPU)
    source = ImageFiles({"a": tmp_path / "image"}, backbone)
    image = save_noise(tmp_path / "image", 300, 150).resize((260, 260), Image.Resampling.BICUBIC)
    features, boxes = source.encode([source.read("a")])
    with torch.no_grad():
        pixels = (torch.from_numpy(np.array(image)).float() - 127) / 128
        maps = backbone.model.extract_features(pixels.permute(2, 0, 1)[None])
        cells = torch.nn.functional.adaptive_avg_pool2d(maps, 6)[0].numpy()  # [1280, 6, 6]
    for row, (left, top, right, bottom) in enumerate(boxes[0]):
        x, y = round(left / 50), round(top / 25)
        assert (right, bottom) == (left + 50, top + 25)
        assert np.abs(features[0, row] - cells[:, y, x]).max() < 1e-4
    assert np.abs(cells - cells.transpose(0, 2, 1)).max() > 0.1
    monkeypatch.setattr(lite2, "SHA256", "0" * 8)
    with pytest.raises(InputError, match="SHA-256"):
        lite2.Lite2(CPU)


def test_boxes() -> None:
    boxes = grid_boxes(60, 12)
    assert boxes[0].tolist() == [0, 0, 10, 2] and boxes[7].tolist() == [10, 2, 20, 4]
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 99, 30]])
    scores = torch.tensor([[0.1, 0.9], [0.2, 0.8], [0.5, 0.5]])
    best = detector.best_boxes(boxes[:, None].expand(3, 2, 4), scores, (40, 50))
    assert best[:4].tolist() == [[0, 0, 10, 10], [20, 20, 50, 30], [0, 0, 10, 9], [0, 0, 50, 40]]
    assert len(best) == 36


# Vision models of transformers

T = transformers
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 16, "image_size": 48, "patch_size": 6}
TEXT = SIZES | {"vocab_size": 30, "bos_token_id": 0, "eos_token_id": 1}
BOTH = {"text_config": TEXT, "vision_config": SIZES}
STAGES = {"depths": [1] * 4, "hidden_sizes": [2, 2, 4, 6]}
MERGING = {"embed_dim": 2, "depths": [1] * 4, "num_heads": [1] * 4, "window_size": 3}
MODELS: dict[str, transformers.PreTrainedConfig] = {
    "vit": T.ViTConfig(**SIZES),
    "oblong": T.ViTConfig(**SIZES | {"patch_size": (8, 6)}),  # 48 patches and a class make 49
    "dinov2": T.Dinov2Config(**SIZES),
    "registers": T.Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3),
    "clip": T.CLIPConfig(**BOTH),
    "siglip": T.SiglipConfig(**BOTH),
    "swin": T.SwinConfig(image_size=192, **MERGING),
    "pvt": T.PvtConfig(image_size=192, num_attention_heads=[1] * 4, **STAGES),
    "convnext": T.ConvNextConfig(**STAGES),
}


def save_model(folder: Path, name: str) -> transformers.PreTrainedModel:
    """Save a tiny random model with an image processor that would crop the centre."""
    model = T.AutoModel.from_config(MODELS[name]).eval()
    model.save_pretrained(folder)
    side = 192 if name in ("swin", "convnext", "pvt") else 48
    numbers = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "resample": 3}
    transformers.CLIPImageProcessor(
        size={"shortest_edge": side + 9}, crop_size={"height": side, "width": side}, **numbers
    ).save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_features_of_a_vision_model_are_its_cells(tmp_path: Path, name: str) -> None:
    """The oracle sees one image, normalised by hand, and takes the tokens of its patches."""
    model = save_model(tmp_path / "model", name)
    backbone = open_backbone("hf", tmp_path / "model", CPU)
    source = ImageFiles({"a": tmp_path / "image"}, backbone)
    side, _ = backbone.resize
    image = save_noise(tmp_path / "image", 300, 150)
    features, boxes = source.encode([source.read("a")] * 2)
    image = image.resize((side, side), Image.Resampling.BICUBIC)
    pixels = to_tensor(image).sub(torch.tensor([0.1, 0.2, 0.3])[:, None, None])
    pixels = pixels.div(torch.tensor([0.5, 0.6, 0.7])[:, None, None])
    with torch.no_grad():
        output = getattr(model, "vision_model", model)(pixel_values=pixels[None])[0]
    if name != "convnext":
        output = output[:, {"registers": 4, "siglip": 0, "swin": 0}.get(name, 1) :]
        rows, columns = {"swin": (6, 6), "pvt": (6, 6), "oblong": (6, 8)}.get(name, (8, 8))
        output = output.reshape(1, rows, columns, -1).permute(0, 3, 1, 2)
    cells = torch.nn.functional.adaptive_avg_pool2d(output, 6)[0]
    for row, (left, top, right, bottom) in enumerate(boxes[1]):
        x, y = round(left / 50), round(top / 25)
        assert (right, bottom) == (left + 50, top + 25)
        assert np.abs(features[1, row] - cells[:, y, x].numpy()).max() < 1e-4
    assert (cells - cells.mT).abs().max() > 0.01


def test_the_record_names_the_backbone(
    drawn: Path, tmp_path: Path, extract: Callable[..., str]
) -> None:
    """New images are encoded in the same way; another model or processor is refused."""
    folder = tmp_path / "model"
    save_model(folder, "vit")
    extract("--model", "hf", "--images", tmp_path / "images", "--weights", folder)
    record = drawn / "test_regions.json"
    backbone = reopen_backbone(read_backbone(drawn, "test"), folder, CPU, record)
    source = ImageFiles({"4": tmp_path / "images/4.png"}, backbone)
    again = source.encode([source.read("4")])[0]
    assert np.abs(again[0] - np.load(drawn / "test_ims.npy")[0]).max() < 1e-5
    path = folder / "preprocessor_config.json"
    path.write_text(path.read_text().replace("0.1", "0.11"))
    with pytest.raises(InputError, match="processor"):
        reopen_backbone(read_backbone(drawn, "test"), folder, CPU, record)
    torch.manual_seed(1)
    save_model(folder, "vit")
    with pytest.raises(InputError, match="weights"):
        reopen_backbone(read_backbone(drawn, "test"), folder, CPU, record)
    with pytest.raises(InputError, match=r"test_regions\.json"):
        require_backbone({"model": "tsv"}, record)


def test_models_that_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"

    def assert_refused(reason: str) -> None:
        with pytest.raises(InputError) as error:
            open_backbone("hf", folder, CPU)
        assert str(folder) in str(error.value) and reason in str(error.value)

    assert_refused("config.json")
    save_model(folder, "vit")
    (folder / "preprocessor_config.json").unlink()
    assert_refused("processor")
    transformers.ViTImageProcessor(size={"height": 48, "width": 40}).save_pretrained(folder)
    assert_refused("square")
    transformers.ViTImageProcessor(size={"height": 30, "width": 30}).save_pretrained(folder)
    assert_refused("48")
    save_model(folder, "vit")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "query" in name or "q_proj" in name)
    save_file({k: v for k, v in weights.items() if k != name}, folder / "model.safetensors")
    assert_refused("attention")
    save_file(weights | {name: weights[name] * torch.nan}, folder / "model.safetensors")
    assert_refused("NaN")
    save_file(weights | {name: weights[name][:2]}, folder / "model.safetensors")
    assert_refused("")
    (folder / "model.safetensors").unlink()
    torch.save({"a": Path("code")}, folder / "pytorch_model.bin")
    assert_refused("asks for code")
    torch.save(weights, folder / "pytorch_model.bin")
    assert open_backbone("hf", folder, CPU).width == 8
    yolos = transformers.YolosConfig(**SIZES | {"image_size": (48, 48)}, num_detection_tokens=3)
    transformers.YolosModel(yolos).save_pretrained(folder)
    assert_refused("tokens")  # the last ones are no patches
    bert = transformers.BertConfig(vocab_size=30, **{k: SIZES[k] for k in list(SIZES)[:4]})
    transformers.BertModel(bert).save_pretrained(folder)
    assert_refused("takes no images")
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for name, part in (("config", "AutoModel"), ("preprocessor_config", "AutoImageProcessor")):
        save_model(folder, "vit")
        own = {"model_type": "own", "auto_map": {part: "code.Own", "AutoConfig": "code.Own"}}
        (folder / f"{name}.json").write_text(json.dumps(own))
        assert_refused("")
    assert not (tmp_path / "ran").exists()
    (folder / "config.json").write_text("{")
    assert_refused("config.json")
