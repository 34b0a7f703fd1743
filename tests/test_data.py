"""Episodes on disk, their cache, windows, labels, bins."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_film
from PIL import Image
from safetensors.numpy import save_file

import data

LANGUAGE_TABLE = ROOT.parent / "shared" / "data" / "language-table"


# ---------------------------------------------------------------- defects of a dataset
def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def junk(name):
    """A video `name` that no decoder understands"""

    def change(root, b):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"\x89PNG junk" * 20)
        b.update(video=name.partition("/")[0], frames=0)
        del b["frames"]

    return change


def video(array):
    return lambda root, b: np.save(root / "videos/b.npy", array)


def actions(*shape, value=0.0):
    return lambda root, b: np.save(root / "b.npy", np.full(shape, value, np.float32))


def one_frame(root, b):
    video(np.zeros((1, 8, 8, 3), np.uint8))(root, b)
    actions(1, 2)(root, b)
    b["frames"] = 1


DEFECTS = {  # name: (field, what breaks episode b of 7 frames)
    "duplicate id": ("id", lambda root, b: b.update(id="a")),
    "missing video": ("video", lambda root, b: b.update(video="videos/none.npy")),
    "no video": ("video", lambda root, b: b.pop("video")),
    "undecodable film": ("video", junk("b.mp4")),
    "undecodable picture": ("video", junk("b/img_1.png")),
    "truncated npy": ("video", lambda root, b: cut(root / "videos/b.npy")),
    "float video": ("video", video(np.ones((7, 8, 8, 3)))),
    "T that does not match": ("frames", lambda root, b: b.update(frames=8)),
    "one frame": ("video", one_frame),
    "no frame": ("video", video(np.zeros((0, 8, 8, 3), np.uint8))),
    "empty folder": ("video", lambda root, b: ((root / "b").mkdir(), b.update(video="b"))),
    "actions too short": ("actions", actions(5, 2)),
    "actions of no width": ("actions", actions(6, 0)),
    "flat actions": ("actions", actions(6)),
    "another width": ("actions", actions(6, 3)),
    "NaN": ("actions", actions(6, 2, value=np.nan)),
    "truncated actions": ("actions", lambda root, b: cut(root / "b.npy")),
    "missing actions": ("actions", lambda root, b: b.update(actions="none.npy")),
    "empty instruction": ("instruction", lambda root, b: b.update(instruction="  ")),
    "half a character": ("instruction", lambda root, b: b.update(instruction="push \ud800")),
    "actions beyond float32": (
        "actions",
        lambda root, b: np.save(root / "b.npy", np.full((6, 2), 1e300)),
    ),
    "no instruction": ("instruction", lambda root, b: b.pop("instruction")),
    "absolute path": ("video", lambda root, b: b.update(video=str(root / "videos/b.npy"))),
    "path outside": ("actions", lambda root, b: b.update(actions="../dataset/b.npy")),
    "no fps": ("fps", lambda root, b: b.pop("fps")),
    "fps zero": ("fps", lambda root, b: b.update(fps=0)),
    "captions": ("captions", lambda root, b: b.update(captions=["one"])),
}


def refused(folder, capsys):
    """Open a broken dataset -> what it says on stderr"""
    with pytest.raises(SystemExit) as stop:
        data.open_dataset(folder, 8)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("error:") == 1
    return said


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_names_file_episode_and_field(make_dataset, capsys, name):
    field, change = DEFECTS[name]
    folder = make_dataset({"a": 5, "b": 7, "c": 4}, lambda root, rows: change(root, rows["b"]))
    episode, said = "a" if name == "duplicate id" else "b", refused(folder, capsys)
    assert f"{folder}/episodes.jsonl: episode '{episode}': field {field}:" in said
    assert said.count("field ") == 1  # nothing else is wrong


@pytest.mark.parametrize("line", ['{"id": "b", ', "[1, 2]", '{"instruction": "x"}', '{"id": 7}'])
def test_broken_line_is_named_by_its_number(make_dataset, capsys, line):
    folder = make_dataset({"a": 5, "b": 5}, lambda root, rows: rows.update(b=line))
    said = refused(folder, capsys)
    assert f"{folder}/episodes.jsonl: line 2" in said and ("field id" in said) == ("}" in line)


def test_all_defects_are_reported_at_once(make_dataset, capsys):
    def change(root, rows):
        DEFECTS["NaN"][1](root, rows["b"])
        rows["b"]["instruction"], rows["c"]["fps"], rows["d"] = "", "fast", "{"

    said = refused(make_dataset({"a": 5, "b": 7, "c": 4, "d": 4}, change), capsys)
    for part in ("4 defects", "'b': field actions", "'b': field instr", "'c': field fps", "line 4"):
        assert part in said


# ---------------------------------------------------------------- videos and their cache
def pictures(root, row):
    (root / "img").mkdir()
    for n in range(1, 13):  # img_2 comes before img_10, though not in the alphabet
        Image.new("RGB", (32, 32), (20 * n,) * 3).save(root / f"img/img_{n}.png")
    row["video"] = "img"


def film(root, row):
    make_film(root / "film.mp4", [np.full((32, 32, 3), 20 * n, np.uint8) for n in range(1, 13)])
    row["video"] = "film.mp4"
    del row["fps"]  # the file knows


def deep_film(root, row):
    """Ten bits per channel"""
    make_film(
        root / "film.mkv",
        [np.full((32, 32, 3), 20 * n, np.uint8) for n in range(1, 13)],
        codec="ffv1",
        pixels="yuv420p10le",
    )
    row["video"] = "film.mkv"
    del row["fps"]


def array(root, row):
    frames = np.arange(20, 260, 20, dtype=np.uint8)[:, None, None, None]
    np.save(root / "videos/b.npy", np.broadcast_to(frames, (12, 32, 32, 3)))


@pytest.mark.parametrize("kind", [array, pictures, film, deep_film])
@pytest.mark.parametrize("size", [32, 8])
def test_every_kind_of_video_is_read(make_dataset, kind, size):
    folder = make_dataset({"b": 12}, lambda root, rows: kind(root, rows["b"]))
    (e,) = data.open_dataset(folder, size).episodes
    assert e.fps == 5 and e.frames.shape == (12, size, size, 3) and e.frames.dtype == np.uint8
    gap = e.frames - 20.0 * np.arange(1, 13)[:, None, None, None]
    assert np.abs(gap).max() <= (3 if kind in (film, deep_film) else 0)


@pytest.mark.skipif(not LANGUAGE_TABLE.is_dir(), reason=f"{LANGUAGE_TABLE} is not here")
def test_language_table_episodes_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("LAPA_CACHE", str(tmp_path / "cache"))
    lines = (LANGUAGE_TABLE / "episodes.jsonl").read_text().splitlines()[:3]
    (tmp_path / "episodes.jsonl").write_text("\n".join(lines))
    for path in (json.loads(line)[k] for line in lines for k in ("video", "actions")):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes((LANGUAGE_TABLE / path).read_bytes())
    for e in data.open_dataset(tmp_path, 64, actions_needed=True).episodes:
        assert e.frames.shape == (e.info["frames"], 64, 64, 3) and 60 < e.frames.mean() < 250
        assert e.actions.shape == (len(e.frames) - 1, 2) and np.abs(e.actions).max() <= 0.11
        assert np.abs(np.diff(e.frames.astype(int), axis=0)).mean((1, 2, 3)).max() > 0.1  # it moves


def test_cache_is_read_renewed_and_repaired(make_dataset, tmp_path):
    folder = make_dataset({"a": 5})

    def frames():
        return np.array(data.open_dataset(folder, 4).episodes[0].frames)

    first, (rows, index) = frames(), sorted((tmp_path / "cache/frames_4").iterdir())
    assert rows.suffix == ".bin" and index.suffix == ".jsonl"
    rows.write_bytes(bytes([7]) * first.nbytes)  # shows that the file is what is read
    assert (frames() == 7).all()
    index.write_text(index.read_text().rstrip("\n")[:-5])  # killed while it wrote its line
    assert np.array_equal(frames(), first) and len(index.read_text().splitlines()) == 1
    with open(rows, "ab") as file:  # killed before it wrote a line
        file.write(b"torn")
    assert np.array_equal(frames(), first)
    np.save(folder / "videos/a.npy", np.full((5, 8, 8, 3), 9, np.uint8))  # the source changed
    assert (frames() == 9).all()
    rows.write_bytes(rows.read_bytes()[:-1])  # its end is lost and decoded again
    assert (frames() == 9).all() and rows.stat().st_size == 2 * first.nbytes


def test_two_processes_open_a_dataset_at_once(make_dataset, tmp_path):
    folder = make_dataset({f"e{i}": 40 for i in range(20)}, size=32)
    script = (
        "import sys, data; print([int(e.frames.sum(dtype=int)) for e in "
        "data.open_dataset(sys.argv[1], 4).episodes])"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", script, folder],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    (one, complaint), (two, _) = (p.communicate() for p in both)
    assert one == two and one.count(",") == 19, complaint
    rows, index = sorted((tmp_path / "cache/frames_4").iterdir())  # no draft is left
    assert len(index.read_text().splitlines()) == 20  # each was decoded once
    assert rows.stat().st_size == 20 * 40 * 4 * 4 * 3


def test_episodes_share_a_video(make_dataset):
    """Two threads then decode one source at once; they must not take each other's draft away."""
    folder = make_dataset(
        {f"e{i}": 300 for i in range(8)},
        size=64,
        change=lambda root, rows: [row.update(video="videos/e0.npy") for row in rows.values()],
    )
    for size in range(40, 48):  # many tries: it is a race
        frames = [e.frames for e in data.open_dataset(folder, size).episodes]
        assert all(np.array_equal(f, frames[0]) for f in frames)


# ---------------------------------------------------------------- windows and batches
@pytest.mark.parametrize(
    "seconds, fps, frames", [(0.6, 5, 3), (0.6, 10, 6), (2.5, 12, 30), (0.6, 0.5, 1), (0.0, 5, 1)]
)
def test_window_frames(seconds, fps, frames):
    assert data.window_frames(seconds, fps) == frames


def test_frame_pairs_look_ahead_and_stop_at_the_last_frame(make_dataset):
    a, b = episodes = data.open_dataset(make_dataset({"a": 5, "b": 7}), 8).episodes
    assert data.future_index([0, 1, 3, 4], 5, 3).tolist() == [3, 4, 4, 4]
    pairs = data.frame_pairs(episodes, [(1, 2), (0, 3)], 0.6)
    assert np.array_equal(pairs, [b.frames[[2, 5]], a.frames[[3, 4]]])
    assert float(data.to_float(pairs)[1, 0, 2, 5, 6]) == pytest.approx(a.frames[3][5, 6, 2] / 255)


def test_draw_is_a_pure_function_of_seed_and_step():
    once = data.draw(3, 17, 2000, [2, 50])
    assert once == data.draw(3, 17, 2000, [2, 50])
    assert once != data.draw(3, 18, 2000, [2, 50]) and once != data.draw(4, 17, 2000, [2, 50])
    assert {t for e, t in once if e == 0} == {0, 1} and {t for e, t in once if e} == set(range(50))
    assert abs(sum(e for e, _ in once) / 2000 - 0.5) < 0.05  # clips, not frames, are equally likely


def test_processes_sample_their_rows_of_one_global_batch():
    episodes = [data.Episode(name, "x", 5, {}, np.zeros((9, 8, 8, 3), np.uint8)) for name in "ab"]
    counts = [9, 4]  # frames with an answer
    expected = data.draw(3, 17, 8, counts)
    one, first, second = (
        data.FrameSampler(episodes, counts, seed=3, global_batch=8, local_rows=rows)
        for rows in (slice(None), slice(0, 4), slice(4, 8))
    )
    assert one.frames(17) == first.frames(17) + second.frames(17) == expected
    assert len(first.frames(17)) == 4 and first.frames(18) != first.frames(17) == first.frames(17)
    assert one.episode_ids(17) == ["ab"[episode] for episode, _ in expected]
    assert second.episode_ids(17) == one.episode_ids(17)[4:]
    assert all(frame < counts[episode] for step in range(99) for episode, frame in one.frames(step))


def test_random_shift_moves_both_frames_alike():
    torch.manual_seed(0)
    pair, found = torch.rand(40, 2, 3, 8, 8), set()
    for before, after in zip(pair, data.random_shift(pair, 0.25), strict=True):
        padded = np.pad(before.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode="edge")
        (fit,) = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if np.array_equal(padded[:, :, y : y + 8, x : x + 8], after.numpy())
        ]
        found.add(fit)
    assert {y for y, _ in found} == {x for _, x in found} == set(range(5))


def test_processes_shift_their_rows_as_one_process_would():
    pictures = torch.rand(8, 3, 8, 8)
    torch.manual_seed(0)
    together = data.random_shift(pictures, 0.25)
    for local_rows in (slice(0, 4), slice(4, 8)):
        torch.manual_seed(0)
        shifted = data.random_shift(pictures[local_rows], 0.25, 8, local_rows)
        assert torch.equal(shifted, together[local_rows])


@pytest.mark.parametrize("workers", [1, 3])
def test_stream_keeps_the_order(workers):
    def make(step):
        time.sleep(0.01 * (-step % 3))  # later ones would overtake
        return step

    assert list(data.stream(make, 4, 20, workers)) == list(range(4, 20))


# ---------------------------------------------------------------- labels
def make_labels(kind):
    """Labels of episodes a (5 frames) and b (7)"""
    codes = {"a": np.arange(20).reshape(5, 4) % 8, "b": np.arange(28).reshape(7, 4) % 7}
    if kind == "codes":
        return codes
    return {name: (rows / 7 - 1).astype(np.float32) for name, rows in codes.items()}


@pytest.mark.parametrize("kind, dtype", [("codes", np.int64), ("actions", np.float32)])
def test_labels_come_back_and_others_are_refused(make_dataset, tmp_path, capsys, kind, dtype):
    opened = data.open_dataset(make_dataset({"a": 5, "b": 7}), 8)
    labels, path = make_labels(kind), tmp_path / "new/labels.safetensors"
    meta = {"laq": "x", "window": 0.6, "dataset": opened.fingerprint}
    data.save_labels(path, labels, meta)
    found, kept = data.load_labels(path, opened, opened.episodes[::-1])
    assert kept == meta and [rows.dtype for rows in found] == [dtype] * 2
    assert all(np.array_equal(rows, labels[n]) for rows, n in zip(found, "ba", strict=True))

    def refused(words, mark=opened.fingerprint):
        with pytest.raises(SystemExit) as stop:
            data.load_labels(path, data.Dataset(opened.path, mark, []), opened.episodes)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and words in said and said.count("\n") == 1

    refused("another dataset", mark="0" * 12)
    data.save_labels(path, {**labels, "b": labels["b"][:-1]}, meta)
    refused("episode 'b' has 6 labels, expected 7")
    data.save_labels(path, {"a": labels["a"]}, meta)
    refused("episode 'b' has 0 labels, expected 7")
    data.save_labels(path, labels, {})
    refused("no labels there")
    path.write_bytes(path.read_bytes()[:50])
    refused("no labels there")
    path.unlink()
    refused("no labels there (quantize.py label makes latent actions, ")


@pytest.mark.parametrize("kind, dtype", [("codes", np.uint16), ("actions", np.float32)])
def test_label_files_hold_uint16_codes_or_float32_actions(tmp_path, kind, dtype):
    labels, meta = make_labels(kind), {"dataset": "0" * 12, "window": 0.6}
    data.save_labels(tmp_path / "saved", labels, meta)
    expected = {name: rows.astype(dtype) for name, rows in labels.items()}
    save_file(expected, tmp_path / "expected", {"meta": json.dumps(meta)})
    assert (tmp_path / "saved").read_bytes() == (tmp_path / "expected").read_bytes()


# ---------------------------------------------------------------- image codes
def test_image_codes_need_the_official_room(tmp_path):
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    script = (
        "import data, torch; data.open_vqgan('lwm', 'init_from', torch.device('cpu'), "
        "{'patch_size': 16, 'vision_vocab': VOCABULARY})"
    )
    for vocabulary, code in ((0, 0), (8448, 2)):
        done = subprocess.run(
            [sys.executable, "-c", script.replace("VOCABULARY", str(vocabulary))],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stderr
        assert done.stderr.count("\n") == (code > 0) == ("folder official/" in done.stderr)


# ---------------------------------------------------------------- action bins
@pytest.mark.parametrize(
    "values, edges, middles",
    [
        (range(9), [0, 2, 4, 6, 8], [1, 3, 5, 7]),
        ([0, 0, 0, 0, 1, 2, 3, 4], [0, 0.5, 2.25, 4], [0.25, 1.375, 3.125]),  # ties: an edge fewer
        ([7] * 5, [7], [7]),  # a constant column keeps its value
    ],
)
def test_bins_are_quantiles(values, edges, middles):
    found = data.fit_bins(np.array(values, np.float32)[:, None], bins=4)
    every = np.arange(len(middles))[:, None]
    assert found[0].tolist() == edges and data.from_bins(every, found)[:, 0].tolist() == middles
    assert np.array_equal(data.to_bins(data.from_bins(every, found), found), every)
    assert data.from_bins(np.array([[99]]), found).item() == middles[-1]


def test_values_fall_into_the_bin_to_their_left():
    gripper = data.fit_bins(np.array([[0], [1], [1]]), 256, "0")[0]
    assert gripper.tolist() == [-0.5, 0.5, 1.5]
    edges = [np.array([0.0, 2, 4, 6, 8]), np.array([7.0]), gripper]
    rows = np.array([[-5, 3, 0], [0, 7, 0.4], [1.99, 9, 0.5], [2, 7, 1], [8, 7, 9]], np.float32)
    assert data.to_bins(rows, edges).tolist() == [
        [0, 0, 0],
        [0, 0, 0],
        [0, 0, 1],
        [1, 0, 1],
        [3, 0, 1],
    ]
    assert data.from_bins(data.to_bins(rows, edges), edges)[:, 2].tolist() == [0, 0, 1, 1, 1]


def test_quantile_edges_equal_those_of_pandas():
    """Edges recorded from pandas.qcut(x, 256, retbins=True, duplicates="drop")"""
    recorded = json.loads((Path(__file__).parent / "golden/qcut.json").read_text())
    for case in recorded:
        edges = data.quantile_edges(np.array(case["values"]), case["bins"])
        np.testing.assert_allclose(edges, case["edges"], rtol=0, atol=1e-12)


def test_reading_all_windows_keeps_no_frame_in_memory(make_dataset):
    """40 MB of pictures are read; the process grows by no more than the allocator keeps, 10 MB"""
    found = data.open_dataset(make_dataset({f"e{i}": 80 for i in range(40)}, size=64), 64).episodes

    def held():
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    rows = [(e, t) for e in range(40) for t in range(80)]
    data.to_float(data.frame_pairs(found, rows[:16], 0.6))
    before = held()
    for at in range(0, len(rows), 16):
        data.to_float(data.frame_pairs(found, rows[at : at + 16], 0.6))
    assert held() - before < 20_000  # kB


# ---------------------------------------------------------------- dimensions of few values
@pytest.mark.parametrize("binary", ["", "1"])
@pytest.mark.parametrize(
    "values",
    [
        (-1, 1),
        (0, 0.08),
        (0, 255),
        (0, 1),
        (-1, 0, 1),
        (0, 0.5, 1),
        (0, 1, 10, 11),
        (3,),
        tuple(range(16)),
    ],
)
def test_dimension_of_few_values_decodes_exactly(values, binary):
    rng = np.random.default_rng(0)
    rows = np.stack([rng.normal(size=400), rng.choice(values, 400)], 1).astype(np.float32)
    edges = [
        np.array(e)
        for e in json.loads(json.dumps([e.tolist() for e in data.fit_bins(rows, 256, binary)]))
    ]  # as a checkpoint keeps them
    bins = data.to_bins(rows, edges)
    assert set(bins[:, 1]) == set(range(len(values)))  # one bin for each value
    assert np.array_equal(data.from_bins(bins, edges)[:, 1].astype(np.float32), rows[:, 1])
    near = data.to_bins(np.float32([[0, values[0] - 9], [0, values[-1] + 9]]), edges)[:, 1]
    assert near.tolist() == [0, len(values) - 1]  # what lies outside falls to the nearest value


def test_description_counts_values_that_share_a_bin():
    rng = np.random.default_rng(0)
    rows = np.stack(
        [
            rng.normal(size=1000),
            np.full(1000, 2),
            rng.choice([0, 1], 1000),
            np.where(rng.random(1000) < 0.9, 0, rng.normal(size=1000)),
        ],
        1,
    )
    edges = data.fit_bins(rows)
    count, lost = (
        len(np.unique(rows[:, 3])),
        np.abs(data.from_bins(data.to_bins(rows, edges), edges) - rows).mean(0),
    )
    assert data.describe_bins(edges, rows) == (
        f"bins per dimension: 256 for 1000 values (off by {lost[0]:.2g} on average), 1 (always 2), "
        f"2 (one per value), {len(edges[3]) - 1} for {count} values "
        f"(off by {lost[3]:.2g} on average)"
    )


def test_binary_dimensions(capsys):
    smooth = np.linspace(0, 1, 50)[:, None]
    assert data.fit_bins(smooth, binary="0")[0].tolist() == [-0.5, 0.5, 1.5]  # official
    assert data.fit_bins(smooth[:1], binary="0")[0].tolist() == [-0.5, 0.5, 1.5]  # never closed
    with pytest.raises(SystemExit):
        data.fit_bins(3 * smooth, binary="0")
    assert "dimension 0 has 50 values from 0 to 3" in capsys.readouterr().err
    noise = 0.001 * np.random.default_rng(0).normal(size=(80, 1))
    (edges,) = data.fit_bins(np.float32([-1, 1] * 40)[:, None] + noise, binary="0")
    assert np.allclose(edges, [-1, -1, 1], atol=0.001) and edges[0] == edges[1]


def test_bins_of_other_values_are_refused(capsys):
    gripper = data.fit_bins(np.float32([[0], [1]] * 20))
    data.refuse_other_values(gripper, np.float32([[1], [0]]), "x")
    move = np.random.default_rng(0).normal(size=(500, 1))
    edges = data.fit_bins(move)
    data.refuse_other_values(edges, 1.5 * move[:50], "x")
    data.refuse_other_values(edges, 30 * move[:50], "x", guessed=True)
    for bins, rows in (
        (gripper, np.float32([[1], [-1]])),
        (gripper, np.float32([[0], [255]])),
        (edges, 30 * move[:50]),
        (edges, 0.0001 * move[:50]),
        (data.fit_bins(0 * move), move),
    ):
        with pytest.raises(SystemExit):
            data.refuse_other_values(bins, rows, "--init_from x")
        assert "--init_from x: its bins were made for other values" in capsys.readouterr().err


def test_rounding_adds_no_values(capsys):
    gripper = np.where(np.arange(99) % 2, 0, 1 - (np.arange(99) % 8 == 2) * 6e-8)[:, None]
    (edges,) = data.fit_bins(gripper.astype(np.float32))
    assert edges.tolist() == [0, 0, 1]
    dense = np.linspace(0.9, 1, 200_001)[:, None]  # neighbors are as near to each other as these
    assert len(data.fit_bins(dense)[0]) == 257
