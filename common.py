"""What every command shares: refusing bad input, command lines, files and checkpoints."""

import argparse
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from threading import get_ident
from typing import IO, NoReturn, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from tqdm import tqdm

T = TypeVar("T")
MACHINE_FAULTS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # not faults of the file at hand
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
SHARD = 2 << 30  # bytes; a larger checkpoint is split into several weights files


def print_anything() -> None:
    """Text that a terminal cannot show must not end a run: print it escaped"""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


print_anything()


# ------------------------------------------------------------------------ refusing bad input
def fail(message: object) -> NoReturn:
    """Refuse bad input: one clear line and exit code 2"""
    for bar in list(getattr(tqdm, "_instances", ())):  # or they are redrawn below this line
        bar.close()
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def refuse(
    what: str, errors: tuple[type[BaseException], ...] = (ValueError, OSError, TypeError)
) -> Iterator[None]:
    """Inside it, one of these errors becomes one line that begins with `what`"""
    try:
        yield
    except errors as error:
        if isinstance(error, OSError) and error.errno in MACHINE_FAULTS:
            fail(f"{error.filename or what}: {error.strerror}")
        fail(f"{what}: {cause(error)}".partition("\n")[0])


def cause(error: BaseException) -> object:
    """What an error says.  If it hides an error of the operating system (a full disk), what that
    one says; for a checkpoint of several processes, what the first to fail says."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and re.match(r"\d+ requested and \d+ written", str(error)):
        return f"No space left on device ({error})"  # numpy's words for it
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.errno in DISK_FAULTS:
            return inner.strerror
        inner = inner.__cause__ or inner.__context__
    return error


def to_json(value: object, indent: int | None = None) -> str:
    """JSON of plain values; numbers that JSON does not have (NaN, infinity) become null"""

    def finite(value: object) -> object:
        if isinstance(value, dict):
            return {key: finite(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(value), indent=indent, allow_nan=False)


def is_main_process() -> bool:
    """Whether this is the only process, or the first of several that torchrun started"""
    return int(os.environ.get("RANK", 0)) == 0


# ------------------------------------------------------------------------ command line
def option(default: T = dataclasses.MISSING, help: str = "", least: int | None = None) -> T:
    """A dataclass field that is an option of a command, with its help beside it.

    Without a default it is required.  least: the smallest whole number that it takes; if not
    given, 0 if the default is 0, else 1."""
    return dataclasses.field(default=default, metadata={"help": help, "least": least})


def parse_value(kind: type, least: int, text: str) -> bool | str | int | float:
    """One option's text as bool, str, float, or int from `least` on"""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    try:
        value = words[text.lower()] if kind is bool else kind(text)
        if kind in (int, float) and not least <= value < 2**63:
            raise ValueError
        return value
    except (ValueError, KeyError):
        expected = {
            bool: "true or false",
            int: f"a whole number, {least} or more",
            float: "a number, 0 or more",
        }[kind]
        raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}") from None


def parse_options(
    cls: type[T],
    argv: list[str],
    presets: dict[str, dict] | None = None,
    positional: tuple[str, ...] = (),
) -> tuple[T, set[str]]:
    """Command line -> dataclass `cls`, and the set of options that were named on it.

    `presets` is a table of named sizes, chosen by the field `preset`: named options beat the
    preset, which beats the defaults.  Fields in `positional` are given unnamed."""
    presets = presets or {}
    fields = dataclasses.fields(cls)
    parser = make_parser(fields, argv, presets, positional)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        fail(f"{unknown[0]!r}: no such option (see --help)")
    given = vars(known)
    preset = given.get("preset", getattr(cls, "preset", None))
    if presets and preset not in presets:
        fail(f"--preset {preset!r}: expected one of {', '.join(presets)}")
    for field in fields:
        if field.default is dataclasses.MISSING and field.name not in given:
            fail(f"--{field.name} is required: {field.metadata.get('help', '')}")
    return cls(**{**presets.get(preset, {}), **given}), set(given)


def make_parser(
    fields: Iterable[dataclasses.Field],
    argv: list[str],
    presets: dict[str, dict],
    positional: tuple[str, ...],
) -> argparse.ArgumentParser:
    """The parser of parse_options: one argument per field, presets below"""
    listed_presets = [
        f"preset {name}: " + " ".join(f"--{key} {value}" for key, value in values.items())
        for name, values in presets.items()
    ]
    command = sys.argv[1 : len(sys.argv) - len(argv)]  # a word that chose this command, if any
    parser = argparse.ArgumentParser(
        usage=" ".join(["%(prog)s", *command, *positional, "[options]"]),
        epilog="\n".join(listed_presets),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = refuse_argument
    for field in fields:
        name = field.name
        is_list = field.type is list
        required = field.default is dataclasses.MISSING
        shown_default = "required" if required else repr(field.default)
        least = field.metadata.get("least")
        if least is None:
            least = 0 if field.type is float or field.default == 0 else 1
        parser.add_argument(
            name if name in positional else f"--{name}",
            metavar=name if name in positional else "",
            nargs="+" if is_list else None,
            help=f"{shown_default} {field.metadata.get('help', '')}".replace("%", "%%"),
            type=partial(parse_value, str if is_list else field.type, least),
        )
    return parser


def refuse_argument(message: str) -> NoReturn:
    """argparse's complaint in our form"""
    fail(message.removeprefix("argument "))


def matching(rows: list[dict], where: str, index: Path, problems: Iterable = ()) -> list[dict]:
    """The rows of a dataset's index that match --where: "name=value,name=value", with values
    compared as JSON (true, null, 5 equals 5.0) or, where they are not JSON, as text.  Refuses a
    condition that no row meets, unless other `problems` explain that."""
    part = r'([^,="]+)=("(?:[^"\\]|\\.)*"|.+?)(?:,(?=[^,="]+=)|$)'  # name=value or name="JSON text"
    if where and not re.fullmatch(f"(?:{part})+", where):
        fail(f"--where {where!r}: expected name=value, comma-separated")
    conditions = re.findall(part, where)
    kept = [
        row
        for row in rows
        if all(name in row and same_value(row[name], text) for name, text in conditions)
    ]
    if not kept and not problems:
        message = f"{index}: no episode"
        if where:
            message += f" with {where}"
        unknown = [name for name, _ in conditions if not any(name in row for row in rows)]
        if rows and unknown:
            message += f" (none has a field {unknown[0]!r})"
        fail(message)
    return kept


def same_value(value: object, text: str) -> bool:
    """Whether a JSON value is what the text says: numbers by value, True as true"""
    try:
        wanted = json.loads(text)
    except ValueError:
        wanted = text
    if type(value) in (int, float) and type(wanted) in (int, float):
        return value == wanted
    if type(value) is type(wanted) and value == wanted:
        return True
    return str(value) == text


# ------------------------------------------------------------------------ files
@contextlib.contextmanager
def atomically(path: str | Path, tag: str | None = None, durable: bool = False) -> Iterator[Path]:
    """Yield the path of a draft (file or folder) that becomes `path` once whole, or never.

    tag: part of the draft's name; durable: on disk before it appears, even if the power fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tag = tag or f"{os.getpid()}.{get_ident()}"
    draft = path.with_name(f".{path.stem}.{tag}{path.suffix}")
    try:
        yield draft
        if durable:
            os.sync()
        os.replace(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)  # of a folder
        with contextlib.suppress(OSError):
            draft.unlink()


def write_atomically(path: str | Path, text: str, durable: bool = False) -> None:
    with refuse(f"{path}: not written"), atomically(path, durable=durable) as draft:
        draft.write_text(text, encoding="utf-8")


def lock(file: IO) -> bool:
    """Whether this process may write to an open file: no other has locked it.  The lock is
    released when the process ends or closes any handle of that file."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # some file systems have no locks
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def refuse_busy(out: str | Path) -> None:
    """Before hours of other work: refuse a run folder that another run writes into"""
    log = Path(out) / "metrics.jsonl"
    if is_main_process() and log.is_file():
        with refuse(f"--out {out}"), open(log, "a", encoding="utf-8") as file:
            if not lock(file):
                fail(f"--out {out}: another run is writing into this folder")


# ------------------------------------------------------------------------ checkpoints
def write_checkpoint(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], meta: dict, files: dict
) -> None:
    """Make a folder of weights ((name, tensor) pairs), config.json (meta) and files: name -> text,
    a Path to link or copy, or more weights"""
    folder.mkdir()
    save_weights(folder, tensors)
    for name, content in files.items():
        if isinstance(content, str):
            (folder / name).write_text(content, encoding="utf-8")
        elif isinstance(content, Path):
            link_or_copy(content, folder / name)
        else:
            save_file({key: tensor.contiguous() for key, tensor in content}, folder / name)
    (folder / "config.json").write_text(to_json(meta, 1), encoding="utf-8")


def link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def save_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard: int = SHARD) -> None:
    """Write (name, tensor) pairs to folder/model.safetensors or, where they take more than `shard`
    bytes, to numbered files with an index (Hugging Face's layout).  Holds one shard in memory."""
    names_in_part: list[list[str]] = []
    held: dict[str, Tensor] = {}

    def write_part() -> None:
        save_file(held, folder / f"part{len(names_in_part)}")
        names_in_part.append(list(held))
        held.clear()

    for name, tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        if held and sum(other.nbytes for other in held.values()) + tensor.nbytes > shard:
            write_part()
        held[name] = tensor
    if held:
        write_part()
    count = len(names_in_part)
    if count == 1:
        final_names = ["model.safetensors"]
    else:
        final_names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    if count > 1:
        total = sum(part.stat().st_size for part in folder.glob("part*"))
        places = {name: final_names[i] for i, names in enumerate(names_in_part) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(to_json(index, 1), encoding="utf-8")
    for i, name in enumerate(final_names):
        os.replace(folder / f"part{i}", folder / name)


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint's folder, one or several"""
    index = Path(folder) / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return [Path(folder) / name for name in names]


def latest(path: str | Path) -> Path:
    """A run's folder -> its newest checkpoint; any other path as it is"""
    path = Path(path)
    pointer = path / "latest"
    return path / pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else path


def open_checkpoint(path: str | Path, asked_by: str, stages: tuple[str, ...]) -> tuple[Path, dict]:
    """A run's folder or a checkpoint's own -> the checkpoint's, and meta (config.json).  Refuses,
    naming the option asked_by, where there is none, and those of other stages."""
    path = latest(path)
    if not (path / "config.json").is_file() or not all(f.is_file() for f in weight_files(path)):
        fail(
            f"--{asked_by} {path}: no checkpoint there (expected config.json and model.safetensors)"
        )
    with refuse(f"--{asked_by} {path}: unreadable checkpoint"):
        meta = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if not isinstance(meta, dict) or not {"stage", "model", "step"} <= meta.keys():
            raise ValueError("config.json lacks stage, model or step")
    if meta["stage"] not in stages:
        fail(f"--{asked_by} {path}: holds stage {meta['stage']!r}, expected {' or '.join(stages)}")
    return path, meta


def load_checkpoint(
    path: str | Path, asked_by: str, stages: tuple[str, ...]
) -> tuple[dict[str, object], dict]:
    """-> weights (name -> safetensors slice, read when indexed), meta.  Refuses what
    open_checkpoint does."""
    path, meta = open_checkpoint(path, asked_by, stages)
    with refuse(f"--{asked_by} {path}: unreadable checkpoint", (OSError, SafetensorError)):
        weights = {}
        for name in weight_files(path):
            file = safe_open(name, "pt")
            weights |= {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (no dict)
        return weights, meta


def fingerprint(path: str | Path) -> str:
    """12 hex digits that name the weights of a run's newest checkpoint"""
    digest = hashlib.sha256()
    for name in weight_files(latest(path)):
        with open(name, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()[:12]
