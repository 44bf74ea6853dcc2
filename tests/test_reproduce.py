"""scripts/reproduce.py: the registry, runs that are skipped or resumed, and the tables."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_here

import evaluate_models
import train
from common.cli import parse
from common.errors import InputError
from common.results import EvaluationResult
from scripts import compare, reproduce
from scripts.parts.experiments import REGISTRY, Run, read_registry
from scripts.parts.run_results import find_problem, read_result, recall_table, table_rows
from training.config import TrainConfig

TINY = '''
table.first = { title = "First", data = "tiny" }
run.one = { title = "One", data = "tiny", direction = "i2t", train = "--extra_stc 1" }
run.other = { title = "Other", data = "tiny", direction = "t2i", baseline = "one" }
run.both = { title = "Both", of = ["one", "other"] }

[data.tiny]
needs = "the tiny data"
images = 10
data_path = "data"
data_name = "tiny"
bert_path = "bert"
train = """--embed_size 8 --max_words 12 --num_head_IMRC 2 --hid_IMRC 6 --hid_router 5 \
--batch_size 6 --max_steps 2 --workers 0"""
split = "test"
'''
Runs = dict[str, Run]
Program = Callable[..., str]


def protocol(r1: float = 1) -> dict[str, Any]:
    """The JSON of a ProtocolResult."""
    side = {"r1": r1, "r5": 20, "r10": 30, "medr": 1, "meanr": 2}
    spread = {name: [value, value + 5.5] for name, value in side.items()}
    metrics = {"i2t": side, "t2i": side, "rsum": 2 * r1 + 100}
    intervals = {"i2t": spread, "t2i": spread, "rsum": [9, 21.25]}
    return {"metrics": metrics, "folds": [], "intervals": intervals}


@pytest.fixture
def small(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Runs on the tiny data, in a folder of their own."""
    path = tiny / "small.toml"
    path.write_text(TINY)
    (tiny / "results/reproduce").mkdir(parents=True)
    paper = {"source": "a book", "first": {"One": [10.0, 20.0, 30.0, 1.0, 2.0, 3.0]}}
    (tiny / "results/paper.json").write_text(json.dumps(paper))
    monkeypatch.setattr(reproduce, "REGISTRY", path)
    monkeypatch.chdir(tiny)
    return read_registry(path)[0]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Program:
    """Run reproduce, and its programs in this process; return what it prints, or its error."""
    mains = {"train.py": train.main, "evaluate_models.py": evaluate_models.main}
    mains["scripts/compare.py"] = lambda argv: compare.main()

    def call(command: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", command)
        mains[command[0]](command[1:])

    monkeypatch.setattr(reproduce, "run_program", call)

    def run(*argv: str, status: int = 0) -> str:
        capsys.readouterr()
        assert run_here(monkeypatch, reproduce.main, argv) == status
        output = capsys.readouterr()
        return output.err.splitlines()[-1] if status else output.out

    return run


def save(run: Run, seed: int = 0, **changes: Any) -> Path:
    """Write a result of a run, with some changes."""
    evaluation: dict[str, Any] = dict.fromkeys(field.name for field in fields(EvaluationResult))
    evaluation |= {"images": 10, "captions": 50, "whole": protocol()}
    content = {
        "entry": run.digest(),
        "commands": run.commands(seed),
        "trainings": [None],
        "evaluation": evaluation | changes.pop("evaluation", {}),
        **{"machine": "a machine", "torch": "2", "commit": None},
    }
    path = run.result(seed)
    path.write_text(json.dumps(content | changes))
    return path


def seeds() -> list[list[int]]:
    """The seeds of each row of the table."""
    _, tables = read_registry(Path("small.toml"))
    return [list(row.seeds) for row in table_rows(tables["first"])]


def test_another_folder_than_the_projects_is_refused(
    tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results are read from and written to the folder that the program runs in."""
    monkeypatch.chdir(tmp_path)
    for argv in (["list"], ["table"], ["run", "f30k_i2t"]):
        assert str(ROOT) in program(*argv, status=2)
    assert not list(tmp_path.iterdir())


def test_an_ensemble_is_trained_evaluated_and_skipped(
    small: Runs, tiny: Path, program: Program
) -> None:
    assert program("list").count("; not run\n") == 3
    program("run", "both", "--seeds", "0", "1")
    before = {path: path.stat().st_mtime_ns for path in tiny.rglob("*.json")}
    names = [f"{name}_seed{seed}.json" for name in ("both", "one", "other") for seed in (0, 1)]
    assert sorted(path.name for path in (tiny / "results/reproduce").iterdir()) == names
    program("run", "one", "both", "--seeds", "1", "0")
    assert before == {path: path.stat().st_mtime_ns for path in tiny.rglob("*.json")}
    assert program("list").count("seed 0 is done, seed 1 is done\n") == 3
    one, other, both = (read_result(run.result(1)) for run in small.values())
    programs = [command.split()[1] for command in both["commands"]]
    assert programs == ["train.py", "evaluate_models.py"] * 2 + ["evaluate_models.py"]
    assert both["trainings"] == [*one["trainings"], *other["trainings"]]
    read = [result["evaluation"]["fingerprints"] for result in (one, other, both)]
    assert read[0] + read[1] == read[2] and all(read)
    assert [(t["step"], t["complete"]) for t in both["trainings"]] == [(2, True)] * 2


def test_missing_results_and_scores_are_made_again(small: Runs, program: Program) -> None:
    program("run", "both", "--seeds", "0", "1")
    one, other, both = small.values()
    before = read_result(one.result(0))
    one.result(0).unlink()
    for name in ("checkpoint.pth.tar", "run.json"):  # its best model alone is left
        one.model(0).with_name(name).unlink()
    program("run", "one", "--no-train")
    after = read_result(one.result(0))
    assert after["evaluation"]["whole"] == before["evaluation"]["whole"]
    assert after["trainings"] == [None]
    kept = other.scores(0).read_bytes()
    both.result(0).unlink()
    other.scores(0).unlink()
    program("run", "both", "--no-train")
    assert other.scores(0).read_bytes() == kept and both.result(0).exists()


def test_a_run_is_compared_with_its_baseline_over_seeds(
    small: Runs, program: Program, caplog
) -> None:
    one, other, _ = small.values()
    table = read_registry(Path("small.toml"))[1]["first"]
    program("run", "other")
    assert not other.comparison().exists() and "one" in caplog.text
    program("run", "one", "other", "--seeds", "0", "1")
    content = json.loads(other.comparison().read_text())
    files = [[str(run.scores(seed)) for seed in (0, 1)] for run in (other, one)]
    assert [content["scores"]["a"], content["scores"]["b"]] == files
    mean, (low, high) = content["difference"]["rsum"], content["intervals"]["rsum"]
    cell = f"| {mean:+.1f} [{low:+.1f}, {high:+.1f}] | {content['p']['rsum']:.4f} |"
    assert cell in recall_table(table)
    before = other.comparison().stat().st_mtime_ns
    program("run", "other", "--seeds", "1")
    assert other.comparison().stat().st_mtime_ns == before
    for changes in ({"seeds": [0]}, {"entries": [one.digest()] * 2}):
        other.comparison().write_text(json.dumps(content | changes))
        assert "| not run | not run |" in recall_table(table)
        assert str(other.comparison()) in caplog.text
    program("run", "other", "--seeds", "1")
    assert cell in recall_table(table)


def test_a_model_trained_with_other_options_or_not_to_its_end_is_refused(
    small: Runs, program: Program
) -> None:
    one = small["one"]
    reproduce.run_program([*one.train_command(0), "--max_steps", "1"])
    refused = ("run", "--no-train", "one", "--seeds")
    assert "run.json: was trained with --max_steps 1" in program(*refused, "0", status=2)
    file = one.model(0).with_name("run.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"complete": False}))
    assert "did not finish" in program(*refused, "0", status=2)
    one.model(1).parent.mkdir(parents=True)
    shutil.copy(one.model(0), one.model(1))  # without run.json
    assert "model_best.pth.tar: was trained with --seed 0" in program(*refused, "1", status=2)
    assert not one.result(0).exists()
    program("run", "one")
    (training,) = read_result(one.result(0))["trainings"]
    assert (training["step"], training["complete"], training["resumed_at"]) == (2, True, [1])


def test_options_name_other_data(small: Runs, tiny: Path, program: Program) -> None:
    (tiny / "data").rename(tiny / "elsewhere")
    assert "data/tiny" in program("run", "one", status=2)
    program("run", "one", "--data_path", "elsewhere")
    assert "--data_path elsewhere" in read_result(small["one"].result(0))["commands"][0]
    assert "seed 0 is done" in program("list")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"entry": "another"}, "is stale"),
        ({"trainings": [{"complete": False, "step": 1}]}, "training did not finish"),
    ],
)
def test_results_with_a_problem_are_left_out_and_not_done(
    changes: dict[str, Any], problem: str, small: Runs, program: Program, caplog
) -> None:
    save(small["one"], 1)
    path = save(small["one"], **changes)
    assert seeds() == [[1], [], []]
    for text in (caplog.text, program("run", "one", status=2)):
        assert str(path) in text and problem in text
    listed = program("list")
    assert problem in listed and "seed 1 is done" in listed


def test_an_entry_depends_on_options_and_data_alone(small: Runs) -> None:
    path = Path("small.toml")
    text = path.read_text()
    for old, new, changed in (
        ("--extra_stc 1", "--extra_stc 2", {"one", "both"}),
        ("--max_steps 2", "--max_steps 3", {"one", "other", "both"}),
        ('split = "test"', 'split = "dev"', {"one", "other", "both"}),
        ('"One"', '"Uno"', set()),
        ('data_path = "data"', 'data_path = "elsewhere"', set()),
    ):
        path.write_text(text.replace(old, new))
        now, _ = read_registry(path)
        assert {name for name in small if now[name].digest() != small[name].digest()} == changed


def test_results_of_other_data_are_left_out(small: Runs, caplog) -> None:
    """Over seeds, in the next rows, and in an ensemble."""
    one, other, both = small.values()
    known = {"data": "a", "bert": "b", "training": "c"}
    for seed, change in enumerate([None, {}, {"data": "d"}, {"bert": "d"}, {"training": "d"}]):
        fingerprints = None if change is None else [known | change]
        save(one, seed, evaluation={"fingerprints": fingerprints})
    save(other, evaluation={"fingerprints": [known | {"data": "d"}]})
    save(both, evaluation={"fingerprints": [known, known | {"bert": None}]})
    assert seeds() == [[0, 1], [], [0]]  # unknown inputs fit
    for name in ("data", "bert", "training"):
        assert f"({name})" in caplog.text


def test_damaged_results_are_refused(small: Runs, program: Program) -> None:
    path = save(small["one"], evaluation={"whole": None})
    assert str(path) in program("table", status=2)
    path.write_text("{}")
    assert str(path) in program("list", status=2)


@pytest.mark.parametrize("argv", [["run", "four"], ["dance"], ["run", "one", "--seeds", "-1"]])
def test_bad_command_lines(argv: list[str], small: Runs, program: Program) -> None:
    assert argv[-1] in program(*argv, status=2)


@pytest.mark.parametrize(
    ("old", "new", "fact"),
    [
        ('of = ["one"', 'of = ["none"', "none"),
        ('"other"]', '"other"] }\nrun.all = { title = "All", of = ["both"]', "--direction"),
        ('baseline = "one"', 'baseline = "two"', "two"),
        ("run.one", "[run.one", "TOMLDecodeError"),
        ("--extra_stc 1", "--extra_img 1", "--extra_img"),
    ],
)
def test_a_slip_in_the_registry_is_refused_before_a_training(
    old: str, new: str, fact: str, small: Runs
) -> None:
    path = Path("small.toml")
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(InputError, match=f"small.toml: .*{fact}"):
        read_registry(path)


TRAINING = """
import signal, sys, time
def save(number, frame):
    time.sleep(1)
    open("saved", "w").write(str(number))
    sys.exit(128 + number)
signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
print("at work", flush=True)
time.sleep(60)
"""
DRIVER = """
from pathlib import Path
from common.cli import run
from scripts import reproduce
reproduce.ROOT = Path()
run(lambda: reproduce.run_program(["train.py"]))
"""


@pytest.mark.parametrize(
    ("number", "kill"), [(signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)]
)
def test_signals_reach_the_training_and_let_it_save(
    number: int, kill: Callable[[int, int], None], tmp_path: Path
) -> None:
    """As Ctrl-C, which the whole group gets, and as `kill`, which reproduce alone gets."""
    (tmp_path / "train.py").write_text(TRAINING)
    command, paths = [sys.executable, "-c", DRIVER], os.environ | {"PYTHONPATH": str(ROOT)}
    out = {"stdout": subprocess.PIPE, "start_new_session": True}
    driver = subprocess.Popen(command, cwd=tmp_path, env=paths, **out)
    assert driver.stdout.readline() == b"at work\n"
    kill(driver.pid, number)
    driver.communicate(timeout=30)
    assert driver.returncode == 128 + number
    assert (tmp_path / "saved").read_text() == str(int(number))


def test_a_cell_holds_the_interval_of_one_seed_or_the_deviation_of_several(small: Runs) -> None:
    one, other, _ = small.values()
    table = read_registry(Path("small.toml"))[1]["first"]
    save(other, evaluation={"whole": protocol(), "fold5": protocol(4)})
    text = recall_table(table)
    assert "| One |  | 10.0 · not run |" in text
    assert "| Other | 1 | 1.0 [1.0, 6.5] | 20.0 [20.0, 25.5] |" in text
    assert "| 102.0 [9.0, 21.2] |" in text
    assert "108.0 [9.0, 21.2]" in recall_table(replace(table, fold5=True))
    for seed, r1 in ((0, 2), (2, 4)):
        save(one, seed, evaluation={"whole": protocol(r1)})
    save(other, 1)
    text = recall_table(table)
    assert "| One | 2 | 10.0 · 3.0 ± 1.4 · -7.0 |" in text and "66.0 · 106.0 ± 2.8 · +40.0" in text
    assert "| Other | One | 0 | -2.0 | not run |" in text  # the seed that both have


def test_every_run_of_the_paper_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three models in three tables, trained by the commands of SPEC §9."""
    monkeypatch.chdir(ROOT)
    runs, tables = read_registry(REGISTRY)
    paper = json.loads((ROOT / "results/paper.json").read_text())
    names = {"flickr30k_1k": "f30k", "mscoco_1k_fold5": "coco", "mscoco_5k": "coco"}
    for table, name in names.items():
        rows = table_rows(tables[table])
        expected = {model: [*recalls, sum(recalls)] for model, recalls in paper[table].items()}
        assert {row.run.title: row.paper for row in rows} == {"encoders alone": [], **expected}
        ways = ("alone", "i2t", "t2i", "ensemble")
        assert [row.run.name for row in rows] == [f"{name}_{way}" for way in ways]
        assert tables[table].fold5 == (table == "mscoco_1k_fold5")
    for name, split in (("coco", "testall"), ("f30k", "test")):
        for way, extra, smooth in (("i2t", "--extra_stc", "4"), ("t2i", "--extra_img", "9")):
            run = runs[f"{name}_{way}"]
            command = ["--data_name", f"{name}_precomp", "--direction", way, extra, "1"]
            command += ["--lambda_softmax", smooth, "--bert_path", "bert/uncased", "--seed", "3"]
            command += ["--data_path", "data", "--logger_name", str(run.scores(3).parent)]
            expected = parse(TrainConfig, [*command, "--resume", "auto"], "")
            assert parse(TrainConfig, run.train_command(3)[1:], "") == expected
            assert f"--split {split} " in " ".join(run.evaluate_command(3))


def test_stored_results_fit_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    runs, _ = read_registry(REGISTRY)
    stored = [(run, seed, path) for run in runs.values() for seed, path in run.results().items()]
    assert {path for *_, path in stored} == set(Path("results/reproduce").glob("*.json"))
    for run, seed, path in stored:
        result = read_result(path)
        assert find_problem(run, result) is None, path
        assert result["commands"] == run.commands(seed), path
