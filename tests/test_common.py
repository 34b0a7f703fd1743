"""Command lines, --where, JSON, files that appear whole or not at all, and checkpoints."""

import json
import os
from dataclasses import dataclass

import pytest
import torch

import common


@pytest.fixture
def refused(capsys):
    """refused(call, "word"): the call ends with code 2 and one line that holds the words"""

    def check(call, words):
        with pytest.raises(SystemExit) as stop:
            call()
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
        assert words in said

    return check


# ---------------------------------------------------------------- options
@dataclass(kw_only=True)
class Options:
    out: str = common.option(help="where to write")
    preset: str = common.option("small", "named size")
    steps: int = common.option(10, "how many steps")
    held_out: int = common.option(50, "how many to keep back", least=0)
    rate: float = common.option(0.5, "learning rate, at its peak")
    resume: bool = common.option(False, "continue")


PRESETS = {"small": {"steps": 3}, "large": {"steps": 1000, "rate": 0.1}}


def parse(line):
    return common.parse_options(Options, line.split(), PRESETS)


@pytest.mark.parametrize(
    "line, words",
    [
        ("--out x --speed 3", "--speed"),
        ("--out x --steps 1.5", "--steps: '1.5'"),
        ("--out x --rate fast", "--rate: 'fast'"),
        ("--out x --resume maybe", "--resume: 'maybe'"),
        ("--out x --steps", "--steps: expected"),
        ("--out --steps 3", "--out: expected"),
        ("--steps 3", "--out is required"),
        ("--out x --preset huge", "--preset 'huge'"),
        ("x", "'x'"),
        ("--out x --steps -3", "--steps: '-3'"),
        ("--out x --steps 0", "--steps: '0': expected a whole number, 1 or more"),
        ("--out x --held_out -1", "--held_out: '-1': expected a whole number, 0 or more"),
        ("--out x --rate nan", "--rate: 'nan'"),
    ],
)
def test_wrong_options_are_refused_by_name(refused, line, words):
    refused(lambda: parse(line), words)


def test_named_options_beat_the_preset_which_beats_the_defaults():
    options, given = parse("--preset large --rate=2e-1 --out a=b --resume yes")
    assert options == Options(out="a=b", preset="large", steps=1000, rate=0.2, resume=True)
    assert given == {"preset", "rate", "out", "resume"}
    assert parse("--out x")[0].steps == 3 and parse("--out x --steps 1_000")[0].steps == 1000
    assert parse("--out x --held_out 0")[0].held_out == 0
    values = [parse(f"--out x --resume {word}")[0].resume for word in ("true", "1", "False", "no")]
    assert values == [True, True, False, False]


def test_help_lists_every_option_with_its_words(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for words in (
        "--out required where to write",
        "--rate 0.5 learning rate, at its peak",
        "--resume False continue",
        "preset large: --steps 1000 --rate 0.1",
    ):
        assert words in said


# ---------------------------------------------------------------- --where
def matching(where):
    return common.matching(ROWS, where, "x")


ROWS = [
    {"id": "a", "success": True, "fps": 5, "note": None, "task": "push"},
    {"id": "b", "success": False, "fps": 5.0, "note": "null", "task": "pull, then push"},
    {"id": "c", "success": "true", "fps": 7, "level": 1},
]


@pytest.mark.parametrize(
    "where, ids",
    [
        ("success=true", "ac"),
        ("success=True", "a"),
        ("success=false", "b"),
        ("fps=5", "ab"),
        ("fps=5.0", "ab"),
        ("fps=7e0", "c"),
        ("note=null", "ab"),
        ("task=push", "a"),
        ("level=1", "c"),
        ('task="push"', "a"),
        ("task=pull, then push", "b"),
        ('task="pull, then push",success=false', "b"),
        ("fps=5,success=false", "b"),
        ("", "abc"),
    ],
)
def test_where_compares_values_as_json(where, ids):
    assert "".join(row["id"] for row in matching(where)) == ids


@pytest.mark.parametrize(
    "where, words",
    [
        ("success=1", "no episode with success=1"),
        ("level=true", "no episode with level=true"),
        ("sucess=true", "none has a field 'sucess'"),
        ("fps", "expected name=value"),
        ("=5", "expected name=value"),
    ],
)
def test_where_refuses_conditions_that_no_episode_meets(refused, where, words):
    refused(lambda: matching(where), words)


# ---------------------------------------------------------------- JSON and files
def test_numbers_that_json_does_not_have_become_null():
    value = {"a": [float("nan"), (1.5, float("inf"))], "b": "NaN", "c": {"d": -float("inf")}}
    assert common.to_json(value) == '{"a": [null, [1.5, null]], "b": "NaN", "c": {"d": null}}'


def test_a_draft_replaces_the_file_when_it_is_whole_and_never_before(tmp_path):
    path = tmp_path / "new/file.txt"
    with common.atomically(path) as draft:
        draft.write_text("first")
        assert draft.suffix == ".txt" and not path.exists()
    assert path.read_text() == "first"
    with pytest.raises(KeyError), common.atomically(path) as draft:
        draft.write_text("torn")
        raise KeyError
    assert path.read_text() == "first" and os.listdir(path.parent) == ["file.txt"]


def test_a_draft_may_be_a_folder(tmp_path):
    folder = tmp_path / "folder"
    with pytest.raises(KeyError), common.atomically(folder, "draft") as draft:
        draft.mkdir()
        (draft / "file").touch()
        raise KeyError
    assert os.listdir(tmp_path) == []
    with common.atomically(folder, "draft") as draft:
        draft.mkdir()
        (draft / "file").touch()
        assert draft == tmp_path / ".folder.draft"
    assert os.listdir(tmp_path) == ["folder"] and (folder / "file").exists()


def test_a_file_that_cannot_be_written_is_one_line(refused, tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file/x.txt"
    refused(lambda: common.write_atomically(path, "text"), f"{path}: not written: ")


# ---------------------------------------------------------------- checkpoints
TENSORS = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(3)}


def write(folder, stage="quantize", **more):
    meta = {"stage": stage, "model": {"dim": 3}, "step": 4} | more
    common.write_checkpoint(folder, TENSORS.items(), meta, {})
    return folder


def test_a_checkpoint_comes_back_with_its_files(tmp_path):
    (tmp_path / "source").write_text("linked")
    extra = {
        "words.json": "öffne",
        "linked": tmp_path / "source",
        "more": [("x", torch.ones(2, 3).T)],
    }
    meta = {"stage": "quantize", "model": {}, "step": 4, "r2": float("nan")}
    common.write_checkpoint(tmp_path / "c", TENSORS.items(), meta, extra)
    weights, found = common.load_checkpoint(tmp_path / "c", "laq", ("quantize",))
    assert found == meta | {"r2": None} and weights.keys() == TENSORS.keys()
    assert all(torch.equal(weights[name][:], tensor) for name, tensor in TENSORS.items())
    assert (tmp_path / "c/words.json").read_text(encoding="utf-8") == "öffne"
    assert (tmp_path / "c/linked").read_text() == "linked"
    assert (tmp_path / "c/more").stat().st_size > 8
    assert common.weight_files(tmp_path / "c") == [tmp_path / "c/model.safetensors"]


def test_a_run_stands_for_its_newest_checkpoint(tmp_path):
    for name in ("step_1", "step_2"):
        write(tmp_path / name)
    (tmp_path / "latest").write_text("step_1\n")
    assert common.latest(tmp_path) == tmp_path / "step_1"
    assert common.latest(tmp_path / "step_2") == tmp_path / "step_2"
    path, meta = common.open_checkpoint(tmp_path, "laq", ("quantize", "finetune"))
    assert path == tmp_path / "step_1" and meta["step"] == 4


def test_fingerprints_name_the_weights_alone(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b", "finetune", step=9)
    assert common.fingerprint(tmp_path / "a") == common.fingerprint(tmp_path / "b")
    common.write_checkpoint(tmp_path / "c", [("weight", torch.zeros(2, 3))], {}, {})
    assert common.fingerprint(tmp_path / "a") != common.fingerprint(tmp_path / "c")
    assert len(common.fingerprint(tmp_path / "c")) == 12


def test_what_is_no_checkpoint_of_the_stage_is_refused(refused, tmp_path):
    folder = write(tmp_path / "c")

    def load(path=folder, stages=("quantize",)):
        return lambda: common.load_checkpoint(path, "init_from", stages)

    refused(load(tmp_path / "none"), f"--init_from {tmp_path / 'none'}: no checkpoint there")
    refused(load(stages=("pretrain", "finetune")), "'quantize', expected pretrain or finetune")
    meta = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps([meta]))
    refused(load(), "config.json lacks stage, model or step")
    del meta["step"]
    (folder / "config.json").write_text(json.dumps(meta))
    refused(load(), "config.json lacks stage, model or step")
    (folder / "config.json").write_text(json.dumps(meta | {"step": 1}))
    (folder / "model.safetensors").write_bytes(b"junk")
    refused(load(), "unreadable checkpoint")
    (folder / "model.safetensors").unlink()
    refused(load(), "no checkpoint there")
