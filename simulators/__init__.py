"""Simulators that evaluate.py opens by name: `--env NAME` is the file simulators/NAME.py.

That file defines a class with the members of `Simulator` below, and names it: `SIMULATOR = Class`.
It is imported only when asked for.  docs/simulators.md shows a full one."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Protocol, TypedDict

import numpy as np

from common import fail, refuse

Option = str | int | float


class Observation(TypedDict):
    """What a policy gets to see of B worlds"""

    image: np.ndarray  # uint8 [B, H, W, 3]
    instruction: list[str]  # B texts


class Info(TypedDict):
    """What is counted, of B worlds; a policy does not see it"""

    success: np.ndarray  # bool [B]; what it holds when an episode ends is its result
    family: list[str]  # B of FAMILIES: the kind of task


class Simulator(Protocol):
    """B worlds side by side, one episode each, so that a policy runs on a batch of pictures.

    reset and step are those of Gymnasium's vector environments, without automatic resets.
    A simulator whose scripted policy solves its tasks also has `expert() -> float [B, A]`, the
    next action of each world."""

    ACTION_DIM: ClassVar[int]  # A, the width of an action
    ACTION_LOW: ClassVar[float | Sequence[float]]  # of all dimensions, or of each
    ACTION_HIGH: ClassVar[float | Sequence[float]]
    FAMILIES: ClassVar[tuple[str, ...]]  # kinds of tasks, in the order of a table's columns
    SPLITS: ClassVar[tuple[str, ...]]  # what is evaluated where no --splits are given
    MAX_STEPS: ClassVar[int]  # steps until an episode ends, where no --max_steps are given
    OPTIONS: ClassVar[Mapping[str, type]]  # of --env_options: name -> str, int or float

    def __init__(self, count: int, /, *, split: str, max_steps: int, **options: Option) -> None:
        """count: B.  Raises ValueError for a split, count or option that it cannot take"""

    def reset(self, seed: Sequence[int]) -> tuple[Observation, Info]:
        """Begin B episodes.  seed: (the run's seed, the number of the first world in the run);
        the same seed gives the same episodes, and numpy.random.default_rng takes it as is"""

    def step(
        self, action: np.ndarray
    ) -> tuple[Observation, np.ndarray, np.ndarray, np.ndarray, Info]:
        """action float [B, A] -> observation, reward float [B], terminated bool [B], truncated
        bool [B], info.  A terminated or truncated world does not change, whatever its action"""


def find_simulator(name: str) -> type[Simulator]:
    """The class of simulators/NAME.py.  Refuses an unknown name and a package that is missing"""
    module = f"{__name__}.{name}"
    try:
        if not name.isidentifier():
            raise ModuleNotFoundError(name=module)
        simulator = getattr(importlib.import_module(module), "SIMULATOR", None)
    except ImportError as error:
        if error.name != module:
            fail(f"--env {name}: {error}".partition("\n")[0])
        files = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
        fail(f"--env {name!r}: no such simulator, expected one of {', '.join(files)}")
    if simulator is None:
        fail(f"--env {name}: {module} defines no SIMULATOR")
    return simulator


def open_simulator(
    name: str, count: int, split: str, max_steps: int = 0, options: str = ""
) -> Simulator:
    """`count` worlds of simulators/NAME.py.

    max_steps: 0 is the simulator's own; options: "name=value,name=value" of its OPTIONS.  Refuses
    unknown names and options, and what the simulator itself refuses"""
    simulator = find_simulator(name)
    chosen = read_options(options, simulator.OPTIONS)
    with refuse(f"--env {name}", (ValueError, OSError, ImportError, RuntimeError)):
        return simulator(count, split=split, max_steps=max_steps or simulator.MAX_STEPS, **chosen)


def read_options(text: str, kinds: Mapping[str, type]) -> dict[str, Option]:
    """ "look=real,size=64", {"look": str, "size": int} -> {"look": "real", "size": 64}"""
    chosen = {}
    for part in text.split(",") if text else ():
        name, equals, value = part.partition("=")
        if not equals or name in chosen:
            fail(f"--env_options {text!r}: expected name=value, comma-separated, each name once")
        if name not in kinds:
            known = f"expected one of {', '.join(kinds)}" if kinds else "this simulator has none"
            fail(f"--env_options {name}: no such option, {known}")
        with refuse(f"--env_options {part}"):
            chosen[name] = kinds[name](value)
    return chosen
