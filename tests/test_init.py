"""train.py --init: a new run that begins with the weights of another model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, Error, Run, events, same, state, tiny_train, write_split
from test_resume import another_bert

from checkpoint import build_model, read_checkpoint
from checkpoint.bert import load_bert
from common.cli import parse
from common.files import sha256_of
from data import Split, TrainingBatches
from scripts import convert_checkpoint
from training.config import TrainConfig
from training.resume import NEWEST
from training.step import TrainStep

CPU = torch.device("cpu")
OFFICIAL = GOLDEN / "i2t/checkpoint.pth.tar"


def other_data(folder: Path) -> list[str]:
    """Write another data set; returns the options of a training on it."""
    for name, images in (("train", 9), ("dev", 6)):
        write_split(folder / "data/other", name, images, seed=5)
    return ["--data_name", "other", "--logger_name", str(folder / "second"), "--log_step", "1"]


def without_dropout(folder: Path) -> None:
    shutil.copy(GOLDEN / "i2t/bert/bert_config.json", folder / "bert/bert_config.json")


def official(folder: Path) -> list[str]:
    """Options of a training that can begin with the weights of OFFICIAL."""
    paths = ["--data_path", str(OFFICIAL.parent / "data"), "--bert_path", str(folder / "bert")]
    sizes = ["--embed_size", "16", "--max_words", "14", "--num_head_IMRC", "4", "--hid_IMRC", "24"]
    more = ["--hid_router", "20", "--data_name", "f30k_precomp", "--workers", "0"]
    return [*paths, *sizes, *more, "--logger_name", str(folder / "runs")]


def test_first_step_has_the_losses_of_the_given_model(trained: Path, run_train: Run) -> None:
    """On other data; the optimiser, the steps and the best scores are those of a new run."""
    without_dropout(trained)
    source = trained / "runs/i2t" / NEWEST
    argv = tiny_train(trained, *other_data(trained), "--extra_stc", "1", "--init", str(source))
    assert run_train(*argv, "--max_steps", "1") == 0
    config, bert = parse(TrainConfig, argv, ""), load_bert(trained / "bert")
    batches = TrainingBatches(
        Split.open(trained / "data/other", "train", None), bert.vocabulary, config, 12, False
    )
    model = build_model(read_checkpoint(source), bert)
    expected = TrainStep(config, model, CPU).step(batches[0, 0])
    first, content = events(trained / "second/i2t")[0], state(trained / "second/i2t" / NEWEST)
    for name in ("Le", "Rank", "Path", "grad_norm"):
        assert first[name] == pytest.approx(expected[name].item(), rel=1e-5), name
    for name, value in model.state_dict().items():
        if not name.startswith("text.bert."):
            torch.testing.assert_close(content["weights"][name], value, atol=1e-6, rtol=1e-4)
    assert {int(moment["step"]) for moment in content["optimizer"]["state"].values()} == {1}
    assert (content["step"], content["epoch"], content["position"]) == (1, 0, 1)


def test_a_resumed_run_needs_the_file_no_more(trained: Path, run_train: Run) -> None:
    source = Path(shutil.copy(trained / "runs/i2t" / NEWEST, trained / "given.pth.tar"))
    argv, folder = tiny_train(trained, *other_data(trained)), trained / "second/i2t"
    given, digest = ["--init", str(source), "--resume", "auto"], sha256_of(source)
    assert run_train(*argv, *given, "--max_steps", "3") == 0
    uncut = state(folder / NEWEST)
    assert run_train(*argv, "--init", source, "--max_steps", "2", "--overwrite") == 0
    source.unlink()
    assert run_train(*argv, "--resume", "auto", "--max_steps", "3") == 0
    assert same(state(folder / NEWEST)["weights"], uncut["weights"])
    assert run_train(*argv, *given, "--max_steps", "4") == 0  # the same command again
    run = json.loads((folder / "run.json").read_text())
    assert run["resumed_at"] == [2, 3] and run["init_sha256"] == digest
    assert run["options"]["init"] == state(folder / NEWEST)["options"]["init"] == str(source)


def test_official_and_converted_weights(tiny: Path, run_train: Run, monkeypatch) -> None:
    out = tiny / "converted.safetensors"
    argv = ["--checkpoint", OFFICIAL, "--bert_path", tiny / "bert", "--out", out]
    monkeypatch.setattr("sys.argv", ["convert_checkpoint.py", *map(str, argv)])
    convert_checkpoint.main()
    weights = []
    for source in (OFFICIAL, out):
        argv = [*official(tiny), "--init", str(source), "--overwrite", "--max_steps", "1"]
        assert run_train(*argv, "--learning_rate", "0") == 0
        weights.append(state(tiny / "runs/i2t" / NEWEST)["weights"])
    assert same(*weights)  # with the running means of one batch
    given = read_checkpoint(OFFICIAL).weights
    assert all(torch.equal(weights[0][k], v) for k, v in given.items() if "norm." not in k)


@pytest.mark.parametrize("source", ["native", "official"])
def test_another_bert_is_refused(source: str, trained: Path, train_error: Error) -> None:
    another_bert(trained, {})
    if source == "native":
        argv = tiny_train(trained, *other_data(trained))
        argv += ["--init", str(trained / "runs/i2t" / NEWEST)]
    else:
        argv = [*official(trained), "--logger_name", str(trained / "second")]
        argv += ["--init", str(OFFICIAL)]
    line = train_error(*argv, "--max_steps", "1")
    assert f"{trained / 'bert'}" in line and "another BERT" in line
    assert not (trained / "second/i2t" / NEWEST).exists()


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--embed_size", "10"], "--embed_size 8; expected 10"),
        (["--lambda_softmax", "9"], "--lambda_softmax_CMRC 4.0; expected 9.0"),
        (["--direction", "t2i", "--extra_img", "1"], "--direction i2t; expected t2i"),
        (["--data_name", "wide"], "--img_dim 13; expected 17"),
        (["--init", "no.pth.tar"], "no.pth.tar"),
        (["--init", ""], "--init"),  # as `--init "$UNSET"` passes it
        (["--resume", "{source}"], "--resume"),
        (["--logger_name", "{folder}/runs", "--overwrite"], "--overwrite would delete it"),
    ],
)
def test_what_does_not_fit_is_refused(
    more: list[str], named: str, trained: Path, train_error: Error
) -> None:
    source, argv = trained / "runs/i2t" / NEWEST, tiny_train(trained, *other_data(trained))
    for name, images in (("train", 9), ("dev", 6)):
        write_split(trained / "data/wide", name, images, width=17)
    before = source.read_bytes()
    more = [word.format(source=source, folder=trained) for word in more]
    assert named in train_error(*argv, "--init", source, "--max_steps", "1", *more)
    assert not list(trained.glob("second/**/*.pth.tar")) and source.read_bytes() == before
