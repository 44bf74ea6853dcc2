"""model.py against loops over pairs written from SPEC §1, §2, §3, §6 and §7."""

import numpy as np
import oracle
import pytest
import torch
from conftest import GOLDEN
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from common.config import ModelConfig
from common.errors import InputError
from model import DIME, ImageEncoder, path_loss, triplet_loss

SMALL = {"embed_size": 8, "img_dim": 9, "max_words": 10, "num_head_IMRC": 2}
SMALL |= {"hid_IMRC": 6, "hid_router": 5}
IMAGES, REGIONS, LENGTHS = 3, 7, [10, 2, 5, 4, 3]
BOTH = pytest.mark.parametrize("direction", ["i2t", "t2i"])
ABLATIONS = {
    "none": {},
    "uniform": {"routing": "uniform"},
    "hard": {"routing": "hard"},
    "hard, two cells": {"routing": "hard", "cells": "GLGC,CMRC", "num_layer_routing": 2},
    "hard, one layer": {"routing": "hard", "num_layer_routing": 1},
    "no RIC": {"cells": "GLGC,IMRC,CMRC"},
    "one cell": {"cells": "CMRC"},
    "one layer": {"num_layer_routing": 1},
}


def tiny_bert(dropout: float = 0.1) -> BertModel:
    sizes = {"vocab_size": 50, "hidden_size": 12, "num_hidden_layers": 2, "intermediate_size": 15}
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = BertConfig(**sizes, **drop, num_attention_heads=3, max_position_embeddings=16)
    return BertModel(config, add_pooling_layer=False)


def small_model(direction: str, **options) -> DIME:
    """A small model whose gates are open for some inputs and closed for others."""
    config = ModelConfig(direction=direction, **SMALL | options)
    model = DIME(config, tiny_bert())
    for name, parameter in model.named_parameters():
        if name.endswith("router.mlp.0.weight"):
            parameter.data *= 9
        if name.endswith("router.mlp.2.bias"):
            parameter.data = 0.3 * torch.randn_like(parameter)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(0.5 + torch.rand_like(buffer))
    return model.eval()


def small_batch(captions: int = len(LENGTHS), images: int = IMAGES) -> tuple[Tensor, ...]:
    mask = torch.arange(10) < torch.tensor(LENGTHS[:captions])[:, None]
    ids = torch.where(mask, torch.randint(1, 50, mask.shape), 0)
    return torch.rand(images, REGIONS, 9), ids, mask


def assert_equals_oracle(model: DIME) -> Tensor:
    """Compare scores and path vectors with the oracle, for ragged captions; return the latter."""
    regions, ids, mask = small_batch()
    with torch.no_grad():
        images, captions = model.encode_images(regions), model.encode_captions(ids, mask)
        # the oracle first: in training a forward pass moves the running statistics
        scores, paths = oracle.score(model, images, captions, LENGTHS)
        actual, actual_paths = model.score(images, captions)
    assert actual.shape == (IMAGES, len(LENGTHS))
    torch.testing.assert_close(actual, scores, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(actual_paths, paths, atol=1e-6, rtol=1e-5)
    return actual_paths


@BOTH
def test_batch_statistics_of_training_run_over_every_pair_and_position(direction: str) -> None:
    model = small_model(direction).train()
    model.text.bert.eval()
    paths = assert_equals_oracle(model)
    assert paths.shape[-1] == 36
    assert (paths == 0).any() and (paths > 0).any(), "the test needs open and closed gates"


@BOTH
@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("cells", ["RIC,GLGC,IMRC,CMRC", "GLGC,CMRC", "IMRC"])
@pytest.mark.parametrize("routing", ["soft", "uniform", "hard"])
def test_any_number_of_layers_any_cells_and_any_routing(
    direction: str, layers: int, cells: str, routing: str
) -> None:
    options = {"num_layer_routing": layers, "cells": cells, "routing": routing}
    model, count = small_model(direction, **options), cells.count(",") + 1
    paths = assert_equals_oracle(model)
    assert paths.shape[-1] == count**2 * (layers - 1) + count
    dense = paths[..., :-count].unflatten(-1, (-1, count)) if layers > 1 else paths[..., :0]
    if routing == "uniform":
        torch.testing.assert_close(dense, torch.full_like(dense, 1 / count))
        assert (paths[..., -count:] == 1).all()
        assert not any("router" in name for name, _ in model.named_parameters())
    if routing == "hard":
        assert ((dense == 0) | (dense == 1)).all()
        assert ((paths[..., -count:] > 0).sum(-1) <= 1).all()


@BOTH
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_gradients_of_ablations_equal_the_oracle(direction: str, ablation: str) -> None:
    """In chunks with activation checkpointing: through cells, routers and path vectors."""
    model, both = small_model(direction, **ABLATIONS[ablation]), []
    model.space.activation_checkpointing = True
    regions, ids, mask = small_batch(3, 2)
    for score in (oracle.score, DIME.score):
        model.zero_grad()
        images, captions = model.encode_images(regions), model.encode_captions(ids, mask)
        how = LENGTHS[:3] if score is oracle.score else 2
        scores, paths = score(model, images, captions, how)
        weights = torch.arange(scores.numel()).view_as(scores) - 4.0
        ((scores * weights).sum() + model.space.embed_paths(paths).square().sum(0)[0]).backward()
        both.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    expected, gradients = both
    for name, gradient in expected.items():
        value = gradients.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(value, gradient, atol=1e-4, rtol=1e-3, msg=name)
    assert sum(g.abs().max() > 1e-3 for g in expected.values()) > 10
    assert gradients.keys() <= expected.keys()


@BOTH
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_layers_a_score_is_the_product_of_the_pooled_vectors(
    direction: str, precision: str
) -> None:
    model, batch = small_model(direction, num_layer_routing=0), small_batch(captions=2)
    model.precision = precision
    regions, ids, mask = batch
    images, captions = model.encode_images(regions), model.encode_captions(ids, mask)
    scores, paths = model.score(images, captions)
    assert scores.shape == (IMAGES, 2) and scores.dtype == torch.float32
    for i in range(IMAGES):
        for t in range(2):
            expected = sum(images.pooled[i] * captions.pooled[t])
            torch.testing.assert_close(scores[i, t], expected, atol=1e-6, rtol=1e-5)
    assert paths.shape == ((IMAGES, 2, 0) if direction == "i2t" else (2, IMAGES, 0))


@BOTH
def test_without_layers_every_weight_is_an_encoders_and_the_path_loss_is_0(direction: str) -> None:
    model = small_model(direction, num_layer_routing=0).train()
    output = model(*small_batch(captions=2), 2)
    path = path_loss(output.paths, output.sentence_targets, 2)
    (triplet_loss(output.scores, 2, 0.2) + path).backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert path == 0 and all(name.startswith(("image.", "text.")) for name in trained)
    assert [
        name for name, grad in trained.items() if grad is None or not grad.isfinite().all()
    ] == []
    assert trained["image.fc.weight"].any() and trained["text.mapping.weight"].any()


@pytest.mark.parametrize("options", [{}, {"use_abs": True, "no_imgnorm": True}])
def test_image_encoder(options: dict[str, bool]) -> None:
    encoder = small_model("t2i", **options).image
    regions = torch.randn(IMAGES, REGIONS, 9)
    encoded = encoder(regions)
    for i in range(IMAGES):
        v = oracle.linear(encoder.fc, regions[i])
        pooled = oracle.normalised(encoder.norm, v.mean(0))
        pooled = pooled.abs() if options else oracle.unit(pooled)
        torch.testing.assert_close(encoded.pooled[i], pooled)
        torch.testing.assert_close(encoded.tokens[i], torch.stack([oracle.unit(r) for r in v]))
    assert encoded.mask.all()


def test_image_weights_start_uniform_within_the_bound() -> None:
    encoder = ImageEncoder(2048, 256, batch_norm=False)
    bound = (6 / (2048 + 256)) ** 0.5
    assert 0.99 * bound < encoder.fc.weight.abs().max() <= bound
    assert not encoder.fc.bias.any()


def test_text_encoder() -> None:
    encoder = small_model("i2t").text
    _, ids, mask = small_batch()
    hidden = encoder.read(ids, mask)
    encoded = encoder(hidden, mask)
    for t in range(len(LENGTHS)):
        words, sentence = oracle.text(encoder, hidden[t])
        torch.testing.assert_close(encoded.tokens[t], words)
        torch.testing.assert_close(encoded.pooled[t], sentence)
    assert torch.equal(encoded.mask, mask)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bert_gives_the_hidden_states_of_its_own_forward(precision: str, attention: str) -> None:
    """`read` does without `BertModel.forward`; also if no word is padded, and if every one is."""
    model = small_model("i2t")
    model.precision, model.text.bert.config._attn_implementation = precision, attention
    _, ids, mask = small_batch()
    for words in (mask, torch.ones_like(mask)):
        with torch.no_grad(), model.autocast(ids):
            expected = model.text.bert(input_ids=ids, attention_mask=words.long())[0].float()
            hidden = model.text.read(ids, words)
        torch.testing.assert_close(hidden, expected, atol=1e-6, rtol=0)
    assert model.text.read(ids, torch.zeros_like(mask)).isfinite().all()


def test_bert_is_frozen_with_its_dropout_on() -> None:
    model = small_model("i2t").train()
    regions, ids, mask = small_batch()
    assert not torch.equal(model.text.read(ids, mask), model.text.read(ids, mask))
    output = model(regions, ids, mask, 3)
    (output.scores.sum() + output.paths.sum()).backward()
    assert all(p.grad is None for p in model.text.bert.parameters())
    assert not output.sentence_targets.requires_grad


def test_a_training_batch_with_extra_negatives() -> None:
    regions, ids, mask = small_batch()
    output = small_model("i2t").train()(regions, ids, mask, IMAGES)
    assert output.scores.shape == (3, 5)
    assert output.paths.shape == (3, 128) and output.sentence_targets.shape == (3, 12)
    regions, ids, mask = small_batch(captions=2)
    output = small_model("t2i").train()(regions, ids, mask, 2)
    assert output.scores.shape == (3, 2)
    assert output.paths.shape == (2, 128) and output.sentence_targets.shape == (2, 12)
    model, (regions, ids, mask) = small_model("i2t"), small_batch()
    states = model.text.read(ids, mask)
    expected = torch.stack([oracle.unit(sum(states[t]) / 10) for t in range(IMAGES)])
    torch.testing.assert_close(model(regions, ids, mask, IMAGES).sentence_targets, expected)
    for unit in (output.paths, output.sentence_targets):
        torch.testing.assert_close(unit.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize(("direction", "changed"), [("i2t", False), ("t2i", True)])
def test_use_abs_and_no_imgnorm_act_in_t2i_only(direction: str, changed: bool) -> None:
    plain, other = small_model(direction), small_model(direction, use_abs=True, no_imgnorm=True)
    other.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        batch = small_batch()
        scores = [model(*batch, IMAGES).scores for model in (plain, other)]
    assert torch.equal(*scores) == (not changed)


def test_a_closed_cell_gets_a_zero_gradient_and_not_none() -> None:
    model = small_model("i2t").train()
    nn.init.constant_(model.space.merge.cells["imrc"].router.mlp[2].bias, -99)
    regions, ids, mask = small_batch()
    output = model(regions, ids, mask, IMAGES)
    (output.scores.sum() + output.paths.sum()).backward()
    for parameter in model.space.merge.cells["imrc"].parameters():
        assert parameter.grad is not None and not parameter.grad.any()
    trained = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert trained == []


@BOTH
def test_bfloat16_keeps_gates_and_scores_in_float32(direction: str, monkeypatch) -> None:
    model, (regions, ids, mask) = small_model(direction), small_batch()
    cells, gates, statistics = [], [], []
    pool = model.space.norm.pool

    def noted(values: Tensor, *rest: object) -> Tensor:
        statistics.append(values.dtype)
        return pool(values, *rest)

    with torch.no_grad():
        exact, _ = model.score(model.encode_images(regions), model.encode_captions(ids, mask))
        monkeypatch.setattr(model.space.norm, "pool", noted)
        for cell in model.space.merge.cells.values():
            cell.register_forward_hook(lambda _, __, out: cells.append(out.dtype))
            cell.router.register_forward_hook(lambda _, __, out: gates.append(out.dtype))
        model.precision = "bf16"
        images, captions = model.encode_images(regions), model.encode_captions(ids, mask)
        scores, paths = model.score(images, captions)
    assert len(cells) == len(gates) == 4 and set(cells) == {torch.bfloat16}
    assert set(gates) == set(statistics) == {torch.float32}
    floats = (scores, paths, images.tokens, images.pooled, captions.tokens, captions.pooled)
    assert {tensor.dtype for tensor in floats} == {torch.float32}
    torch.testing.assert_close(scores, exact, atol=0.05, rtol=0)
    assert not torch.equal(scores, exact)


@BOTH
def test_training_in_bfloat16_keeps_everything_else_in_float32(direction: str) -> None:
    model = small_model(direction).train()
    model.precision = "bf16"
    regions, ids, mask = small_batch(captions=IMAGES)
    output = model(regions, ids, mask, IMAGES)
    rank = triplet_loss(output.scores, IMAGES, 0.2)
    path = path_loss(output.paths, output.sentence_targets, IMAGES)
    floats = [rank, path, output.scores, output.paths, output.sentence_targets]
    (rank + path).backward()
    floats += [p.grad for p in model.parameters() if p.grad is not None]
    floats += [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    assert {tensor.dtype for tensor in floats} == {torch.float32}
    assert len(floats) > 100


@pytest.mark.parametrize("kind", ["max", "sum"])
@pytest.mark.parametrize("shape", ["square", "extra_stc", "extra_stc2", "extra_img", "extra_img2"])
def test_triplet_loss_equals_the_golden_one(shape: str, kind: str) -> None:
    arrays = np.load(GOLDEN / "loss.npz")
    scores = torch.tensor(arrays[f"{shape}.{kind}.scores"], requires_grad=True)
    pairs = min(scores.shape)
    loss = triplet_loss(scores, pairs, 0.2, hardest=kind == "max")
    loss.backward()
    np.testing.assert_allclose(loss.item(), arrays[f"{shape}.{kind}.loss"], rtol=1e-5)
    np.testing.assert_allclose(scores.grad, arrays[f"{shape}.{kind}.grad"], atol=1e-6)


@pytest.mark.parametrize("hardest", [True, False])
@pytest.mark.parametrize("shape", [(4, 4), (4, 7), (9, 4), (1, 1), (1, 3)])
def test_triplet_loss_equals_an_oracle(shape: tuple[int, int], hardest: bool) -> None:
    scores, pairs = torch.randn(*shape), min(shape)
    expected = oracle.triplet(scores, pairs, 0.3, hardest)
    assert triplet_loss(scores, pairs, 0.3, hardest).item() == pytest.approx(expected, rel=1e-5)


def test_path_loss_divides_by_the_option() -> None:
    paths, sentence_targets = torch.randn(3, 4), torch.randn(3, 5)
    both = list(zip(paths, sentence_targets, strict=True))
    gaps = [(p @ q - a @ b) ** 2 for p, a in both for q, b in both]
    torch.testing.assert_close(path_loss(paths, sentence_targets, 8), sum(gaps) / 8)


SIZES = [
    ("embed_size", 10),
    ("num_layer_routing", -1),
    ("max_words", 1),
    ("hid_router", 0),
    ("img_dim", -1),
]
CELLS = ["", "RIC,", "IMRC,RIC", "ric", "RIC,RIC", "RIC,XYZ", "RIC CMRC"]


@pytest.mark.parametrize(("name", "value"), [*SIZES, *(("cells", cells) for cells in CELLS)])
def test_impossible_sizes_and_cells_are_named(name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"--{name}"):
        ModelConfig(**{name: value})
