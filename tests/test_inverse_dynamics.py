"""VPT's inverse dynamics model: what it learns, its labels file, and what is refused."""

import json
import os

import numpy as np
import pytest
import torch
from runs import PRETRAIN
from safetensors import safe_open
from safetensors.numpy import load_file

import data
import quantize
import training
from baselines import inverse_dynamics
from baselines.inverse_dynamics import InverseDynamics, InverseDynamicsConfig

COMMAND = ("-m", "baselines.inverse_dynamics", "--preset", "tiny", "--steps", 2, "--held_out", 1)


class Known:
    """Stands for a model: guesses the mean brightness of both frames, [B, 2]"""

    mean = torch.zeros(2)

    def __call__(self, pairs):
        return pairs.mean((2, 3, 4))


def brightness(*values, actions=None, name="a"):
    """An episode of frames of these brightnesses"""
    frames = np.array(values, np.uint8)[:, None, None, None] * np.ones((8, 8, 3), np.uint8)
    return data.Episode(name, "x", 5, {}, frames, actions)


def guesses_of(path):
    """-> {episode: actions}, and what the file says about itself"""
    with safe_open(path, "numpy") as file:
        meta = json.loads(file.metadata()["meta"])
    return load_file(path), meta


# ---------------------------------------------------------------- the model
@pytest.mark.parametrize("image_size", [64, 104])
def test_the_encoder_is_stage_one_with_its_grid_laid_over_the_pictures(image_size):
    shape = inverse_dynamics.encoder_shape("tiny", image_size)
    assert shape.grid == 8 and shape.patch_size == image_size // 8
    assert shape.image_size == 8 * shape.patch_size
    assert shape.dim == quantize.PRESETS["tiny"]["dim"]


def test_predictions_are_those_of_standardized_actions():
    torch.manual_seed(0)
    actions = np.float32([[1, 100], [3, 300]])
    model = InverseDynamics(inverse_dynamics.encoder_shape("tiny", 32), actions)
    pairs = torch.rand(4, 2, 3, 32, 32)
    expected = model.standardized(pairs) * torch.tensor([1.0, 100.0]) + torch.tensor([2.0, 200.0])
    torch.testing.assert_close(model(pairs), expected)
    assert expected.std(0).min() > 0


@pytest.mark.slow
def test_it_learns_what_moves_between_two_frames(make_dataset):
    """A bright square moves to the left or to the right: the action's sign"""

    def moving(root, rows):
        for name, row in rows.items():
            actions = np.sign(np.random.default_rng(ord(name)).normal(size=(11, 1)))
            frames = np.zeros((12, 32, 32, 3), np.uint8)
            for t, place in enumerate(16 + np.cumsum([0, *actions[:, 0]]).astype(int)):
                frames[t, 12:20, place - 4 : place + 4] = 255
            np.save(root / row["video"], frames)
            np.save(root / row["actions"], np.float32(actions))

    folder = make_dataset(dict.fromkeys("abcdefghij", 12), moving, size=32)
    episodes = data.open_dataset(folder, 32).episodes
    recipe = {"steps": 25, "lr": 4e-3, "warmup": 5}
    config = InverseDynamicsConfig(data="", out="", preset="tiny", image_size=32, **recipe)
    model = inverse_dynamics.train(config, episodes[:8], training.start_processes())
    (r2,) = inverse_dynamics.held_out_r2(model, episodes[8:])
    assert not model.training and r2 > 0.7  # 0.96


# ---------------------------------------------------------------- guesses
def test_every_frame_is_guessed_with_its_successor_and_the_last_repeats():
    episodes = [brightness(0, 51, 102, 255), brightness(255, 0)]
    found = inverse_dynamics.guess_actions(Known(), episodes)
    expected = [[[0, 0.2], [0.2, 0.4], [0.4, 1], [0.4, 1]], [[1, 0], [1, 0]]]
    for rows, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(rows, wanted, atol=1e-6)


def test_guesses_of_a_dimension_of_few_values_move_to_the_nearest():
    rng = np.random.default_rng(0)
    true = np.stack([rng.normal(size=60), rng.choice([-1, 0, 4], 60), np.full(60, 7)], 1)
    labelled = [brightness(*range(60), actions=np.float32(true))]
    guesses = [np.float32([[0.123, -0.6, 0], [9, 1.9, 6]]), np.float32([[-9, 2.1, 99]])]
    snapped = inverse_dynamics.snap_to_values(guesses, labelled, 256, "")
    expected = [[[0.123, -1, 7], [9, 0, 7]], [[-9, 4, 7]]]
    for rows, wanted in zip(snapped, expected, strict=True):
        np.testing.assert_allclose(rows, wanted, atol=1e-6)
    assert guesses[0][1].tolist() == [9, np.float32(1.9), 6]  # they themselves stay


def test_guesses_of_a_binary_dimension_become_0_or_1():
    labelled = [brightness(*range(40), actions=np.linspace(0, 1, 40, dtype=np.float32)[:, None])]
    guesses = [np.float32([[-0.2], [0.4], [0.6], [1.7]])]
    (snapped,) = inverse_dynamics.snap_to_values(guesses, labelled, 256, "0")
    assert snapped[:, 0].tolist() == [0, 0, 1, 1]
    (smooth,) = inverse_dynamics.snap_to_values(guesses, labelled, 256, "")
    assert np.array_equal(smooth, guesses[0])


def test_r2_is_that_of_held_out_episodes_with_actions():
    frames = (0, 51, 102, 255)
    right = np.float32([[0, 3], [0.2, 3], [0.4, 3]])  # the second dimension never moves
    known = [brightness(*frames, actions=right), brightness(0, 255)]
    assert inverse_dynamics.held_out_r2(Known(), known) == [1.0, None]
    wrong = [brightness(*frames, actions=right[::-1].copy())]
    assert inverse_dynamics.held_out_r2(Known(), wrong) == [-3.0, None]
    assert inverse_dynamics.held_out_r2(Known(), known[1:]) is None


# ---------------------------------------------------------------- the command
def test_the_same_seed_gives_exactly_the_same_labels_file(inside, make_dataset, tmp_path):
    folder = make_dataset({name: 5 for name in "abcd"}, size=16)
    files = []
    for seed, name in ((0, "first"), (0, "again"), (1, "other")):
        files.append(tmp_path / name)
        more = ("--labelled", 2, "--seed", seed, "--out", files[-1])
        assert inside(*COMMAND, "--data", folder, *more) == 0
    (first, meta), (again, _), (other, _) = map(guesses_of, files)
    assert all(np.array_equal(rows, again[name]) for name, rows in first.items())
    assert not np.array_equal(first["a"], other["a"])
    assert {name: rows.shape for name, rows in first.items()} == {name: (5, 2) for name in "abcd"}
    assert all(rows.dtype == np.float32 for rows in first.values())
    assert all(np.array_equal(rows[-1], rows[-2]) for rows in first.values())
    assert meta["labels"] == "idm" and len(meta["r2"]) == 2 and meta["options"]["seed"] == 0
    assert meta["dataset"] == data.open_dataset(folder, 64).fingerprint


def test_labelled_episodes_may_be_of_another_dataset(inside, make_dataset, tmp_path, capsys):
    def without(root, rows):
        for row in rows.values():
            del row["actions"]

    videos = make_dataset({"a": 5, "b": 4}, without, size=16, root=tmp_path / "videos")
    robot = make_dataset({"c": 5, "d": 4, "e": 4}, size=16, root=tmp_path / "robot")
    words = (*COMMAND, "--data", videos, "--labelled", 2, "--out", tmp_path / "out")
    assert inside(*words, "--labelled_data", robot) == 0
    assert "R2" not in capsys.readouterr().out  # held-out episodes have no actions
    guesses, meta = guesses_of(tmp_path / "out")
    assert guesses.keys() == {"a", "b"} and meta["r2"] is None
    assert inside(*words) == 2
    assert "only 0 episodes with actions" in capsys.readouterr().err
    assert inside(*words, "--labelled_data", robot, "--labelled_where", "id=none") == 2
    assert "no episode with id=none" in capsys.readouterr().err


def test_several_processes_are_refused(inside, make_dataset, tmp_path, capsys, monkeypatch):
    folder = make_dataset({"a": 5, "b": 5})
    several = training.Processes(rank=0, world=2)
    monkeypatch.setattr(training, "start_processes", lambda: several)
    assert inside(*COMMAND, "--data", folder, "--labelled", 1, "--out", tmp_path / "out") == 2
    assert "runs in one process" in capsys.readouterr().err
    assert "out" not in os.listdir(tmp_path)


def test_a_file_that_cannot_be_written_is_refused_before_training(
    inside, make_dataset, tmp_path, capsys, monkeypatch
):
    folder = make_dataset({"a": 5, "b": 5})
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(inverse_dynamics, "train", None)  # must not be reached
    for out in (tmp_path, tmp_path / "file/x.safetensors"):
        assert inside(*COMMAND, "--data", folder, "--labelled", 1, "--out", out) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: --out {out}: ") and said.count("\n") == 1


@pytest.mark.parametrize(
    "more, words", [(("--image_size", 100), "--image_size 100"), (("--lr", 1e18), "the loss is ")]
)
def test_sizes_and_losses_that_spoil_the_guesses_are_refused(
    inside, make_dataset, tmp_path, capsys, more, words
):
    line = (*COMMAND, "--data", make_dataset({"a": 5, "b": 5}), "--labelled", 1, "--steps", 9)
    assert inside(*line, "--out", tmp_path / "x.safetensors", *more) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "x.safetensors").exists()


# ---------------------------------------------------------------- pretraining on guesses
def test_pretraining_uses_the_guesses_of_the_file(runs, capsys, call):
    guesses = load_file(runs / "guesses.safetensors")
    train_set, _ = data.open_dataset(runs / "table", 64).split(2)
    to_fit = np.concatenate([guesses[episode.id] for episode in train_set])
    line = f"{PRETRAIN} --labels idm --labels_file DIR/guesses.safetensors --out OUT --bins 16"
    assert call(line) == 0
    expected = data.describe_bins(data.fit_bins(to_fit, 16), to_fit)
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    "labels_file, said",
    [
        ("", "--labels idm needs --labels_file"),
        ("--labels_file DIR/none", "DIR/none: no labels there"),
        ("--labels_file DIR/labels.safetensors", "holds codes, expected actions"),
    ],
)
def test_pretraining_refuses_what_is_no_file_of_guesses(
    runs, call, capsys, tmp_path, labels_file, said
):
    assert call(f"{PRETRAIN} --labels idm {labels_file} --out OUT") == 2
    error = capsys.readouterr().err
    assert said.replace("DIR", str(runs)) in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
