"""The analysis room: figures of the report card, atlas, charts, and how the pictures are made."""

import errno
import importlib.util
import json
import re
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import data
import quantize
from analysis import atlas, charts, report_card
from model import LAQ, LAQConfig

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None,
    reason="charts are drawn with matplotlib: pip install matplotlib",
)


# ---------------------------------------------------------------- the report card's figures
@pytest.mark.parametrize("rows", [4, 5])  # T-1 or T rows of actions for T = 5 frames
def test_window_motion_sums_the_actions_of_the_window(rows):
    values = np.array([[1, 0], [2, 10], [4, 20], [8, 30], [99, 99]], np.float32)[:rows]
    episode = data.Episode("a", "x", 5, {}, np.zeros((5, 8, 8, 3), np.uint8), values)
    expected = [[3, 10], [6, 30], [12, 50], [8, 30], [0, 0]]  # 0.4 s are 2 frames
    assert report_card.window_motion(episode, 0.4).tolist() == expected


def test_perplexity_psnr_and_probe():
    values = [report_card.perplexity(np.array(z), 8) for z in ([3, 3], range(8), [0, 0, 0, 1])]
    assert values == pytest.approx([1, 8, 1.7548], abs=1e-4)
    assert [report_card.psnr(mse) for mse in (1, 0.01, 0)] == pytest.approx([0, 20, 120])
    rng = np.random.default_rng(0)
    codes, effect = rng.integers(0, 8, (3000, 2)), rng.normal(size=(2, 8, 3))
    target = effect[0][codes[:, 0]] + effect[1][codes[:, 1]]

    def r2(z):
        return report_card.probe_r2(z[:2000], target[:2000], z[2000:], target[2000:], 8)

    assert min(r2(codes)) > 0.999 and np.abs(r2(rng.permutation(codes))).max() < 0.05


def test_an_axis_that_never_moves_has_no_r2_and_the_table_says_so():
    codes = np.arange(40)[:, None] % 8
    target = np.hstack([codes, 0 * codes]).astype(float)
    scores = report_card.probe_r2(codes, target, codes, target, 8)
    assert scores[0] > 0.99 and scores[1] is None
    assert report_card.markdown({"probe_r2": [0.5, None]}).endswith(
        "| probe r2 | 0.5, never moves |"
    )


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = dict(image_size=8, patch_size=4, dim=24, heads=2, dim_head=12, quant_dim=8, code_len=1)
    depths = dict(spatial_depth=1, temporal_depth=1, decoder_depth=1)
    return LAQ(LAQConfig(**shape, **depths)).eval()


@pytest.mark.parametrize("actions", [True, False])
def test_a_report_holds_what_the_plain_formulas_give(model, make_dataset, tmp_path, actions):
    def without(root, rows):
        for row in rows.values():
            del row["actions"]

    change = {} if actions else {"change": without}
    episodes = data.open_dataset(make_dataset({"a": 5, "b": 7}, **change), 8).episodes
    card, files = report_card.report(
        model, quantize.label, episodes, episodes, 0.4, tmp_path / "out", 3
    )
    assert card["pairs"] == 4 + 6 and card["episodes"] == 2
    assert ("probe_r2" in card) == ("probe_r2_shuffled" in card) == actions
    assert all(path.is_file() for path in files)
    assert json.loads(files[0].read_text()) == card
    pairs = data.to_float(
        np.concatenate(
            [
                data.frame_pairs([e], [(0, t) for t in range(len(e.frames) - 1)], 0.4)
                for e in episodes
            ]
        )
    )
    drawn = model.imagine(pairs[:, 0], model.label(pairs)).clamp(0, 1)
    for name, picture in (("psnr", drawn), ("psnr_copy_first_frame", pairs[:, 0])):
        mse = float(((picture - pairs[:, 1]) ** 2).mean())
        assert card[name] == pytest.approx(-10 * np.log10(mse), abs=0.006)


def test_a_report_refuses_a_folder_that_is_a_file(model, make_dataset, tmp_path, capsys):
    episodes = data.open_dataset(make_dataset({"a": 5}), 8).episodes
    (tmp_path / "out").touch()
    with pytest.raises(SystemExit) as stop:
        report_card.report(model, quantize.label, episodes, episodes, 0.4, tmp_path / "out")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: --out ") and said.count("\n") == 1


# ---------------------------------------------------------------- atlas
def test_the_atlas_shows_the_most_frequent_codes_first(tmp_path, monkeypatch):
    class Brightness:
        """Draws a picture as bright as the first code"""

        def imagine(self, frame, codes):
            return frame * 0 + codes[:, :1, None, None] / 8

    sheets = []
    monkeypatch.setattr(atlas, "contact_sheet", lambda columns, path: sheets.append(columns))
    codes = np.array([[3, 1]] * 2 + [[0, 0]] + [[7, 2]] * 3)
    starts = torch.ones(4, 3, 8, 8)
    atlas.draw_atlas(Brightness(), starts, codes, tmp_path / "x.png", most_frequent=2)
    (columns,) = sheets
    assert list(columns) == ["x_t", "7 2", "3 1"]
    assert [float(c.mean()) for c in columns.values()] == [1, 7 / 8, 3 / 8]
    assert all(c.shape == starts.shape for c in columns.values())


def test_a_contact_sheet_puts_titles_in_columns_and_pictures_in_rows(tmp_path):
    dark, bright = torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), 2.0)  # clamped to 1
    atlas.contact_sheet({"a": dark, "b": bright}, tmp_path / "x.png", size=10, gap=2, head=16)
    sheet = np.array(Image.open(tmp_path / "x.png"))
    assert sheet.shape == (16 + 2 * 12, 2 + 2 * 12, 3)
    assert (sheet[16:26, 2:12] == 0).all() and (sheet[28:38, 2:12] == 0).all()
    assert (sheet[16:, 14:] == 255).all()


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    def full(self, *args, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(SystemExit) as stop:
        atlas.contact_sheet({"x": torch.zeros(2, 3, 8, 8)}, tmp_path / "x.gif")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.endswith("x.gif: not written: No space left on device\n")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- charts
TABLE = """| probe | x |
|---|---|
| R2 | 0.79 |

| success % of 200 (± standard error) | **seen** | reach | **unseen** | reach |
|---|---|---|---|---|
| RANDOM | 9.2 ± 0.6 | - | 9.0 ± 0.8 | - |
| LAPA | 41.2 ± 2.6 | 80.0 ± 3.0 | 37.5 ± 2.3 | 70.1 ± 1.0 |
| VPT human | 37.3 ± 6.4 | 60.0 ± 3.0 | 34.3 ± 3.6 | 60.1 ± 1.0 |

Other text.
"""


def make_run(folder, stages=("quantize", "pretrain", "finetune", "scratch")):
    """What a run leaves that the loss chart reads"""
    for stage in stages:
        checkpoint = folder / stage / "step_00000002"
        checkpoint.mkdir(parents=True)
        (folder / stage / "latest").write_text(checkpoint.name)
        shape = {"latent_vocab": 8, "action_vocab": 256}
        (checkpoint / "config.json").write_text(json.dumps({"model": shape}))
        lines = [{"step": i, "loss": 2.0 / i, "val_loss": 2.1 / i} for i in (1, 2)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / stage / "metrics.jsonl").write_text(text)
    return folder


@pytest.fixture
def draw(inside):
    """draw("arms", "--out", ..) -> exit code of `python -m analysis.charts arms --out ..`"""
    return partial(inside, "-m", "analysis.charts")


def is_a_picture(path):
    with Image.open(path) as picture:
        return picture.width > 1000 and picture.convert("L").getextrema()[0] < 128


@needs_matplotlib
def test_losses_are_drawn_and_drawn_alike_again(draw, tmp_path):
    run = make_run(tmp_path / "run")
    for name in ("a.png", "b.png"):
        assert draw("losses", "--run", run, "--out", tmp_path / name) == 0
    assert is_a_picture(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    without = make_run(tmp_path / "other", ("quantize", "pretrain", "finetune"))
    assert draw("losses", "--run", without, "--out", tmp_path / "c.png") == 0
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()


@needs_matplotlib
def test_arms_are_drawn(draw, tmp_path):
    (tmp_path / "table.md").write_text(TABLE)
    words = ("arms", "--table", tmp_path / "table.md", "--out", tmp_path / "new/arms.png")
    assert draw(*words) == 0 and is_a_picture(tmp_path / "new/arms.png")


@needs_matplotlib
def test_embodiments_are_drawn_in_one_row_for_each_dataset(draw, make_dataset, tmp_path):
    folders = [make_dataset({"a": 5, "b": 3}, root=tmp_path / name) for name in ("one", "two")]
    words = ("embodiments", "--instruction", "push it", "--frames", 3, "--out")
    assert draw(*words, tmp_path / "x.png", "--data", *folders) == 0
    assert draw(*words, tmp_path / "y.png", "--data", folders[0]) == 0
    with Image.open(tmp_path / "x.png") as two, Image.open(tmp_path / "y.png") as one:
        assert one.width == two.width and two.height > 1.5 * one.height


def test_the_table_of_arms_is_read_as_evaluate_writes_it(inside, tmp_path):
    (tmp_path / "by_hand.md").write_text(TABLE)
    heading, arms = charts.read_success_table(str(tmp_path / "by_hand.md"))
    assert heading == "success % of 200 (± standard error)"
    assert list(arms) == ["RANDOM", "LAPA", "VPT human"]
    assert arms["LAPA"] == {"seen": (41.2, 2.6), "unseen": (37.5, 2.3)}
    places = charts.place_arms(list(arms))
    assert places == {"RANDOM": 0, "LAPA": 1.5, "VPT human": 3}

    for i, rate in enumerate((40.0, 50.0)):
        row = {"success": rate, "se": 1.0, "n": 200, "families": {}}
        results = {"arms": {"LAPA_human": {"seen": row, "unseen": row}}}
        (tmp_path / f"{i}.json").write_text(json.dumps(results))
    results = f"{tmp_path / '0.json'},{tmp_path / '1.json'}"
    assert inside("evaluate.py", "table", "--results", results, "--out", tmp_path / "t.md") == 0
    _, arms = charts.read_success_table(str(tmp_path / "t.md"))
    assert arms == {"LAPA human": {"seen": (45, 5), "unseen": (45, 5)}}


def test_missing_input_is_refused_in_one_line(draw, make_dataset, tmp_path, capsys):
    (tmp_path / "text.md").write_text("no table here\n")
    (tmp_path / "cut.md").write_text(TABLE.replace("41.2 ± 2.6", "much"))
    damaged = make_run(tmp_path / "damaged")
    (damaged / "pretrain/metrics.jsonl").write_text("")
    headless = make_run(tmp_path / "headless")
    (headless / "finetune/step_00000002/config.json").unlink()
    folder = make_dataset({"a": 5})
    for words, said in (
        (["losses", "--run", tmp_path / "none"], "none/quantize/metrics.jsonl: no log of a run"),
        (["losses", "--run", damaged], "damaged/pretrain/metrics.jsonl: no log of a run"),
        (["losses", "--run", headless], "headless/finetune/step_00000002/config.json"),
        (["losses"], "--run is required"),
        (["arms", "--table", tmp_path / "none.md"], "none.md: no table of success rates"),
        (["arms", "--table", tmp_path / "text.md"], "text.md: no table of success rates"),
        (["arms", "--table", tmp_path / "cut.md"], "cut.md: no table of success rates"),
        (["embodiments", "--data", folder], "no episode with instruction="),
        (["embodiments", "--data", tmp_path / "none"], "none: no dataset there"),
        (["pie"], "no such chart, expected one of losses, arms, embodiments"),
    ):
        assert draw(*words, "--out", tmp_path / "x.png") == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and said in error and error.count("\n") == 1, error
    assert not (tmp_path / "x.png").exists()


@needs_matplotlib
def test_a_chart_that_cannot_be_written_is_one_line(draw, tmp_path, capsys):
    (tmp_path / "table.md").write_text(TABLE)
    (tmp_path / "file").touch()
    words = ("arms", "--table", tmp_path / "table.md", "--out", tmp_path / "file/x.png")
    assert draw(*words) == 2
    error = capsys.readouterr().err
    assert "x.png: not written" in error and error.count("\n") == 1


def test_charts_say_what_to_install(draw, tmp_path, monkeypatch, capsys):
    (tmp_path / "table.md").write_text(TABLE)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    words = ("arms", "--table", tmp_path / "table.md", "--out", tmp_path / "x.png")
    assert draw(*words) == 2
    assert capsys.readouterr().err == (
        "error: charts are drawn with matplotlib: pip install matplotlib\n"
    )


def test_charts_explain_themselves(draw, capsys):
    assert draw("--help") == 0 and "analysis.charts losses" in capsys.readouterr().out
    assert draw("arms", "--help") == 0 and "--table" in capsys.readouterr().out


# ---------------------------------------------------------------- docs
def test_every_picture_of_the_docs_has_its_command():
    named = re.findall(r"^\| \[([\w.]+)\]\(\1\) \|.*\| .+ \|$", listing(), re.MULTILINE)
    pictures = [p.name for p in (ROOT / "docs").iterdir() if p.suffix in (".svg", ".png", ".gif")]
    assert sorted(named) == sorted(pictures)
    for command in re.findall(r"analysis\.charts (\w+)", listing()):
        assert command in charts.COMMANDS


def listing():
    return (ROOT / "docs/pictures.md").read_text(encoding="utf-8")


def test_the_arms_chart_can_be_drawn_from_the_repository():
    _, arms = charts.read_success_table(str(ROOT / "docs/results.md"))
    assert {"RANDOM", "SCRATCH", "LAPA", "VPT", "ACTIONVLA"} <= arms.keys()
    assert all(by_split.keys() == {"seen", "unseen"} for by_split in arms.values())
