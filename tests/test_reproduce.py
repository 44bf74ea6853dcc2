"""scripts/reproduce.py: the registry, runs that are skipped or gone on with, and the tables."""

import csv
import io
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, run_here, tiny_train
from test_train import last_line

import evaluate_models
import train
from common.errors import InputError
from evaluate_models import evaluate
from scripts import reproduce
from scripts.parts import paper_table
from scripts.parts.experiments import REGISTRY, Registry, shown, works
from scripts.parts.objections import objections
from scripts.parts.paper_table import as_markdown, rows
from scripts.parts.tables import COLUMNS
from scripts.results_table import TAGS
from training.log import events
from training.resume import CheckpointManager
from training.runfolder import BEST

TINY = """
[tables]
first = "First"
five = "Five folds"

[data.tiny]
needs = "the tiny data"
images = 10
data_path = "data"
data_name = "tiny"
bert_path = "bert"
train = "{train} --max_steps 2 --workers 0"
evaluate = "--split test --protocols 1k5 5k"

[run.one]
title = "One"
paper = "DIME"
data = "tiny"
direction = "i2t"
train = "--extra_stc 1"
tables = {{ first = "5k", five = "1k5" }}

[run.other]
title = "Other"
data = "tiny"
direction = "t2i"
tables = {{ first = "5k" }}

[run.both]
title = "Both"
of = ["one", "other"]
tables = {{ first = "5k" }}
"""
OTHER_DATA = """
[data.more]
needs = "other data"
images = 10
data_path = "data"
data_name = "more"
bert_path = "bert"
evaluate = "--split test"

[run.other]
title = "Other"
data = "more"
"""
PAPER = [10.0, 20.0, 30.0, 1.0, 2.0, 3.0]


@pytest.fixture
def small(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry on the tiny data, in a folder of its own."""
    argv = tiny_train(tiny)
    sizes = ("--embed_size", "--max_words", "--num_head_IMRC", "--hid_IMRC", "--hid_router")
    options = [word for name in (*sizes, "--batch_size") for word in argv[argv.index(name) :][:2]]
    path = tiny / "small.toml"
    path.write_text(TINY.format(train=" ".join(options)))
    (tiny / "results").mkdir()
    paper = {"source": "a book", "first": {"DIME": PAPER}, "five": {"DIME": PAPER}}
    (tiny / "results/paper.json").write_text(json.dumps(paper))
    monkeypatch.setattr(reproduce, "REGISTRY", path)
    monkeypatch.chdir(tiny)
    return tiny


def test_an_ensemble_is_trained_evaluated_skipped_and_set_beside_the_paper(
    small: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """The story of a user, its programs in this process."""
    mains = {"train.py": train.main, "evaluate_models.py": evaluate_models.main}

    def call(command: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", command)
        mains[command[0]](command[1:])

    monkeypatch.setattr(reproduce, "_call", call)

    def program(*argv: str) -> str:
        assert run_here(monkeypatch, reproduce.main, argv) == 0
        return capfd.readouterr().out

    told = program("list")
    assert told.count("; not run\n") == 3 and "  needs: the tiny data\n" in told
    registry = Registry(reproduce.REGISTRY)
    for each in registry.runs.values():
        lines = [f"  {shown(command)}\n" for command in registry.commands(each, 0, {})]
        assert "".join(lines) in told
    assert "| One |  | 10.0 · not run |" in program("table")
    assert "five,one,One,i2t R@1,10.0,not run,,,,0,\n" in program("table", "--format", "csv")
    program("run", "both", "--seeds", "0", "1")
    names = [f"{name}_seed{seed}.json" for name in ("both", "one", "other") for seed in (0, 1)]
    results = small / "results/reproduce"
    assert sorted(path.name for path in results.iterdir()) == names
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*.json")}
    program("run", "one", "both", "--seeds", "1", "0")
    assert before == {path: path.stat().st_mtime_ns for path in small.rglob("*.json")}

    found = json.loads((results / "both_seed1.json").read_text())
    models = [small / f"runs/reproduce/{n}/seed1/{w}/model_best.pth.tar" for n, w in MEMBERS]
    again = evaluate(models, protocols=["1k5", "5k"], workers=0)
    assert found["metrics"] == again["metrics"]
    programs = [command.split()[1] for command in found["commands"]]
    assert programs == ["train.py", "evaluate_models.py"] * 2 + ["evaluate_models.py"]
    assert not any("--json" in command for command in found["commands"])
    one, other = (json.loads((results / f"{n}_seed1.json").read_text()) for n in ("one", "other"))
    assert found["matrices"] == one["matrices"] | other["matrices"]
    assert found["trainings"] == [*one["trainings"], *other["trainings"]]
    assert found["fingerprints"] == [*one["fingerprints"], *other["fingerprints"]]
    assert all(each["data"] and each["bert"] for each in found["fingerprints"])
    assert [(t["step"], t["complete"]) for t in found["trainings"]] == [(2, True)] * 2
    one = json.loads((results / "one_seed0.json").read_text())
    assert one["machine"] and "commit" in one and one["trainings"][0]["seconds"] > 0
    assert one["commands"][0] == one["trainings"][0]["command"]

    figures = list(csv.DictReader(io.StringIO(program("table", "--format", "csv"))))
    assert figures == [
        {key: "" if value is None else str(value) for key, value in line.items()}
        for line in json.loads(program("table", "--format", "json"))
    ]
    assert len(figures) == 4 * len(COLUMNS)
    values = [
        json.loads((results / f"one_seed{s}.json").read_text())["protocols"]["1k5"]["metrics"]
        for s in (0, 1)
    ]
    rsums = [metrics["rsum"] for metrics in values]
    (line,) = [x for x in figures if (x["table"], x["metric"]) == ("five", "rsum")]
    mean = statistics.mean(rsums)
    assert float(line["mean"]) == pytest.approx(mean, abs=1e-4)
    assert float(line["sd"]) == pytest.approx(statistics.stdev(rsums), abs=1e-4)
    assert line["paper"] == "66.0" and line["seeds"] == "2"
    assert float(line["difference"]) == pytest.approx(mean - 66, abs=1e-4)
    text = f"66.0 · {mean:.1f} ± {statistics.stdev(rsums):.1f} · {mean - 66:+.1f} |"
    assert text in program("table")
    latex = program("table", "--format", "latex")
    assert r"\begin{tabular}{lrrrrrrrr}" in latex and "% The paper's figures: a book\n" in latex
    assert r"\caption{First. A cell: the paper's figure, if there is one $\cdot$ ours" in latex

    (results / "one_seed0.json").unlink()
    (results / "one_seed1.json").unlink()
    assert "| One |  | 10.0 · not run |" in program("table")
    program("run", "one")  # its model is there, and is evaluated alone
    assert json.loads((results / "one_seed0.json").read_text())["metrics"] == one["metrics"]
    (results / "one_seed0.json").unlink()
    folder = small / "runs/reproduce/one/seed0/i2t"
    (folder / "checkpoint.pth.tar").unlink()
    (folder / "run.json").unlink()
    program("run", "one", "--no-train")  # which brought its best model alone from elsewhere
    assert program("list").count("done for seed") == 3  # none by other commands than now
    alone = json.loads((results / "one_seed0.json").read_text())
    assert alone["metrics"] == one["metrics"]
    assert alone["trainings"] == [None] and len(alone["commands"]) == 1
    assert not (folder / "checkpoint.pth.tar").exists()

    (results / "both_seed0.json").unlink()
    scores = small / "runs/reproduce/other/seed0/scores.npy"
    kept = scores.read_bytes()
    for wrong in (None, (small / "runs/reproduce/other/seed1/scores.npy").read_bytes()):
        scores.unlink() if wrong is None else scores.write_bytes(wrong)
        program("run", "both")  # its results alone were brought here, or are others'
        assert scores.read_bytes() == kept and (results / "both_seed0.json").exists()
        (results / "both_seed0.json").unlink()

    scores.unlink()
    (small / "runs/reproduce/other/seed0/t2i/model_best.pth.tar").unlink()
    assert run_here(monkeypatch, reproduce.main, ["run", "both", "--no-train"]) == 2
    said = capfd.readouterr().err.splitlines()[-1]
    gone, model = "other_seed0.json: its scores are gone, and ", "t2i/model_best.pth.tar, too; "
    assert gone in said and f"{model}delete results/reproduce/other_seed0.json to have the" in said
    (results / "other_seed0.json").unlink()
    assert run_here(monkeypatch, reproduce.main, ["run", "both", "--no-train"]) == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert "other/seed0/t2i/model_best.pth.tar: not found; expected the model" in said


MEMBERS = (("one", "i2t"), ("other", "t2i"))


def test_a_run_that_was_cut_off_is_gone_on_with(
    small: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    registry = Registry(reproduce.REGISTRY)
    assert run_here(monkeypatch, reproduce.main, ["run", "one", "--bert_path", "nowhere"]) == 2
    assert "train.py ended with status 2, see above" in capfd.readouterr().err
    assert not (small / "results/reproduce").exists()
    cut = registry.train(registry.run("one"), 0, {})
    cut[cut.index("--max_steps") + 1] = "1"
    reproduce._call(cut)
    capfd.readouterr()
    assert run_here(monkeypatch, reproduce.main, ["run", "one"]) == 0
    assert "step 1 of 2" in capfd.readouterr().err


def test_a_kill_behind_the_last_checkpoint_leaves_a_complete_run(
    small: Path, run_train: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which run.json does not say yet."""
    registry = Registry(reproduce.REGISTRY)
    path = small / "runs/reproduce/one/seed0/i2t/run.json"
    command = registry.train(registry.run("one"), 0, {})[1:]
    assert run_train(*command) == 0
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 0, "complete": False}))
    assert run_here(monkeypatch, reproduce.main, ["run", "one", "--no-train"]) == 2
    assert run_train(*command) == 0  # there is nothing to do
    assert run_here(monkeypatch, reproduce.main, ["run", "one", "--no-train"]) == 0
    training = json.loads((small / "results/reproduce/one_seed0.json").read_text())["trainings"][0]
    assert (training["step"], training["complete"]) == (2, True)


def test_a_training_that_was_cut_off_is_no_result(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As SIGTERM leaves it: a best model is there, and the run not at its end."""
    registry, write = Registry(reproduce.REGISTRY), CheckpointManager.write
    command = registry.train(registry.run("one"), 0, {})
    command[command.index("--max_steps") + 1] = "3"

    def end_soon(*args: object) -> None:
        write(*args)
        if args[1].name == BEST:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(CheckpointManager, "write", end_soon)
    argv = [*command[1:], "--val_step", "2"]
    assert run_here(monkeypatch, train.main, argv) == 128 + signal.SIGTERM
    capsys.readouterr()
    assert run_here(monkeypatch, reproduce.main, ["run", "one", "--no-train"]) == 2
    said = last_line(capsys)
    assert "one/seed0/i2t/run.json: the training was cut off at step 2; expected a comp" in said
    assert not (small / "results/reproduce/one_seed0.json").exists()


def test_another_model_than_the_registrys_is_not_evaluated(
    small: Path,
    run_train: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """By what its checkpoint tells, and the run.json beside it."""
    registry = Registry(reproduce.REGISTRY)
    one, other = registry.run("one"), registry.run("other")

    def refused(name: str, seed: int) -> str:
        assert run_here(monkeypatch, reproduce.main, [*argv, name, "--seeds", str(seed)]) == 2
        assert not registry.run(name).result(seed).exists()
        return last_line(capsys)

    longer = registry.train(one, 0, {})
    longer[longer.index("--max_steps") + 1] = "3"
    assert run_train(*longer[1:]) == 0
    argv, trained = ["run", "--no-train"], "model_best.pth.tar: was trained by train.py "
    beside = one.model(0).parent / "run.json"
    assert f"{beside.name}: is of train.py --max_steps 3; expected 2" in refused("one", 0)
    about = json.loads(beside.read_text())
    right = about | {"options": about["options"] | {"max_steps": 2, "seed": 1}}
    for model in (one.model(1), other.model(0)):
        model.parent.mkdir(parents=True)
        shutil.copy(one.model(0), model)
        for told in (None, right | {"options": right["options"] | {"direction": "t2i"}}, right):
            if told:  # that the model which lies beside it is another does not excuse it
                (model.parent / "run.json").write_text(json.dumps(told))
            name = model.parent.parent.parent.name
            wrong = "--seed 0; expected 1" if name == "one" else "--direction 'i2t'; expected 't2i'"
            assert f"{trained}{wrong}" in refused(name, int(model.parent.parent.name[-1]))
    beside.unlink()
    assert run_here(monkeypatch, reproduce.main, [*argv, "one"]) == 0  # as far as it tells


def test_data_that_cannot_be_evaluated_is_told_before_the_training(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    argv, registry = ["run", "one"], reproduce.REGISTRY
    registry.write_text(registry.read_text().replace("images = 10", "images = 9"))
    assert run_here(monkeypatch, reproduce.main, argv) == 2
    assert "data/tiny/test_ims.npy: 10 images; expected 9" in last_line(capsys)
    (small / "data/tiny/test_caps.txt").unlink()
    assert run_here(monkeypatch, reproduce.main, argv) == 2
    assert "data/tiny/test_caps.txt: not found" in last_line(capsys)
    assert not (small / "runs/reproduce").exists()


def test_results_that_no_table_could_show_are_not_written(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Data are known to be others before the training, another BERT behind the evaluation."""
    registry = Registry(reproduce.REGISTRY)
    path = registry.run("other").result(0)
    path.parent.mkdir()
    content = made("other") | {"protocols": {"5k": {"metrics": GOOD}}}
    for name, said, trained in (
        ("data", "data/tiny/test_ims.npy: is of other data than", False),
        ("bert", "not written: results/reproduce/one_seed0.json: is of other BERT than", True),
    ):
        path.write_text(json.dumps(content | {"fingerprints": [{name: "another"}]}))
        assert run_here(monkeypatch, reproduce.main, ["run", "one"]) == 2
        assert f"{said} results/reproduce/other_seed0.json; " in last_line(capsys)
        assert os.listdir(path.parent) == [path.name]
        assert (small / "runs/reproduce").exists() == trained


def test_no_model_is_counted_twice_nor_one_that_was_cut_off(
    small: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry(reproduce.REGISTRY)
    (small / "results/reproduce").mkdir()
    content = {"protocols": {"5k": {"metrics": GOOD}}}
    one = made("one") | {"protocols": {p: {"metrics": GOOD} for p in ("5k", "1k5")}}
    registry.run("one").result(0).write_text(json.dumps(one | {"matrices": {"d.npy": "z"}}))
    same = made("both") | content | {"matrices": {"d.npy": "z", "e.npy": "z"}}
    registry.run("both").result(0).write_text(json.dumps(same))
    for seed, about in (
        (2, {"matrices": {"a.npy": "z"}}),
        (3, {"matrices": {"a.npy": "x"}}),
        (10, {"matrices": {"b.npy": "x"}}),
        (11, {"matrices": {"c.npy": "y"}}),
        (12, {"trainings": [{"complete": False, "step": 1}]}),
    ):
        path = registry.run("other").result(seed)
        path.write_text(json.dumps(made("other", seed) | content | about))
    assert [list(row.ours) for row in rows(registry, "first")] == [[0], [3, 11], []]
    assert "other_seed2.json: is of the same scores as results/reproduce/one_seed0" in caplog.text
    assert "both_seed0.json: two of its models have the same scores; expected" in caplog.text
    where = "results/reproduce/other_seed"
    assert f"{where}10.json: is of the same scores as {where}3.json; expected" in caplog.text
    assert f"{where}12.json: the training was cut off at step 1; left out" in caplog.text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["run"], "required: NAME"),
        (["run", "four"], "four: no such run; expected one, other, both"),
        (["dance"], "dance: expected list, run or table"),
        (["table", "--format", "pdf"], "invalid choice: 'pdf'"),
        (["run", ""], ": no such run; expected one, other, both"),
        (["run", "one", "--seeds", "0", "-1"], "--seeds -1: expected 0 or more"),
    ],
)
def test_what_is_not_known_is_one_line(
    argv: list[str],
    said: str,
    small: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    assert run_here(monkeypatch, reproduce.main, argv) == 2
    assert said in last_line(capsys)


def made(name: str, seed: int = 0) -> dict[str, object]:
    """What results say of the registry's commands having made them."""
    registry = Registry(reproduce.REGISTRY)
    commands = registry.commands(registry.run(name), seed, {})
    trainings: list[object] = [{} for _ in registry.members(registry.run(name))]
    return {"commands": list(map(shown, commands)), "trainings": trainings, "images": 10}


GOOD = {"i2t": {"r1": 1, "r5": 2, "r10": 3}, "t2i": {"r1": 1, "r5": 2, "r10": 3}, "rsum": 12}


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"protocols": {}}',
        json.dumps({"protocols": {"5k": {"metrics": GOOD}}}),  # one of two
        *(
            json.dumps({"protocols": {name: {"metrics": GOOD | wrong} for name in ("5k", "1k5")}})
            for wrong in (
                *({"rsum": 13}, {"rsum": float("nan")}, {"rsum": "12"}, {"i2t": 3}),
                *({way: {"r1": 3, "r5": 2, "r10": 1}} for way in ("i2t", "t2i")),
                {"i2t": {"r1": 1, "r5": 2, "r10": 101}, "rsum": 110},
                {"i2t": {"r1": -1, "r5": 2, "r10": 3}, "rsum": 10},
            )
        ),
    ],
)
def test_results_that_are_damaged_are_not_done(
    content: str, small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = small / "results/reproduce/one_seed0.json"
    path.parent.mkdir()
    path.write_text(content and json.dumps(made("one") | json.loads(content)))
    assert "One; damaged for seed 0" in reproduce.listed(Registry(reproduce.REGISTRY))
    for argv, more in ((["run", "one"], "; delete it to have the run done again"), (["table"], "")):
        assert run_here(monkeypatch, reproduce.main, argv) == 2
        said = last_line(capsys)
        assert f"{path.relative_to(small)}: " in said and said.endswith(more)


NO_TRAININGS = "its trainings are no list of 1, each told or null"
NO_PROGRAMS = "its commands cannot be read: "


def test_results_of_other_commands_are_told(
    small: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture,
) -> None:
    path = small / "results/reproduce/one_seed0.json"
    path.parent.mkdir()
    for name in ("0 (copy)", "00", "٣"):
        (path.parent / f"one_seed{name}.json").write_text("{}")  # is no result
    content = {"protocols": {name: {"metrics": GOOD} for name in ("5k", "1k5")}, "images": 10}
    registry = Registry(reproduce.REGISTRY)
    training, evaluation = map(shown, registry.commands(registry.run("one"), 0, {}))
    elsewhere = shown(registry.train(registry.run("one"), 0, {"data_path": "d", "bert_path": "b"}))
    known = [{"seconds": 1}]
    for commands, trainings, told in (
        ([training, evaluation], known, ""),
        ([elsewhere.replace("--workers 0", "--workers 2"), evaluation], known, ""),
        ([training.replace("--max_steps 2", "--max_steps=2"), evaluation], known, ""),
        ([evaluation], [None], ""),  # of a model whose training nobody knows
        (
            [training, evaluation],  # which has no command of it
            [None],
            "train.py, evaluate_models.py; expected evaluate_models.py",
        ),
        ([evaluation], known, "evaluate_models.py; expected train.py, evaluate_models.py"),
        (
            [training.replace("--max_steps 2", "--max_steps 3"), evaluation],
            known,
            "train.py --max_steps 3; expected 2",
        ),
        (
            [training.replace("--extra_stc 1", "--extra_stc 2"), evaluation],
            known,
            "train.py --extra_stc 2; expected 1",
        ),
        (
            [training.replace("--seed 0", "--seed 1"), evaluation],
            known,
            "train.py --seed 1; expected 0",
        ),
        (
            [training, evaluation.replace("--split test", "--split dev")],
            known,
            "evaluate_models.py --split 'dev'; expected 'test'",
        ),
        ([training, evaluation.replace("python ", "python other_")], known, NO_PROGRAMS),
        ([training, "'"], known, NO_PROGRAMS),
        ([None, evaluation], known, NO_PROGRAMS),
        ([f"{training} --help", evaluation], known, NO_PROGRAMS),
        (3, known, NO_PROGRAMS),
        ([training, evaluation], {}, NO_TRAININGS),
        ([training, evaluation], [3], NO_TRAININGS),
        ([training, evaluation], [{}, {}], NO_TRAININGS),
    ):
        path.write_text(json.dumps(content | {"commands": commands, "trainings": trainings}))
        assert run_here(monkeypatch, reproduce.main, ["run", "one"]) == 2 * bool(told)
        said = capsys.readouterr().err
        found = rf"one_seed0.json: was made by other commands than now: .*{re.escape(told)}.*; "
        assert bool(re.search(f"{found}delete it to have the run", said)) == bool(told)
        caplog.clear()
        assert len(rows(registry, "first")[0].ours) == (not told)
        assert bool(re.search(f"{found}left out", caplog.text)) == bool(told)
        word = "stale for seed 0" if told else "done for seed 0"
        assert f"One; {word}\n" in reproduce.listed(registry)
    assert registry.run("one").results() == {0: path.relative_to(small)}


def test_a_training_that_is_not_known_excuses_no_other_one(small: Path) -> None:
    registry = Registry(reproduce.REGISTRY)
    both = registry.run("both")
    (one, one_alone, other, *rest) = map(shown, registry.commands(both, 0, {}))
    shorter = other.replace("--max_steps 2", "--max_steps 1")
    for commands, trainings, fits in (
        ([one, one_alone, other, *rest], [{}, {}], True),
        ([one_alone, other, *rest], [None, {}], True),
        ([one, one_alone, *rest], [{}, None], True),
        ([one_alone, shorter, *rest], [None, {}], False),
    ):
        content = {"commands": commands, "trainings": trainings, "images": 10}
        assert any(objections(registry, both, 0, content=content)) == (not fits)


def test_results_of_other_images_are_told(
    small: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry(reproduce.REGISTRY)
    (small / "results/reproduce").mkdir()
    content = {"protocols": {"5k": {"metrics": GOOD}}} | made("other")
    for images, fits in ((10, True), (5, False), (None, False)):
        registry.run("other").result(0).write_text(json.dumps(content | {"images": images}))
        assert len(rows(registry, "first")[1].ours) == fits
        assert (f"is of {images} images; expected 10; left out" in caplog.text) == (not fits)
        assert run_here(monkeypatch, reproduce.main, ["run", "other"]) == 2 * (not fits)


def test_seeds_of_other_data_or_berts_are_not_averaged(
    small: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry(reproduce.REGISTRY)
    (small / "results/reproduce").mkdir()
    known = {"data": "a", "bert": "b", "training": "c"}
    for inputs, count, name in (
        ((known, known), 2, ""),
        ((None, known), 2, ""),  # an older file does not tell
        ((known, known | {"data": "d"}), 1, "data"),
        ((None, known, known | {"bert": "d"}, known), 3, "BERT"),
        ((known, known | {"training": "d"}, known, None), 3, "training data"),
    ):
        caplog.clear()
        for seed, each in enumerate(inputs):
            content = {"protocols": {"5k": {"metrics": GOOD}}} | made("other", seed)
            content |= {"fingerprints": each and [each]}
            registry.run("other").result(seed).write_text(json.dumps(content))
        assert len(rows(registry, "first")[1].ours) == count
        first = next(seed for seed, each in enumerate(inputs) if each)
        said = f"json: is of other {name} than results/reproduce/other_seed{first}"
        assert (said in caplog.text) == (count < len(inputs))
        stale = f"done for seed {', '.join(map(str, registry.run('other').results()))}\n"
        assert (f"Other; {stale}" in reproduce.listed(registry)) == (count == len(inputs))


def test_no_row_is_of_other_data_than_its_table(
    small: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Ensembles, rows that stand beside others, and models of an ensemble among themselves."""
    registry = Registry(reproduce.REGISTRY)
    (small / "results/reproduce").mkdir()
    known, else_ = ({"data": data, "bert": "b", "training": None} for data in "de")
    content = {"protocols": {p: {"metrics": GOOD} for p in ("5k", "1k5")}}

    def seeds(**inputs: list[object]) -> list[int]:
        for name, each in inputs.items():
            about = made(name) | content | {"fingerprints": each}
            registry.run(name).result(0).write_text(json.dumps(about))
        caplog.clear()
        return [len(row.ours) for row in rows(registry, "first")]

    assert seeds(one=[known], other=[known], both=[known, known]) == [1, 1, 1]
    assert seeds(one=[known], other=[else_], both=[known, else_]) == [1, 0, 0]
    assert "both_seed0.json: its models are of different data; left out" in caplog.text
    assert seeds(one=[known], other=[known], both=[else_, else_]) == [1, 1, 0]
    assert "both_seed0.json: is of other data than results" in caplog.text
    assert seeds(one=[known], other=[None], both=[known, None]) == [1, 1, 1]
    assert seeds(one=None, other=[else_], both=[None, else_]) == [1, 1, 1]
    registry.run("one").result(0).write_text("none")
    assert not any(objections(registry, registry.run("other"), 0))  # one's file is told by itself


def test_an_ensemble_of_older_scores_is_told(
    small: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture,
) -> None:
    (small / "results/reproduce").mkdir()
    content = {"protocols": {name: {"metrics": GOOD} for name in ("5k", "1k5")}}
    registry = Registry(reproduce.REGISTRY)
    of_one, of_other = ({f"{name}.npy": name} for name in ("one", "other"))
    for both, told in ((of_one | of_other, False), (of_one | {"other.npy": "old"}, True)):
        for name, digests in (("one", of_one), ("other", of_other), ("both", both)):
            path = registry.run(name).result(0)
            path.write_text(json.dumps(content | made(name) | {"matrices": digests}))
        caplog.clear()
        assert run_here(monkeypatch, reproduce.main, ["run", "both"]) == 2 * told
        found = "both_seed0.json: was made of other scores than its models' now"
        assert (f"{found}; delete it" in capsys.readouterr().err) == told
        assert len(rows(registry, "first")[2].ours) == (not told)
        assert (f"{found}; left out" in caplog.text) == told
        word = "stale for seed 0" if told else "done for seed 0"
        assert f"Both; {word}\n" in reproduce.listed(registry)


def test_a_run_is_evaluated_on_the_registrys_data(small: Path) -> None:
    """Wherever its model was trained."""
    registry = Registry(reproduce.REGISTRY)
    for paths in ({}, {"data_path": "elsewhere"}):
        (_, evaluation) = registry.commands(registry.run("one"), 0, paths)
        options = dict(zip(evaluation[1::2], evaluation[2::2], strict=False))
        assert options["--data_path"] == paths.get("data_path", "data")
        assert options["--data_name"] == "tiny" and options["--bert_path"] == "bert"


LONG_WORK = """
import signal, sys, time
from pathlib import Path
def save(number, frame):
    time.sleep(1)  # longer than a program waits that was interrupted itself
    Path("saved").write_text(str(number))
    sys.exit(128 + number)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, save)
print("at work", flush=True)
time.sleep(60)
"""
DRIVER = """
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
from pathlib import Path
from common.cli import run
from scripts import reproduce
reproduce.ROOT = Path(sys.argv[1])
run(lambda: reproduce._call(["train.py"]))
"""


@pytest.mark.parametrize(
    ("number", "everybody"),
    [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGHUP, False)],
)
def test_signals_reach_the_training_and_let_it_save(
    number: int, everybody: bool, tmp_path: Path
) -> None:
    """As Ctrl-C does, sent to the whole group, and as `kill` does, to the driver alone."""
    (tmp_path / "train.py").write_text(LONG_WORK)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", DRIVER, tmp_path]
    driver = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=-1, stderr=-1, start_new_session=True
    )
    assert driver.stdout.readline() == b"at work\n"
    (os.killpg if everybody else os.kill)(driver.pid, number)
    driver.communicate(timeout=30)
    assert driver.returncode == 128 + number
    assert (tmp_path / "saved").read_text() == str(int(number))


def test_latex_keeps_what_is_written() -> None:
    assert paper_table._tex("-0.6, [-1, 2] 3-4") == "$-$0.6, [$-$1, 2] 3-4"
    assert paper_table._tex("a `--routing hard` & 5 % of x_1 #2") == (
        r"a -{}-routing hard \& 5 \% of x\_1 \#2"
    )
    assert paper_table._tex("${}^~\\") == (
        r"\$\{\}\textasciicircum{}\textasciitilde{}\textbackslash{}"
    )


def test_help_teaches(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run_here(monkeypatch, reproduce.main, ["--help"]) == 0
    assert "python -m scripts.reproduce run f30k_ensemble" in capsys.readouterr().out
    assert run_here(monkeypatch, reproduce.main, ["run", "--help"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("usage: reproduce.py run [-h] [--seeds") and "NAME [NAME ...]" in told


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('data = "tiny"', 'data = "none"', "run.one: names data 'none'; expected one of tiny"),
        ('of = ["one"', 'of = ["none"', "run.both: names runs that are not there: none"),
        ('first = "First"', 'third = "First"', "run.one: names tables that are not there: first"),
        (
            "[run.other]",
            '[run.third]\ntitle = "Third"\ndata = "tiny"\ndirection = "t2i"\ntables = {}\n'
            '[run.other]\nbeside = "third"',
            "run.other: is beside third, which has no row in its tables",
        ),
        ("title", "tittle", "no registry of runs: TypeError"),
        ("[run.one]", "[run.one", "no registry of runs: TOMLDecodeError"),
        ("[run.one]", "[run]\nnone = 3\n[run.one]", "no registry of runs: TypeError"),
        (
            'tables = { first = "5k" }',
            'tables = ["first"]',
            'no registry of runs: TypeError("tables',
        ),
        (
            'of = ["one", "other"]',
            "of = 3",
            "no registry of runs: TypeError('of is 3; expected lis",
        ),
        ('five = "1k5"', 'five = "1k"', "run.one: table five takes protocol 1k; its evaluation"),
        (" --protocols 1k5 5k", "", "run.one: table five takes protocol 1k5; its evaluation gives"),
        ("--protocols 1k5", "--protocols 1k", "run.one: argument --protocols: invalid choice"),
        ("--split test", "--split 'test", "run.one: No closing quotation"),
        ('direction = "i2t"', 'direction = "it2"', "run.one: argument --direction: invalid choice"),
        ('direction = "t2i"\n', "", "run.other: argument --direction: invalid choice"),
        ('direction = "t2i"', "direction = 2", "no registry of runs: TypeError('direction"),
        (
            'evaluate = "--split test --protocols 1k5 5k"',
            "evaluate = 5",
            "no registry of runs: TypeEr",
        ),
        (
            '[run.other]\ntitle = "Other"\ndata = "tiny"',
            OTHER_DATA,
            "run.both: of models on more, ",
        ),
        ("--extra_stc 1", "--extra_img 1", "run.one: --extra_img goes with --direction t2i alone"),
        ("--max_steps 2", "--max_step 2", "run.one: unrecognized arguments: --max_step 2"),
        ('of = ["one", "other"]', 'of = ["both", "one"]', "run.both: of both, an ensemble"),
        ("--split test", "--split test --workers 0", "run.both: --workers goes with --model_path"),
    ],
)
def test_a_registry_with_a_slip_is_told(old: str, new: str, said: str, small: Path) -> None:
    """Before a training, not after it, when nothing can be evaluated."""
    path = small / "small.toml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(InputError, match=re.escape(f"small.toml: {said}")):
        Registry(path)


COCO_TABLES = {"mscoco_1k_fold5": "1k5", "mscoco_5k": "5k"}


def test_every_run_of_the_paper_is_there(tmp_path: Path) -> None:
    """Three models in three tables, trained by the commands of §9, with the paper's figures."""
    registry = Registry(REGISTRY)
    shutil.copy(ROOT / "results/paper.json", tmp_path)
    paper = json.loads((tmp_path / "paper.json").read_text())
    for table in ("flickr30k_1k", "mscoco_1k_fold5", "mscoco_5k"):
        every = rows(registry, table, tmp_path)
        found = {registry.runs[row.run].paper: row.paper[:6] for row in every}
        assert found == paper[table] and len(found) == 3
        assert [row.title for row in every] == ["DIME (i-t)", "DIME (t-i)", "DIME* (ensemble)"]
    text = as_markdown(registry, tmp_path)
    assert "±" not in text.split("A cell:")[0] and text.count("not run") == 7 * 24
    for data, short, options, tables in (
        ("coco", "coco", ["--split", "testall", "--protocols", "1k5", "5k"], COCO_TABLES),
        ("f30k", "f30k", ["--split", "test"], {"flickr30k_1k": "5k"}),
    ):
        for way, extra, smooth in (("i2t", "--extra_stc", 4), ("t2i", "--extra_img", 9)):
            run = registry.run(f"{short}_{way}")
            command = ["train.py", "--data_name", f"{data}_precomp", "--direction", way]
            command += [extra, "1", "--lambda_softmax", str(smooth), "--seed", "3"]
            assert works(registry.train(run, 3, {})) == works(command)
            model = ["evaluate_models.py", "--model_path", str(run.model(3))]
            model += ["--data_name", f"{data}_precomp", "--save_scores", str(run.scores(3))]
            evaluation = registry.evaluate(run, 3, {})
            assert works(evaluation) == works([*model, *options]) and run.tables == tables
            assert evaluation[-2:] == ["--bootstrap", "1000"]
        both = registry.run(f"{short}_ensemble")
        assert both.of == [f"{short}_i2t", f"{short}_t2i"] and both.tables == tables


def test_results_were_made_by_the_registrys_commands() -> None:
    """What is under results/ is what its table says that it is."""
    registry = Registry(REGISTRY)
    for each in registry.runs.values():
        for seed, path in each.results(ROOT / "results").items():
            assert not any(objections(registry, each, seed, ROOT / "results"))
            found = json.loads(path.read_text())
            expected = [shown(command) for command in registry.commands(each, seed, {})]
            assert found["commands"] == expected, path.name


@pytest.mark.parametrize("way", ["i2t", "t2i"])
def test_logs_and_models_of_flickr8k_are_of_the_tables_trainings(way: str) -> None:
    log, model = ROOT / "results/flickr8k" / way, ROOT / f"results/models/f8k_{way}.json"
    result = json.loads((ROOT / f"results/reproduce/f8k_{way}_seed0.json").read_text())
    run = json.loads((log / "run.json").read_text())
    (training,) = result["trainings"]
    assert training and training.items() <= run.items()
    validations = [event for event in events(log) if "rsum" in event]
    assert events(log)[-1]["step"] == run["options"]["max_steps"] == validations[-1]["step"]
    best = max(validations, key=lambda event: event["r1r5"])  # the first of equal ones
    kept = json.loads(model.read_text())
    assert (kept["step"], kept["best_rsum"]) == (best["step"], pytest.approx(best["r1r5"]))
    assert kept["options"]["direction"] == way
    for event in validations:
        assert event["rsum"] == pytest.approx(sum(event[tag] for tag in TAGS[:-1]))


@pytest.mark.parametrize("figures", [{}, [], {"DIME": PAPER[:5]}, {"DIME": [*PAPER[:5], "6"]}])
def test_figures_of_the_paper_that_are_damaged(
    figures: object, small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = small / "results/paper.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"first": figures}))
    assert run_here(monkeypatch, reproduce.main, ["table"]) == 2
    assert "paper.json: DIME in first is" in last_line(capsys)


def test_one_seed_shows_its_interval(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    registry, path = Registry(reproduce.REGISTRY), small / "results/reproduce/other_seed0.json"
    path.parent.mkdir()
    other = made("other")
    sides = {way: {f"r{k}": [k, k + 5.5] for k in (1, 5, 10)} for way in ("i2t", "t2i")}

    def shown(*argv: str, **more: object) -> str:
        path.write_text(json.dumps(other | {"protocols": {"5k": {"metrics": GOOD} | more}}))
        assert run_here(monkeypatch, reproduce.main, ["table", *argv]) == 0
        return capsys.readouterr().out

    known = sides | {"rsum": [9, 21.25]}
    cells = "1.0 [1.0, 6.5] | 2.0 [5.0, 10.5] | 3.0 [10.0, 15.5]"
    assert f"| Other | 1 | {cells} | {cells} | 12.0 [9.0, 21.2] |" in shown(intervals=known)
    assert "Other,rsum,,12,,9,21.25,1,\n" in shown("--format", "csv", intervals=known)
    more = {
        "5k": {"metrics": GOOD, "intervals": None},
        "1k5": {"metrics": GOOD, "intervals": known},
    }
    one = registry.run("one").result(0)
    one.write_text(json.dumps(made("one") | {"protocols": more}))
    text = shown(intervals=known)
    assert text.count("| One | 1 | 10.0 · 1.0 · -9.0 |") == 1  # First
    assert text.count("| One | 1 | 10.0 · 1.0 [1.0, 6.5] · -9.0 |") == 1  # Five folds
    assert r"1.0 [1.0, 6.5] $\cdot$ $-$9.0 &" in shown("--format", "latex", intervals=known)
    one.unlink()
    plain = "| Other | 1 | 1.0 | 2.0 | 3.0 | 1.0 | 2.0 | 3.0 | 12.0 |"
    assert plain in shown() and plain in shown(intervals=None)
    content = json.loads(path.read_text()) | made("other", 1)
    (path.parent / "other_seed1.json").write_text(json.dumps(content))
    assert "| Other | 2 | 1.0 ± 0.0 |" in shown(intervals=known)
    (path.parent / "other_seed1.json").unlink()
    ends = ([1], ["1", "2"], [2, 1], [-1, 2], [1, 601], [1, math.inf], [math.nan, 2])
    for wrong in (
        *(sides, 3),
        *(sides | {"rsum": pair} for pair in ends),
        known | {"i2t": sides["i2t"] | {"r1": [99, 101]}},
    ):
        part = {"metrics": GOOD, "intervals": wrong}
        path.write_text(json.dumps(other | {"protocols": {"5k": part}}))
        assert run_here(monkeypatch, reproduce.main, ["table"]) == 2
        assert "other_seed0.json: " in last_line(capsys)


def test_runs_are_compared_seed_by_seed(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = small / "small.toml"
    path.write_text(
        path.read_text().replace('direction = "t2i"', 'direction = "t2i"\nbeside = "one"')
    )
    registry = Registry(path)
    (small / "results/reproduce").mkdir()
    for name, seed, r1 in (("one", 0, 1), ("one", 2, 1), ("other", 0, 4.5), ("other", 1, 9)):
        figures = GOOD | {"i2t": {"r1": r1, "r5": 20, "r10": 30}, "rsum": 56 + r1}
        content = {"protocols": {p: {"metrics": figures} for p in ("5k", "1k5")}}
        registry.run(name).result(seed).write_text(json.dumps(made(name, seed) | content))
    assert "| Other | One | 0 | +3.5 |" in as_markdown(registry)  # the seed that both have
    monkeypatch.setattr(reproduce, "REGISTRY", path)
    assert run_here(monkeypatch, reproduce.main, ["table", "--format", "latex"]) == 0
    assert "\\hline\nOther & One & 0 & +3.5 \\\\\n" in capsys.readouterr().out
    registry.run("one").result(0).unlink()
    assert "beside" not in as_markdown(registry)


def test_a_deleted_file_turns_its_cell_into_not_run(small: Path) -> None:
    registry = Registry(reproduce.REGISTRY)
    path = registry.run("other").result(0)
    path.parent.mkdir()
    side = {"r1": 1, "r5": 2, "r10": 3}
    part = {"metrics": {"i2t": side, "t2i": side, "rsum": 12}}
    path.write_text(json.dumps(made("other") | {"protocols": {"5k": part}}))
    assert "| Other | 1 | 1.0 | 2.0 |" in as_markdown(registry)
    path.write_text(json.dumps(made("other") | {"protocols": {}}))
    with pytest.raises(InputError, match="holds no metrics of protocol 5k"):
        as_markdown(registry)
    path.unlink()
    assert "| Other |  | not run | not run |" in as_markdown(registry)
