"""Films, pictures and the packed cache: what real files of other people do."""

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, make_film
from PIL import Image

import data
import video
from official.image_codes import add_codes

RAMP = np.tile(np.arange(0, 256, 8, dtype=np.uint8)[:, None], (1, 32))  # [32, 32]


@pytest.fixture
def films(tmp_path, monkeypatch):
    """films({"a": "videos/a.mp4"}) -> a dataset of these videos, which tmp_path holds already"""
    monkeypatch.setenv("LAPA_CACHE", str(tmp_path / "cache"))

    def make(videos, **fields):
        rows = [
            {"id": name, "instruction": "push it", "video": path, **fields}
            for name, path in videos.items()
        ]
        (tmp_path / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path

    return make


def moving_dot(count):
    """`count` frames [48, 64, 3] in which a dot goes to the right, 2 pixels per frame"""
    frames = np.full((count, 48, 64, 3), 40, np.uint8)
    for t, frame in enumerate(frames):
        frame[20:28, 2 * t : 2 * t + 8] = 230
    return list(frames)


def dot_place(frames):
    """Where the dot is in each frame [T, 64, 64, 3]: its middle column"""
    columns = (frames[:, :, :, 0].max(1) > 130) * np.arange(64)
    return [row[row > 0].mean() for row in columns]


def refused(folder, capsys, **options):
    with pytest.raises(SystemExit) as stop:
        data.open_dataset(folder, 64, **options)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("error:") == 1
    return said


# ---------------------------------------------------------------- how many files are open
OPEN_MANY = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
import data, numpy as np
dataset = data.open_dataset(sys.argv[1], int(sys.argv[2]))
descriptors = "/proc/self/fd"
print(len(dataset.episodes), len(os.listdir(descriptors)) if os.path.isdir(descriptors) else 0)
print([int(e.frames.sum()) for e in dataset.episodes])
"""


@pytest.mark.parametrize("size", [8, 4])  # of the videos themselves, and another
def test_episodes_hold_no_file_open(make_dataset, size):
    folder = make_dataset({f"e{i}": 3 for i in range(200)})
    done = subprocess.run(
        [sys.executable, "-c", OPEN_MANY, folder, str(size)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    count, descriptors = map(int, done.stdout.splitlines()[0].split())
    assert count == 200 and descriptors < 20
    e = data.open_dataset(folder, size).episodes[7]
    expected = np.load(folder / "videos/e7.npy")
    assert np.array_equal(e.frames, [video.resize(frame, size) for frame in expected])


def test_image_codes_hold_no_file_open(make_dataset, tmp_path, monkeypatch):
    class Tokenizer:
        config = type("Config", (), {"image_size": 8, "multipliers": (1, 2, 2)})
        mark = "0123456789ab"

        def encode(self, images):
            return (images.mean((1, 2, 3)) * 100 + 200).long()[:, None].expand(-1, 4)

    dataset = data.open_dataset(make_dataset({f"e{i}": 3 for i in range(30)}), 8)

    class OneProcess:
        rank, world, main, device = 0, 1, True, torch.device("cpu")

        def barrier(self):
            pass

    alone = OneProcess()
    add_codes(dataset, dataset.episodes, Tokenizer(), alone, frames_in_memory=20)
    files = list((tmp_path / "cache").glob("codes_*/*"))
    assert sorted(f.suffix for f in files) == [".bin", ".jsonl"]
    again = data.open_dataset(dataset.path, 8)
    monkeypatch.setattr(Tokenizer, "encode", None)  # nothing is left to be made
    add_codes(again, again.episodes, Tokenizer(), alone)
    for e, f in zip(dataset.episodes, again.episodes, strict=True):
        mean = data.to_float(np.array(e.frames)).mean((1, 2, 3)) * 2 - 1
        assert np.array_equal(e.codes[:, 0], (mean * 100 + 200).long()) and e.codes.shape == (3, 4)
        assert np.array_equal(e.codes, f.codes) and e.codes.dtype == np.uint16


COUNT_FILMS = """
import atexit, sys, av
opened, real = [], av.open
def count(*args, **kw):
    opened.append(args[0])
    return real(*args, **kw)
av.open = count
import data
data.open_dataset(sys.argv[1], 16)
print(len(opened))
"""


def test_two_processes_share_the_work_of_decoding(films, tmp_path):
    for i in range(6):
        make_film(tmp_path / f"{i}.mp4", moving_dot(20))
    folder = films({f"e{i}": f"{i}.mp4" for i in range(6)})
    both = [
        subprocess.Popen(
            [sys.executable, "-c", COUNT_FILMS, folder], cwd=ROOT, text=True, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    assert sum(int(process.communicate()[0]) for process in both) == 6


# ---------------------------------------------------------------- rates and time stamps
@pytest.mark.parametrize(
    "name, rate", [("cup 60 fps.mp4", 10), ("240 fps.mkv", 12), ("a.mp4", 1000)]
)
def test_rate_is_that_of_the_pictures(films, tmp_path, name, rate):
    make_film(tmp_path / name, moving_dot(10), rate=rate)
    (e,) = data.open_dataset(films({"a": name}), 64).episodes
    assert e.fps == rate and len(e.frames) == 10


def test_film_at_another_rate_than_its_own_is_reported(films, tmp_path, capsys):
    make_film(tmp_path / "a.mp4", moving_dot(10), rate=60)
    for fps, words in ((15, "'a' (15 frames per second, 60 in its file)"), (60, ""), (59.94, "")):
        (e,) = data.open_dataset(films({"a": "a.mp4"}, fps=fps), 64).episodes
        assert e.fps == fps and len(e.frames) == 10
        said = capsys.readouterr().out
        assert words in said if words else not said


def test_film_of_uneven_times_is_resampled(films, tmp_path, capsys):
    times = [0, 100, 200, 300, 400, 500, 1000, 1500]  # ms: 10 per second, then 2
    make_film(tmp_path / "a.mp4", moving_dot(8), times=times)
    (e,) = data.open_dataset(films({"a": "a.mp4"}), 64).episodes
    said = capsys.readouterr().out
    assert e.fps == 10 and len(e.frames) == 16
    shown = [0, 1, 2, 3, 4, 5, 5, 5, 5, 5, 6, 6, 6, 6, 6, 7]  # what a player shows each 0.1 s
    assert np.abs(np.array(dot_place(e.frames)) - [2 * t + 3.5 for t in shown]).max() < 1
    assert "'a' (0.1 to 0.5 s apart, now 10 per second)" in said
    (e,) = data.open_dataset(films({"a": "a.mp4"}, fps=2), 64).episodes  # the rate it shall have
    assert e.fps == 2 and len(e.frames) == 4
    assert np.abs(np.array(dot_place(e.frames)) - [3.5, 13.5, 15.5, 17.5]).max() < 1


def test_actions_and_frames_of_an_uneven_film_are_refused(films, tmp_path, capsys):
    make_film(tmp_path / "a.mp4", moving_dot(6), times=[0, 100, 200, 300, 800, 1300])
    np.save(tmp_path / "a.npy", np.zeros((5, 2), np.float32))
    said = refused(films({"a": "a.mp4"}, actions="a.npy", frames=6), capsys)
    assert said.count("its 6 pictures come 0.1 to 0.5 s apart and were resampled to 10") == 2


@pytest.mark.parametrize("jitter", [0, 10])  # ms, of 100
def test_film_with_a_little_jitter_is_not_resampled(films, tmp_path, jitter):
    times = [100 * t + jitter * (t % 3 - 1) for t in range(1, 21)]
    make_film(tmp_path / "a.mp4", moving_dot(20), times=times)
    (e,) = data.open_dataset(films({"a": "a.mp4"}), 64).episodes
    assert len(e.frames) == 20 and e.fps == pytest.approx(10, rel=0.02)


@pytest.mark.parametrize(
    "kind, codec, pixels", [("h264", "libx264", "yuv420p"), ("mjpeg", "mjpeg", "yuvj420p")]
)
def test_film_without_times_needs_fps(films, tmp_path, capsys, kind, codec, pixels):
    make_film(tmp_path / f"a.{kind}", moving_dot(10), codec=codec, pixels=pixels)
    said = refused(films({"a": f"a.{kind}"}), capsys)
    assert "field fps" in said and "the video file does not state it" in said
    (e,) = data.open_dataset(films({"a": f"a.{kind}"}, fps=7), 64).episodes
    assert e.fps == 7 and len(e.frames) == 10


@pytest.mark.parametrize(
    "times, rate, shown",
    [
        ([0, 100, 200, 200, 300, 400], 10, [0, 1, 3, 4, 5]),  # the later of two at one time
        ([0, 100, 200, 300, 400, 400], 10, [0, 1, 2, 3, 5]),
        ([33 * t for t in range(30) if t != 10], 30.303, [*range(10), 9, *range(10, 29)]),
    ],
)
def test_resampled_film_shows_the_picture_on_the_screen(times, rate, shown):
    timing = video.Timing(pictures=[t / 1000 for t in times])
    order, facts = video.regular_frames(timing, None)
    assert order.tolist() == shown and facts["fps"] == rate


def test_times_that_run_backwards_or_would_fill_the_disk_are_refused():
    with pytest.raises(ValueError, match="backwards at picture 4"):
        video.Timing(pictures=[0.0, 0.1, 0.2, 0.1]).times()
    pause = video.Timing(pictures=[0.0, 0.1, 0.2, 3600.0])
    with pytest.raises(ValueError, match="0.1 to 3.6e.03 s apart: set fps"):
        video.regular_frames(pause, None)
    assert len(video.regular_frames(pause, 5)[0]) == 18001
    with pytest.raises(ValueError, match="too many frames"):
        video.regular_frames(pause, 1e12)


def test_actions_of_an_uneven_film_are_refused_even_if_their_number_fits(films, tmp_path, capsys):
    times = [0, 100, 200, 300, 400, 500, 530, 560, 700, 850, 1000]
    make_film(tmp_path / "a.mp4", moving_dot(11), times=times)
    np.save(tmp_path / "a.npy", np.zeros((11, 2), np.float32))
    said = refused(films({"a": "a.mp4"}, actions="a.npy"), capsys)
    assert "actions and captions belong to individual pictures (its 11 pictures come" in said


# ---------------------------------------------------------------- which stream, which damage
def two_streams(path, first, second):
    """A film of two video streams, each (frames, disposition or None)"""
    import av

    with av.open(str(path), "w") as container:
        streams = []
        for frames, disposition in (first, second):
            stream = container.add_stream("libx264", rate=10)
            stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
            stream.disposition = disposition
            streams.append(stream)
        for stream, (frames, _) in zip(streams, (first, second), strict=True):
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))


@pytest.mark.parametrize("flag", ["attached_pic", "timed_thumbnails", "none"])
def test_film_is_the_stream_that_a_player_shows(films, tmp_path, flag):
    from av.stream import Disposition

    aside = Disposition(0) if flag == "none" else Disposition[flag]
    cover = [np.zeros((96, 128, 3), np.uint8)] * (1 if flag == "attached_pic" else 3)
    two_streams(tmp_path / "a.mkv", (cover, aside), (moving_dot(12), Disposition.default))
    (e,) = data.open_dataset(films({"a": "a.mkv"}), 64).episodes
    assert len(e.frames) == 12 and dot_place(e.frames)[3] == pytest.approx(9.5, abs=1)


def test_damaged_sound_does_not_matter(films, tmp_path):
    import av

    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        sound = container.add_stream("mp3", rate=44100)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for frame in moving_dot(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        noise = np.random.default_rng(0).integers(-9000, 9000, (1, 44100), np.int16)
        for at in range(0, 44100, 1152):
            block = av.AudioFrame.from_ndarray(noise[:, at : at + 1152], "s16", "mono")
            block.sample_rate = 44100
            container.mux(sound.encode(block))
        container.mux(stream.encode(None))
        container.mux(sound.encode(None))
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        places = [(p.pos, p.size) for p in container.demux(audio=0) if p.size]
    for at, size in places:  # a packet's place is that of its block, whose header is kept
        content[at + 16 : at + size] = b"\xa5" * max(0, size - 16)
    path.write_bytes(content)
    (e,) = data.open_dataset(films({"a": "a.mkv"}), 64).episodes
    assert len(e.frames) == 20


@pytest.mark.parametrize(
    "kind, damage",
    [
        *((kind, "cut") for kind in ("mp4", "mkv", "webm", "avi", "ts")),
        *((kind, "flipped") for kind in ("mp4", "mkv", "avi", "ts")),  # VP8 decodes any bits
    ],
)
def test_damaged_film_is_one_defect(films, tmp_path, capsys, kind, damage):
    codec = "libvpx" if kind == "webm" else "libx264"
    noise = np.random.default_rng(0).integers(0, 255, (30, 96, 128, 3), np.uint8)
    path = tmp_path / f"a.{kind}"
    make_film(path, list(noise), codec=codec, rate=10)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) * 7 // 10]
    for at in range(len(content) // 3, len(content) // 2, 97) if damage == "flipped" else ():
        content[at] ^= 0xFF
    path.write_bytes(content)
    said = refused(films({"a": path.name}), capsys)  # no rate is named, and none is missed
    assert "'a': field video: " in said and "field fps" not in said


@pytest.mark.parametrize("damage", ["block header", "checksum"])
def test_pictures_that_ffmpeg_would_skip_or_patch_up_are_defects(films, tmp_path, capsys, damage):
    path = tmp_path / "a.mkv"
    noise = np.random.default_rng(0).integers(0, 255, (20, 48, 64, 3), np.uint8)
    make_film(path, list(noise), rate=10, codec="ffv1" if damage == "checksum" else "libx264")
    content = bytearray(path.read_bytes())
    import av

    with av.open(str(path)) as container:
        at, size = [(p.pos, p.size) for p in container.demux(video=0) if p.size][8]
    if damage == "checksum":
        content[at + size // 2] ^= 0xFF
    else:
        assert content[at - 3] == 0xA3  # a SimpleBlock's id, then its length
        content[at - 3 : at + 8] = b"\xff" * 11
    path.write_bytes(content)
    assert "field video: 'a.mkv' cannot be read: " in refused(films({"a": "a.mkv"}), capsys)


def test_second_track_of_an_unknown_codec_does_not_matter(films, tmp_path, capsys):
    from av.stream import Disposition

    frames = moving_dot(6)
    two_streams(tmp_path / "a.mp4", (frames, Disposition.default), (frames, Disposition(0)))
    content = (tmp_path / "a.mp4").read_bytes()
    first, last = content.index(b"avc1\0"), content.rindex(b"avc1\0")
    (tmp_path / "b.mp4").write_bytes(content[:last] + b"zzzz" + content[last + 4 :])
    assert len(data.open_dataset(films({"b": "b.mp4"}), 64).episodes[0].frames) == 6
    content = content.replace(b"avc1\0", b"zzzz\0")
    (tmp_path / "c.mp4").write_bytes(content)
    assert first < last and "no decoder for its codec" in refused(films({"c": "c.mp4"}), capsys)


@pytest.mark.parametrize(
    "name", ["12:30:05.mp4", "-x.mp4", "a%03d.mp4", "öffne 打开.mp4", "a'b&(c).mp4"]
)
def test_file_names_with_a_meaning_for_ffmpeg(films, tmp_path, name):
    (tmp_path / "videos").mkdir()
    make_film(tmp_path / "videos" / name, moving_dot(5))
    (e,) = data.open_dataset(films({"a": f"videos/{name}"}), 64).episodes
    assert len(e.frames) == 5


@pytest.mark.parametrize("turn", range(8))
def test_film_is_turned_by_its_display_matrix(films, tmp_path, turn):
    corners = np.zeros((48, 64, 3), np.uint8)
    corners[:24, :32], corners[:24, 32:], corners[24:, :32] = 60, 120, 180
    make_film(tmp_path / "a.mp4", [corners] * 3)
    mirror, quarter = turn // 4, turn % 4
    a, b, c, d = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)][quarter]
    if mirror:  # left and right change places first
        a, b = -a, -b
    content = (tmp_path / "a.mp4").read_bytes()
    at = content.index(b"tkhd") + 4 + 40  # version 0: the matrix follows 40 bytes
    words = np.frombuffer(content, ">i4", 9, at).copy()
    assert words.tolist() == [1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30]
    words[[0, 1, 3, 4]] = np.array([a, b, c, d]) << 16
    (tmp_path / "a.mp4").write_bytes(content[:at] + words.tobytes() + content[at + 36 :])
    (e,) = data.open_dataset(films({"a": "a.mp4"}), 64).episodes
    expected = np.rot90(corners[:, ::-1] if mirror else corners, -quarter)  # clockwise
    gap = e.frames[0].astype(int) - video.resize(np.ascontiguousarray(expected), 64)
    assert np.abs(gap[4:28, 4:28]).max() < 12 and np.abs(gap[36:60, 36:60]).max() < 12


# ---------------------------------------------------------------- pictures
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_picture_is_turned_by_its_exif_orientation(tmp_path, orientation, kind):
    upright = np.zeros((40, 60, 3), np.uint8)
    upright[:20, :30], upright[:20, 30:], upright[20:, :30] = 60, 120, 180
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright),
        7: np.rot90(upright[::-1], 1),
        8: np.rot90(upright, -1),
    }[orientation]
    tags = Image.Exif()
    tags[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(
        tmp_path / f"a.{kind}", exif=tags, quality=95
    )
    found = video.read_picture(tmp_path / f"a.{kind}")
    assert found.shape == upright.shape and np.abs(found.astype(int) - upright)[::8, ::8].max() < 12


def test_predict_and_folders_read_pictures_alike(films, tmp_path, monkeypatch):
    import evaluate

    (tmp_path / "a").mkdir()
    tags = Image.Exif()
    tags[0x0112] = 6
    for i in range(2):
        Image.fromarray(RAMP).save(tmp_path / f"a/{i}.png", exif=tags)
    (e,) = data.open_dataset(films({"a": "a"}, fps=5), 32).episodes
    seen = []

    class Policy:
        kind, edges = 0, [1]

        def __call__(self, images, texts):
            seen.extend(images)
            return np.zeros((1, 2))

    monkeypatch.setattr(evaluate, "Policy", lambda *args: Policy())
    evaluate.predict(
        evaluate.PredictConfig(policy="", image=str(tmp_path / "a/0.png"), instruction="x")
    )
    assert np.array_equal(seen[0], e.frames[0])
    assert np.array_equal(seen[0][..., 0], np.rot90(RAMP, -1))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Image.fromarray(RAMP),
        lambda: Image.fromarray(RAMP.astype(np.uint16) * 257),
        lambda: Image.merge("LA", [Image.fromarray(RAMP), Image.new("L", (32, 32), 255)]),
    ],
    ids=["8 bits", "16 bits", "with alpha"],
)
def test_gray_pictures_keep_their_shades(tmp_path, make):
    make().save(tmp_path / "a.png")
    assert np.array_equal(video.read_picture(tmp_path / "a.png"), RAMP[..., None].repeat(3, 2))


def test_hidden_files_of_mac_archives_are_not_pictures(films, tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (80 * i,) * 3).save(tmp_path / f"a/{i}.png")
        (tmp_path / f"a/._{i}.png").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")
    (e,) = data.open_dataset(films({"a": "a"}, fps=5), 8).episodes
    assert e.frames[:, 0, 0, 0].tolist() == [0, 80, 160]


def test_broken_picture_is_named(films, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "a/0.jpg")
    (tmp_path / "a/1.jpg").write_bytes((tmp_path / "a/0.jpg").read_bytes()[:300])
    assert "1.jpg" in refused(films({"a": "a"}, fps=5), capsys)


# ---------------------------------------------------------------- long videos, machine faults
def test_long_video_is_decoded_in_bounded_memory(make_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(video, "SPOOL", 1 << 16)  # so that this one is long
    folder = make_dataset({"a": 500}, size=16)
    most = []
    write = video.write_all
    monkeypatch.setattr(
        video, "write_all", lambda file, block: most.append(len(block)) or write(file, block)
    )
    (e,) = data.open_dataset(folder, 32).episodes
    assert max(most) <= 1 << 20 and sum(most) == 500 * 32 * 32 * 3
    expected = [video.resize(frame, 32) for frame in np.load(folder / "videos/a.npy")]
    assert np.array_equal(e.frames, expected)


@pytest.mark.parametrize(
    "number, words", [(errno.ENOSPC, "No space left"), (errno.EROFS, "Read-only")]
)
def test_unwritable_cache_is_one_line(make_dataset, tmp_path, monkeypatch, capsys, number, words):
    def broken(file, block):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(video, "write_all", broken)
    said = refused(make_dataset({f"e{i}": 5 for i in range(6)}), capsys)
    assert words in said and "LAPA_CACHE" in said and str(tmp_path / "cache") in said
    assert said.count("\n") == 1 and "episode" not in said


def test_too_many_open_files_is_one_line(make_dataset, monkeypatch, capsys):
    def broken(path, *args, **named):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(video.np, "load", broken)
    said = refused(make_dataset({f"e{i}": 5 for i in range(6)}), capsys)
    assert "Too many open files" in said and said.count("\n") == 1


def test_missing_library_is_one_line(films, tmp_path, monkeypatch, capsys):
    for i in range(3):
        make_film(tmp_path / f"{i}.mp4", moving_dot(3))
    monkeypatch.setitem(sys.modules, "av", None)
    said = refused(films({f"e{i}": f"{i}.mp4" for i in range(3)}), capsys)
    assert "pip install av" in said and said.count("\n") == 1


def test_videos_decoded_before_a_fault_are_kept(make_dataset, monkeypatch, capsys):
    folder, write = make_dataset({f"e{i}": 5 for i in range(6)}), video.write_all
    written = []

    def until_full(file, block):
        if len(written) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(block)
        return write(file, block)

    monkeypatch.setattr(video, "write_all", until_full)
    refused(folder, capsys)
    monkeypatch.setattr(
        video, "write_all", lambda file, block: written.append(block) or write(file, block)
    )
    assert len(data.open_dataset(folder, 64).episodes) == 6 and len(written) == 6
