"""Videos on disk -> frames at the model's size, decoded once into a packed cache.

A video is a film (mp4, webm, ..: whatever FFmpeg's libraries read, through PyAV), a folder of
pictures, or a .npy of uint8 [T, H, W, 3].  The frames of all episodes of a dataset are stored in
a single file in $LAPA_CACHE (default .cache), one after another, so an open dataset holds one file
and one memory mapping, however many episodes it has."""

import fcntl
import hashlib
import json
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import SpooledTemporaryFile
from threading import Event, Lock
from types import ModuleType
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from common import MACHINE_FAULTS, atomically

if TYPE_CHECKING:  # PyAV is optional, see load_av
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

HEADERS = Lock()  # CPython 3.11 parses .npy headers wrongly when several threads do it at once
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
NO_TIMESTAMPS = 0x80  # FFmpeg's mark of formats that only count pictures (AVFMT_NOTIMESTAMPS)
SPOOL = 16 << 20  # bytes of one video that are held in memory before they go to disk
SMALL = 1 << 20  # bytes of a .npy that is read so fast that a second thread would not help
COMMIT = 256 << 20  # bytes after which the index of a cache file is updated


class MachineFault(Exception):
    """Something is wrong with this machine, not with the data: a full disk, say"""


@contextmanager
def cache_faults(folder: Path) -> Iterator[None]:
    """Inside it, an OSError is a fault of the cache"""
    try:
        yield
    except OSError as error:
        raise MachineFault(
            f"the frame cache {folder}: {error.strerror or error} (set LAPA_CACHE to move it)"
        ) from None


def refuse_machine_faults(error: Exception, path: Path) -> None:
    """Raise MachineFault where reading a file failed for want of descriptors or memory"""
    if isinstance(error, OSError) and error.errno in MACHINE_FAULTS:
        raise MachineFault(f"{error.filename or path}: {os.strerror(error.errno)}") from None
    if isinstance(error, MemoryError):
        raise MachineFault(f"{path}: out of memory") from None


def write_all(file: BinaryIO, block: bytes) -> int:
    """Write a block to an unbuffered file, which may take only part of it at once -> bytes"""
    rest = memoryview(block)
    while rest:
        rest = rest[file.write(rest) :]
    return len(block)


# ------------------------------------------------------------------------ the packed cache
class Pack:
    """Arrays with rows of one shape and dtype, one after another in one file.

    `PATH.bin` holds the rows and `PATH.jsonl` is its index: one JSON object per array with its key,
    first row, number of rows, and whatever else is known about it.  An array exists once its index
    line is complete.  Rows are written before that line, so a process that is killed leaves at most
    rows that nothing points to, and the next writer overwrites them.  Writers take turns by a lock
    on the file, which the kernel releases when a process dies; readers need no lock."""

    def __init__(self, path: Path, row_shape: tuple[int, ...], dtype: str) -> None:
        self.folder = path.parent
        self.rows_path = path.with_name(path.name + ".bin")
        self.index_path = path.with_name(path.name + ".jsonl")
        self.row_shape, self.dtype = row_shape, np.dtype(dtype)
        self.row_bytes = int(np.prod(row_shape)) * self.dtype.itemsize
        self.entries: dict[str, dict] = {}
        self.mapping: np.ndarray | None = None  # of all rows on disk, made when first asked for
        self.appending = Lock()  # among the threads of this process
        self.read_index()

    def read_index(self) -> bool:
        """Read the index anew; False if it ends in a torn line or points past the rows"""
        self.entries, self.mapping, whole = {}, None, True
        with cache_faults(self.folder):
            text = self.index_path.read_bytes() if self.index_path.is_file() else b""
            size = self.rows_path.stat().st_size if self.rows_path.is_file() else 0
        for line in text.splitlines(keepends=True):
            try:
                entry = json.loads(line)
                inside = (entry["first"] + entry["count"]) * self.row_bytes <= size
            except (ValueError, LookupError, TypeError):
                inside = False
            if inside and line.endswith(b"\n"):
                self.entries[entry["key"]] = entry
            else:
                whole = False
        return whole

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the lock among processes, see what others have added, and append"""
        with cache_faults(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.rows_path, os.O_RDWR | os.O_CREAT, 0o666)
        with open(descriptor, "r+b", buffering=0) as rows_file:  # closing it releases the lock
            self.rows_file = rows_file
            with cache_faults(self.folder):
                self.wait_for_lock()
                if not self.read_index():
                    lines = [json.dumps(entry) + "\n" for entry in self.entries.values()]
                    with atomically(self.index_path) as draft:
                        draft.write_text("".join(lines), encoding="utf-8")
                ends = [entry["first"] + entry["count"] for entry in self.entries.values()]
                self.end = self.committed = max(ends, default=0)  # in rows
                self.rows_file.truncate(self.end * self.row_bytes)
            self.uncommitted: list[dict] = []
            try:
                yield
            finally:
                self.commit()

    def wait_for_lock(self) -> None:
        """Take the file's lock; print a line if another process holds it at the moment"""
        try:
            fcntl.flock(self.rows_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if int(os.environ.get("WORLD_SIZE", 1)) == 1:  # several of torchrun's always wait
                words = f"waiting for another process to fill {self.rows_path}"
                print(words, file=sys.stderr)
            fcntl.flock(self.rows_file, fcntl.LOCK_EX)

    def append(self, key: str, chunks: Iterable[bytes], **facts: object) -> None:
        """Add an array, given as the bytes of its rows in some chunks"""
        with self.appending, cache_faults(self.folder):
            self.rows_file.seek(self.end * self.row_bytes)  # after what a failure may have left
            written = sum(write_all(self.rows_file, chunk) for chunk in chunks)
            entry = {"key": key, "first": self.end, "count": written // self.row_bytes, **facts}
            self.end += entry["count"]
            self.uncommitted.append(entry)
            if (self.end - self.committed) * self.row_bytes > COMMIT:
                self.commit()

    def commit(self) -> None:
        """Bring rows to disk first, then the index lines that point to them"""
        if not self.uncommitted:
            return
        with cache_faults(self.folder):
            os.fsync(self.rows_file.fileno())
            with open(self.index_path, "a", encoding="utf-8") as index:
                index.writelines(json.dumps(entry) + "\n" for entry in self.uncommitted)
        self.entries.update((entry["key"], entry) for entry in self.uncommitted)
        self.uncommitted, self.committed = [], self.end
        self.mapping = None

    def rows(self, key: str) -> np.ndarray:
        """One array, [count, *row_shape], memory-mapped and read-only"""
        entry = self.entries[key]
        if self.mapping is None:
            with cache_faults(self.folder):
                flat = np.memmap(self.rows_path, self.dtype, mode="r")
            whole_rows = len(flat) * self.dtype.itemsize // self.row_bytes
            row_length = self.row_bytes // self.dtype.itemsize
            flat = np.asarray(flat)[: whole_rows * row_length]
            self.mapping = flat.reshape(whole_rows, *self.row_shape)
        return self.mapping[entry["first"] : entry["first"] + entry["count"]]


def cache_file(kind: str, dataset: Path) -> Path:
    """Where the packed cache of a dataset is, without the endings .bin and .jsonl"""
    place = str(dataset.resolve())
    mark = hashlib.sha256(os.fsencode(place)).hexdigest()[:8]
    return Path(os.environ.get("LAPA_CACHE") or ".cache") / kind / f"{Path(place).name}-{mark}"


# ------------------------------------------------------------------------ sources of frames
@dataclass
class Source:
    """One video on disk: how it is read, and a key that changes when its files or `fps` do.

    fps: what the dataset says of a film, or None; matters if its pictures come at uneven times"""

    path: Path
    kind: str  # "film", "folder" or "array"
    fps: float | None
    pictures: list[Path] = field(default_factory=list)  # of a folder
    size: int = 0  # bytes on disk
    key: str = ""


def open_source(path: Path, fps: float | None = None) -> Source:
    """Look at a video without decoding it.  Raises OSError where it is missing."""
    if path.is_dir():
        source = Source(path, "folder", None, pictures_in(path))
    elif path.suffix == ".npy":
        source = Source(path, "array", None)
    else:
        source = Source(path, "film", fps)
    stamps = []
    for part in source.pictures or [path]:
        status = part.stat()
        stamps.append((part.name, status.st_size, status.st_mtime_ns))
    source.size = sum(size for _, size, _ in stamps)
    marks = repr((os.fspath(path), stamps, source.fps))
    source.key = hashlib.sha256(os.fsencode(marks)).hexdigest()[:24]
    return source


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder in natural order: img_2 before img_10.  Hidden files do not count:
    Mac archives hold a `._0.jpg` beside each `0.jpg`."""

    def natural(path: Path) -> list:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]

    with os.scandir(folder) as entries:
        files = [Path(entry.path) for entry in entries if entry.is_file()]
    found = [path for path in files if path.suffix.lower() in PICTURES]
    return sorted((path for path in found if not path.name.startswith(".")), key=natural)


def read_picture(path: Path) -> np.ndarray:
    """A picture file as a viewer shows it, uint8 [H, W, 3]: turned as its EXIF orientation says, 16
    bits per channel scaled down to 8.  Raises OSError or ValueError."""
    with Image.open(path) as picture:
        upright = ImageOps.exif_transpose(picture)
        if upright.mode.startswith(("I", "F")):  # one channel of 16 bits or more
            values = np.asarray(upright)
            if upright.mode.startswith("F") or values.min() < 0 or values.max() > 65535:
                raise ValueError(f"its values do not fit in 16 bits (mode {upright.mode})")
            deep = upright.mode != "I" or picture.format == "PNG" or values.max() > 255
            grey = (values.astype(np.uint32) + 128) // 257 if deep else values  # 65535 -> 255
            grey = grey.astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=2)
        return np.asarray(upright.convert("RGB"))


def frames_of_folder(source: Source) -> Iterator[np.ndarray]:
    for path in source.pictures:
        try:
            frame = read_picture(path)
        except Exception as error:  # Pillow raises several kinds for broken files
            refuse_machine_faults(error, path)
            raise ValueError(f"{path.name}: {reason(error)}") from None
        yield frame


def frames_of_array(source: Source) -> Iterator[np.ndarray]:
    with HEADERS:
        frames = np.load(source.path, mmap_mode="r" if source.size > SMALL else None)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(f"{frames.dtype} {frames.shape}, expected uint8 (T, H, W, 3)")
    yield from frames


# ------------------------------------------------------------------------ films
@dataclass
class Timing:
    """When the pictures of a film are shown: filled while it is decoded"""

    pictures: list[float | None] = field(default_factory=list)  # seconds; None: not in the file
    packets: list[float | None] = field(default_factory=list)  # the same, of its compressed parts
    timed: bool = True  # the format has timestamps
    nominal: float = 0.0  # pictures per second that the file names; 0: none
    promised: int = 0  # pictures that have a packet in the file; 0: unknown

    def times(self) -> np.ndarray | None:
        """Times of all pictures in seconds, in order, or None where the file does not say.  Some
        files (avi) say when each picture is decoded, not when it is shown; with one packet per
        picture that is as good.  Raises ValueError for times that run backward."""
        told = [
            np.array(stamps, float)
            for stamps in (self.pictures, self.packets)
            if len(stamps) == len(self.pictures) and None not in stamps
        ]
        for times in told:
            if (np.diff(times) >= 0).all():
                return times
        if told:
            at = int(np.flatnonzero(np.diff(told[0]) < 0)[0]) + 2
            raise ValueError(f"its time stamps run backwards at picture {at}")
        return None


def load_av() -> ModuleType:
    """PyAV, which only films need"""
    try:
        import av
    except ImportError:
        raise MachineFault("reading films needs PyAV (pip install av)") from None
    av.logging.set_level(av.logging.ERROR)  # what frames_of_film listens to
    return av


def shown_stream(container: "InputContainer") -> "VideoStream":
    """The video stream that a player shows: no cover, no thumbnails; the default one before others,
    then the largest.  Raises ValueError where there is none."""
    av = load_av()
    flags = av.stream.Disposition
    aside = flags.attached_pic | flags.timed_thumbnails | flags.still_image | flags.dependent
    films = [s for s in container.streams.video if not s.disposition & aside]
    streams = [s for s in films if s.codec_context]
    if not streams:
        raise ValueError("no decoder for its codec" if films else "no video stream")

    def rank(stream: "VideoStream") -> tuple[bool, int]:
        size = stream.codec_context.width * stream.codec_context.height
        return bool(stream.disposition & flags.default), size

    return max(streams, key=rank)


def frames_of_film(source: Source, timing: Timing) -> Iterator[np.ndarray]:
    """Decode the pictures of a film, strictly: the first damage to its picture stream raises.

    Damage elsewhere (sound, chapters, a lost second track) does not matter."""
    av = load_av()
    refuse_broken_container(source.path)
    place = b"file:" + os.fsencode(source.path)  # a name like 12:30:05.mp4 is no protocol
    with av.logging.Capture() as errors:
        try:
            container = av.open(os.fsdecode(place))
        except (av.error.InvalidDataError, av.error.EOFError):
            raise ValueError("not a video, or damaged at the start") from None
        with container:
            for packet in packets_of_film(container, timing):
                shown = len(timing.pictures)
                try:
                    frames = packet.decode()
                except av.error.InvalidDataError:
                    raise ValueError(f"damaged after picture {shown}") from None
                # Some decoders only log that they have lost or patched up a picture.
                decoder = packet.stream.codec_context.name
                if any(name == decoder for _, name, _ in errors):
                    raise ValueError(f"damaged after picture {shown}")
                for frame in frames:
                    if frame.is_corrupt:
                        raise ValueError(f"picture {len(timing.pictures) + 1} is damaged")
                    timing.pictures.append(frame.time if timing.timed else None)
                    yield upright(frame.to_ndarray(format="rgb24"), frame)
    if len(timing.pictures) < timing.promised:
        found = len(timing.pictures)
        raise ValueError(f"{timing.promised} pictures expected, {found} found")


def packets_of_film(container: "InputContainer", timing: Timing) -> Iterator["Packet"]:
    """The compressed pictures of the stream that is shown, ready to be decoded"""
    av = load_av()
    stream = shown_stream(container)
    for other in container.streams:
        if other.index != stream.index:
            other.discard = av.stream.Discard.all
    stream.thread_type = "NONE"  # films are decoded side by side
    stream.codec_context.options = {"err_detect": "explode"}
    kind = container.format.name
    made_up = kind == "mjpeg" or kind.endswith("_pipe")  # FFmpeg assumes 25 per second
    timing.timed = not (made_up or container.format.flags & NO_TIMESTAMPS)
    if timing.timed:
        timing.nominal = float(stream.average_rate or stream.guessed_rate or 0)
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise ValueError(f"damaged or cut after picture {len(timing.pictures)}")
        if packet.size:  # the last one is empty: it asks the decoder for what it has left
            known = timing.timed and packet.dts is not None
            timing.packets.append(float(packet.dts * packet.time_base) if known else None)
            if kind.startswith("mov") and not packet.is_discard:  # unless an edit list cuts it
                timing.promised += 1
        yield packet


def upright(pixels: np.ndarray, frame: "VideoFrame") -> np.ndarray:
    """Rotate and mirror a picture [H, W, 3] as its film's display matrix says"""
    side = frame.side_data.get("DISPLAYMATRIX")
    if side is None:
        return pixels
    matrix = np.frombuffer(bytes(side), np.int32).reshape(3, 3)[:2, :2]
    (a, b), (c, d) = np.sign(matrix) * (np.abs(matrix) > 1 << 15)  # 16.16 fixed point
    # A source point (x, y) is shown at (a x + c y, b x + d y).
    if a == 0:  # a quarter turn: x and y change places
        pixels = pixels.transpose(1, 0, 2)
        a, d = c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


# Elements allowed in a Matroska file's segment, and in a cluster of pictures and sound
SEGMENT, CLUSTER = 0x18538067, 0x1F43B675
MATROSKA = {
    SEGMENT: {0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1043A770, CLUSTER, 0x1C53BB6B, 0x1941A469}
    | {0x1254C367, 0xEC, 0xBF},
    CLUSTER: {0xE7, 0x5854, 0xA7, 0xAB, 0xA3, 0xA0, 0xAF, 0xEC, 0xBF},
}


def refuse_broken_container(path: Path) -> None:
    """FFmpeg skips what it does not understand between the pictures of mkv, webm and gif, and reads
    files that were cut short, without an error.  Raises ValueError for both."""
    with open(path, "rb") as file:
        start = file.read(4)
        if start == b"\x1a\x45\xdf\xa3":
            file.seek(ebml_number(file) or 0, os.SEEK_CUR)
            walk_matroska(file, None, path.stat().st_size)
        elif start == b"GIF8":
            file.seek(max(0, path.stat().st_size - 16))
            if not file.read().rstrip(b"\0").endswith(b";"):
                raise ValueError("cut short: its end mark is missing")


def ebml_number(file: BinaryIO, marked: bool = False) -> int | None:
    """A number of variable length; None where a length is declared unknown.  marked: an element's
    id, which keeps the bit that tells its length"""
    first = file.read(1)
    if not first or not first[0]:
        raise ValueError(f"damaged or cut short at byte {file.tell()}")
    length = 9 - first[0].bit_length()  # bytes in all
    value = int.from_bytes(first + file.read(length - 1), "big")
    if marked:
        return value
    value -= 1 << (7 * length)
    return None if value == (1 << (7 * length)) - 1 else value


def walk_matroska(file: BinaryIO, parent: int | None, end: int) -> None:
    """Check that the elements up to byte `end` fill their parent one after another, also those in
    a cluster; stops at an element of unknown length, as live streams have"""
    while file.tell() < end:
        at = file.tell()
        kind, length = ebml_number(file, marked=True), ebml_number(file)
        if parent is None and kind != SEGMENT:
            return  # junk after the film
        if parent in MATROSKA and kind not in MATROSKA[parent]:
            raise ValueError(f"damaged at byte {at}")
        if length is None:
            return
        if file.tell() + length > end:
            raise ValueError(f"cut short: {file.tell() + length - end} bytes are missing")
        if kind in MATROSKA:
            walk_matroska(file, kind, file.tell() + length)
        else:
            file.seek(length, os.SEEK_CUR)


def even_rate(times: np.ndarray, nominal: float) -> float | None:
    """Frames per second of a film whose pictures come at even times, else None.  nominal: what the
    file says.

    Even means: all gaps are above 1/4 and at most 3/2 of the mean gap, and no picture is
    more than one gap off the regular grid.  Rounded stamps and jitter pass, pauses do not."""
    if len(times) < 2:
        return nominal or None
    gap = (times[-1] - times[0]) / (len(times) - 1)
    off_grid = times - times[0] - gap * np.arange(len(times))
    gaps = np.diff(times)
    if gaps.max() > 1.5 * gap or gaps.min() <= 0.25 * gap or np.ptp(off_grid) > gap:
        return None
    return nominal if abs(nominal * gap - 1) < 0.01 else round(1 / float(gap), 3)


def resampling(times: np.ndarray, fps: float | None) -> tuple[np.ndarray, float]:
    """Which picture is on the screen at each tick of a regular clock -> indices, frames per second.

    fps: the clock; None: that of the film's usual gap.  Raises ValueError where that would show the
    same pictures over and over."""
    times, gaps = times - times[0], np.diff(times)
    usual = float(np.median(gaps))
    if fps is None and (usual == 0 or times[-1] / usual > 16 * len(times)):
        raise ValueError(
            f"its pictures come {gaps.min():.3g} to {gaps.max():.3g} s apart: set fps to the "
            "frames per second you want"
        )
    fps = float(fps or round(1 / usual, 3))
    if times[-1] * fps > 1e7:
        raise ValueError(f"{times[-1]:.3g} s at {fps:g} frames per second is too many frames")
    ticks = np.arange(int(times[-1] * fps + 0.01) + 1) / fps
    return np.searchsorted(times, ticks + 0.01 / fps, side="right") - 1, fps


# ------------------------------------------------------------------------ resizing
def resize(frame: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] -> [size, size, 3]: PIL bilinear, antialiased (official LAQ preprocessing)"""
    if frame.shape[:2] == (size, size):
        return frame
    return np.asarray(Image.fromarray(frame).resize((size, size), Image.BILINEAR))


def official_resize(frame: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] -> [size, size, 3]: the longest side to `size`, then to the square, each as
    OpenCV's bilinear resize does, to the bit (official VLA preprocessing; no antialiasing)"""

    def taps(source: int, goal: int) -> tuple[np.ndarray, ...]:
        """Two neighbors of each output pixel, and their weights in units of 1/2048"""
        place = ((np.arange(goal) + 0.5) * (source / goal) - 0.5).astype(np.float32)
        left = np.floor(place).astype(int)
        weight = np.rint(place % 1 * 2048).astype(int)
        return left.clip(0, source - 1), (left + 1).clip(0, source - 1), 2048 - weight, weight

    scale = size / max(frame.shape[:2])
    for height, width in ([max(1, round(n * scale)) for n in frame.shape[:2]], (size, size)):
        a, b, u, v = taps(frame.shape[1], width)
        x = frame[:, a] * u[:, None] + frame[:, b] * v[:, None]
        a, b, u, v = taps(frame.shape[0], height)
        x = ((x[a] >> 4) * u[:, None, None] >> 16) + ((x[b] >> 4) * v[:, None, None] >> 16)
        frame = ((x + 2) >> 2).astype(np.uint8)
    return frame


# ------------------------------------------------------------------------ filling the cache
def fill_cache(pack: Pack, sources: list[Source], resized: Callable, name: str) -> dict[str, str]:
    """Decode what the pack lacks, with all cores -> {key: what is wrong with that video}.

    resized(frame uint8 [H, W, 3], size) -> [size, size, 3]; name: of the dataset, for the bar.
    Several processes may ask for the same: one decodes, the others wait and find it done.  Raises
    MachineFault for what is no fault of a video."""
    missing = {source.key: source for source in sources if source.key not in pack.entries}
    defects: dict[str, str] = {}
    if not missing:
        return defects
    stop = Event()

    def decode(source: Source) -> None:
        try:
            decode_into(pack, source, resized, stop)
        except MachineFault:
            raise
        except Exception as error:  # a decoder may raise anything
            refuse_machine_faults(error, source.path)
            defects[source.key] = reason(error)

    with pack.writing():
        waiting = deque(source for key, source in missing.items() if key not in pack.entries)
        bar = tqdm(
            total=len(waiting), desc=f"frames of {name}", disable=len(waiting) < 2, leave=False
        )

        def decode_waiting() -> None:
            while not stop.is_set():
                try:
                    source = waiting.popleft()
                except IndexError:
                    return
                decode(source)

        # Threads that wait for Python's lock are slower than one: 490 against 330 us per array.
        small = all(s.kind == "array" and s.size < SMALL for s in waiting)
        threads = 1 if small else os.cpu_count() or 1
        with ThreadPoolExecutor(threads) as pool:
            work = [pool.submit(decode_waiting) for _ in range(threads)]
            try:
                while wait(work, timeout=0.5, return_when=FIRST_EXCEPTION).not_done:
                    bar.update(bar.total - len(waiting) - bar.n)
                    for thread in work:
                        if thread.done():
                            thread.result()
            finally:  # also after a machine fault or Ctrl-C: start nothing more
                stop.set()
                bar.close()
        for thread in work:
            thread.result()
    return defects


def reason(error: Exception) -> str:
    """What an exception says, in one line"""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{error}".partition("\n")[0] or type(error).__name__


def decode_into(pack: Pack, source: Source, resized: Callable, stop: Event) -> None:
    """Append the frames of one video to a pack.  A long one waits on disk, not in memory, until it
    is whole.  Gives up when `stop` is set."""
    timing = Timing()
    if source.kind == "film":
        frames = frames_of_film(source, timing)
    elif source.kind == "folder":
        frames = frames_of_folder(source)
    else:
        frames = frames_of_array(source)
    spool = SpooledTemporaryFile(SPOOL, dir=pack.folder)  # noqa: SIM115 (closed below)
    try:
        for frame in frames:
            if stop.is_set():
                return
            pixels = np.ascontiguousarray(resized(frame, pack.row_shape[0]))
            with cache_faults(pack.folder):
                spool.write(pixels)
        if not spool.tell():
            raise ValueError("it has no pictures")
        order, facts = regular_frames(timing, source.fps) if source.kind == "film" else (None, {})
        pack.append(source.key, read_rows(spool, pack.row_bytes, order), **facts)
    finally:
        with cache_faults(pack.folder):
            spool.close()


def regular_frames(timing: Timing, fps: float | None) -> tuple[np.ndarray | None, dict]:
    """How a film becomes frames at even times -> which pictures to take (None: all as they are),
    and what the cache's index remembers: fps (None: the file does not say), pictures, gaps"""
    times = timing.times()
    if times is None:
        return None, {"fps": None}
    rate = even_rate(times, timing.nominal)
    if rate or len(times) < 2:
        return None, {"fps": rate}
    order, rate = resampling(times, fps)
    gaps = np.diff(times)
    low, high = float(gaps.min()), float(gaps.max())
    return order, {"fps": rate, "pictures": len(times), "gaps": [low, high]}


def how_resampled(entry: dict) -> str:
    """What to add to a message where the length of a resampled film does not fit; else nothing"""
    if "gaps" not in entry:
        return ""
    low, high = entry["gaps"]
    return (
        f" (its {entry['pictures']} pictures come {low:.3g} to {high:.3g} s apart and were "
        f"resampled to {entry['fps']:g} per second; a folder of pictures is used as it is)"
    )


def say_about_films(dataset: Path, films: dict[str, tuple[dict, float]]) -> None:
    """A line about films that were resampled, and one about films that are read at a rate
    not their own.  films: of each episode its entry in the cache and its fps"""
    resampled, retimed = [], []
    for name, (entry, fps) in films.items():
        if "gaps" in entry:
            low, high = entry["gaps"]
            resampled.append(f"{name!r} ({low:.3g} to {high:.3g} s apart, now {fps:g} per second)")
        elif abs(fps / (entry.get("fps") or fps) - 1) > 0.05:
            retimed.append(f"{name!r} ({fps:g} frames per second, {entry['fps']:g} in its file)")
    for what, found in (
        ("resampled films with uneven frame times", resampled),
        ("took films at the fps of episodes.jsonl", retimed),
    ):
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            print(f"{dataset}: {what}: {found[0]}{more}")


def read_rows(
    spool: SpooledTemporaryFile, row_bytes: int, order: np.ndarray | None
) -> Iterator[bytes]:
    """The rows of a file, all of them or the ones in `order`, in chunks"""
    if order is not None:
        for row in order:
            spool.seek(int(row) * row_bytes)
            yield spool.read(row_bytes)
        return
    spool.seek(0)
    while chunk := spool.read(1 << 20):
        yield chunk
