"""The house's rules: who imports whom, how long files are, where links lead.

Each rule is a function over a tree {path: text} that lists what breaks it, so that it can be tried
on made-up trees too.  Python is read as syntax trees; nothing is imported."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePosixPath

import pytest
from conftest import ROOT

Tree = dict[str, str]
STAGES = {"quantize.py", "pretrain.py", "finetune.py", "evaluate.py"}
MODEL = "model"  # a folder that belongs to the root, not a room
TEXTS = {".py", ".md", ".sh"}  # beside the Makefile; other files are in a tree by name only
NOT_OURS = {"data", "runs", "build", "env", "venv"}  # folders that tools and stages make
NETWORKS = {"model/laq.py", "model/vla.py"}  # which the README's reading order has to name
EXAMPLES = {  # page -> files that it tells its reader to write
    "docs/simulators.md": {"simulators/NAME.py", "simulators/toy.py"},
}


def read_tree(root: Path) -> Tree:
    """The repository: path -> text, or "" for pictures and the like"""
    tree = {}
    for folder, folders, names in os.walk(root):
        inside = PurePosixPath(Path(folder).relative_to(root).as_posix())
        folders[:] = [
            name
            for name in folders
            if not name.startswith((".", "__")) and str(inside / name) not in NOT_OURS
        ]
        for name in names:
            path = Path(folder, name)
            known = path.suffix in TEXTS or name == "Makefile"
            tree[str(inside / name)] = path.read_text(encoding="utf-8") if known else ""
    return tree


# ------------------------------------------------------------------------ imports
@dataclass(frozen=True)
class Import:
    """`import name`, or `from .. import ..` with the full name of what is taken"""

    name: str
    line: int
    at_top: bool  # outside of functions


class Imports(ast.NodeVisitor):
    """Collects a file's imports, also those within functions and importlib.import_module("name")"""

    def __init__(self, package: str) -> None:
        self.package, self.depth, self.found = package, 0, []

    def add(self, node: ast.AST, name: str) -> None:
        self.found.append(Import(name, node.lineno, self.depth == 0))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.add(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        parts = self.package.split(".") if self.package else []
        start = parts[: len(parts) + 1 - node.level] if node.level else []
        start += [node.module] if node.module else []
        for alias in node.names:
            self.add(node, ".".join([*start, alias.name]))

    def visit_Call(self, node: ast.Call) -> None:
        function = getattr(node.func, "attr", getattr(node.func, "id", ""))
        first = node.args[0] if node.args else None
        if function in ("import_module", "__import__") and isinstance(first, ast.Constant):
            self.add(node, str(first.value))
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef


def imports(path: str, source: str) -> list[Import]:
    """All imports of a file, in the order of its lines"""
    visitor = Imports(".".join(PurePosixPath(path).parent.parts))
    visitor.visit(ast.parse(source))
    return visitor.found


def file_of(name: str, tree: Tree) -> str | None:
    """The tree's file that holds a dotted name, "official.vqgan.VQGAN" -> "official/vqgan.py" """
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        stem = "/".join(parts[:count])
        for path in (f"{stem}.py", f"{stem}/__init__.py"):
            if path in tree:
                return path
    return None


def folder_of(path: str) -> str:
    """First folder of a path; "" in the root, to which model/ belongs"""
    folder = path.partition("/")[0] if "/" in path else ""
    return "" if folder == MODEL else folder


def python(tree: Tree, tests: bool = True) -> Iterator[tuple[str, str]]:
    """(path, source) of the Python files"""
    for path, source in sorted(tree.items()):
        if path.endswith(".py") and (tests or folder_of(path) != "tests"):
            yield path, source


def inner_imports(tree: Tree, tests: bool = True) -> Iterator[tuple[str, Import, str]]:
    """(importing file, import, imported file) within the tree"""
    for path, source in python(tree, tests):
        for found in imports(path, source):
            target = file_of(found.name, tree)
            if target and target != path:
                yield path, found, target


def rooms_import_the_root_and_no_other_room(tree: Tree) -> list[str]:
    return [
        f"{path}:{found.line}: imports {target}"
        for path, found, target in inner_imports(tree, tests=False)
        if folder_of(path) and folder_of(target) not in ("", folder_of(path))
    ]


def the_root_imports_no_room_at_the_top_of_a_file(tree: Tree) -> list[str]:
    return [
        f"{path}:{found.line}: imports {target} at the top"
        for path, found, target in inner_imports(tree)
        if not folder_of(path) and folder_of(target) and found.at_top
    ]


def no_stage_imports_another(tree: Tree) -> list[str]:
    return [
        f"{path}:{found.line}: imports {target}"
        for path, found, target in inner_imports(tree)
        if path in STAGES and target in STAGES
    ]


def the_model_imports_torch_only(tree: Tree) -> list[str]:
    allowed = sys.stdlib_module_names | {"torch", MODEL}
    return [
        f"{path}:{found.line}: imports {found.name}"
        for path, source in python(tree)
        if path.startswith(f"{MODEL}/")
        for found in imports(path, source)
        if found.name.partition(".")[0] not in allowed
    ]


def imports_go_in_no_circle(tree: Tree) -> list[str]:
    """Also within functions: what is imported late is needed all the same"""
    graph = {path: set() for path, _ in python(tree)}
    for path, _, target in inner_imports(tree):
        graph[path].add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" is imported by ".join(error.args[1])]
    return []


# ------------------------------------------------------------------------ sizes and form
def the_root_holds_ten_python_files(tree: Tree) -> list[str]:
    files = [path for path, _ in python(tree) if "/" not in path]
    return [f"{len(files)} files: {', '.join(files)}"] if len(files) > 10 else []


def files_are_at_most_700_lines(tree: Tree) -> list[str]:
    lengths = {path: len(source.splitlines()) for path, source in python(tree)}
    return [f"{path}: {length} lines" for path, length in lengths.items() if length > 700]


def product_functions_are_at_most_60_lines(tree: Tree) -> list[str]:
    long = []
    for path, source in python(tree, tests=False):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                if length > 60:
                    long.append(f"{path}:{node.lineno}: {node.name} has {length} lines")
    return long


def lines_are_at_most_100_columns(tree: Tree) -> list[str]:
    """Without a `# noqa` at their end, as ruff counts"""
    return [
        f"{path}:{number}: {len(line)} columns"
        for path, text in sorted(tree.items())
        if path.endswith((".py", ".sh")) or path == "Makefile"
        for number, line in enumerate(re.sub(r"  # noqa:.*", "", text).splitlines(), 1)
        if len(line) > 100
    ]


def no_lambda_has_a_name(tree: Tree) -> list[str]:
    """A function that is assigned to a name, an attribute or one of several targets is a def"""
    named = []
    for path, source in python(tree):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)):
                values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
                if any(isinstance(value, ast.Lambda) for value in values):
                    named.append(f"{path}:{node.lineno}: lambda with a name")
    return named


# ------------------------------------------------------------------------ README and docs
def prose(text: str) -> str:
    """Markdown without its code"""
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def the_readme_is_at_most_200_lines(tree: Tree) -> list[str]:
    length = len(tree["README.md"].splitlines())
    return [f"README.md: {length} lines"] if length > 200 else []


def the_readme_counts_the_lines_of_files(tree: Tree) -> list[str]:
    """Rows "| `file.py` | 123 |": every file of the root and both networks have one, and all are
    right"""
    rows = re.findall(r"^\| `([\w/]+\.py)` \| ([\d,]+) \|", tree["README.md"], re.MULTILINE)
    lengths = {path: len(source.splitlines()) for path, source in python(tree)}
    told = {path: int(count.replace(",", "")) for path, count in rows}
    demanded = [path for path in lengths if "/" not in path or path in NETWORKS]
    missing = [path for path in demanded if path not in told]
    return [f"README.md: no row for {path}" for path in missing] + [
        f"README.md: {path} has {lengths.get(path, 'no')} lines, not {count}"
        for path, count in told.items()
        if lengths.get(path) != count
    ]


def links_lead_somewhere(tree: Tree) -> list[str]:
    """Links and pictures of Markdown pages, to files and to headings"""
    lost = []
    for page in sorted(path for path in tree if path.endswith(".md")):
        for link in re.findall(r"\]\(([^)\s]+)\)", prose(tree[page])):
            if re.match(r"\w+:", link):  # https:, mailto:
                continue
            name, _, heading = link.partition("#")
            path = os.path.normpath(PurePosixPath(page).parent / name) if name else page
            if path not in tree or (heading and heading not in headings(tree[path])):
                lost.append(f"{page}: {link}")
    return lost


def headings(text: str) -> set[str]:
    """A page's headings as links name them: "Two commands" -> "two-commands" """
    titles = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def files_that_are_named_exist(tree: Tree) -> list[str]:
    """Paths below docs/ in product code; paths into our folders in Markdown's code, except for
    examples"""
    ours = {folder_of(path) for path, _ in python(tree)} - {""} | {"docs"}
    lost = []
    for path, text in sorted(tree.items()):
        if path.endswith((".py", ".sh")) and folder_of(path) != "tests" or path == "Makefile":
            named = re.findall(r"docs/[\w/-]+\.(?:md|svg|png|gif|py|sh)\b", text)
        elif path.endswith(".md"):
            named = re.findall(r"[\w-]+/[\w/-]+\.(?:py|sh)\b", "".join(codes(text)))
            examples = EXAMPLES.get(path, set())
            named = [name for name in named if folder_of(name) in ours and name not in examples]
        else:
            continue
        lost += [f"{path}: {name}" for name in named if name not in tree]
    return lost


def named_tests_exist(tree: Tree) -> list[str]:
    """ "Test: test_a" in docstrings of product code; `test_a` in Markdown"""
    defined = {
        node.name
        for path, source in python(tree)
        if folder_of(path) == "tests"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
    }
    lost = []
    for path, text in sorted(tree.items()):
        pattern = r"`(test_\w+)`" if path.endswith(".md") else r"Test: (test_\w+)"
        if folder_of(path) != "tests" or path.endswith(".md"):
            lost += [f"{path}: {name}" for name in re.findall(pattern, text) if name not in defined]
    return lost


def codes(text: str) -> list[str]:
    """Markdown's code, blocks and inline"""
    return re.findall(r"```.*?```|`[^`\n]*`", text, flags=re.DOTALL)


Rule = Callable[[Tree], list[str]]
RULES: list[Rule] = [
    rooms_import_the_root_and_no_other_room,
    the_root_imports_no_room_at_the_top_of_a_file,
    no_stage_imports_another,
    the_model_imports_torch_only,
    imports_go_in_no_circle,
    the_root_holds_ten_python_files,
    files_are_at_most_700_lines,
    product_functions_are_at_most_60_lines,
    lines_are_at_most_100_columns,
    no_lambda_has_a_name,
    the_readme_is_at_most_200_lines,
    the_readme_counts_the_lines_of_files,
    links_lead_somewhere,
    files_that_are_named_exist,
    named_tests_exist,
]
BY_NAME = pytest.mark.parametrize("rule", RULES, ids=[rule.__name__ for rule in RULES])


@BY_NAME
def test_the_house_keeps(rule: Rule) -> None:
    assert rule(read_tree(ROOT)) == []


# ------------------------------------------------------------------------ the rules themselves
SOUND = {
    "README.md": "# A house\n"
    "| `data.py` | 1 |\n| `model/laq.py` | 2 |\n| `model/vla.py` | 1 |\n| `quantize.py` | 4 |\n"
    "[a](docs/a.md) ![x](docs/x.svg) [web](https://a.b) `analysis/card.py`\n",
    "docs/a.md": "[back](../README.md#a-house) [b](b.md#its-code-13)\n`laq/theirs.py` `test_a`",
    "docs/b.md": "## Its code: `1/3`\n[here](#its-code-13) `[x](y)`",
    "docs/simulators.md": "`simulators/toy.py`",
    "docs/x.svg": "",
    "Makefile": "# docs/a.md",
    "model/__init__.py": "from .laq import LAQ",
    "model/laq.py": "import math  # Test: test_a\nfrom torch import nn",
    "model/parts.py": "import torch",
    "model/vla.py": "from .parts import f",
    "data.py": "import numpy  # see docs/a.md",
    "quantize.py": "import data\nfrom model import LAQ\ndef f():\n    from analysis import card",
    "analysis/__init__.py": "",
    "analysis/card.py": "import data\nfrom analysis.draw import page\nfrom . import draw",
    "analysis/draw.py": "from model import LAQ\nkey = sorted([], key=lambda x: x)",
    "official/__init__.py": "",
    "simulators/__init__.py": "",
    "tests/test_a.py": "import quantize, official\nfrom analysis import card\ndef test_a(): 0",
}
LONG = "def f():\n" + "    pass\n" * 60
LONG_METHOD = "class A:\n    async def f():\n" + "        pass\n" * 60


@BY_NAME
def test_a_sound_tree_passes(rule: Rule) -> None:
    assert rule(SOUND) == []


BROKEN = {  # rule -> (file of a sound tree, its new text, what the rule says of it)
    rooms_import_the_root_and_no_other_room: [
        ("analysis/card.py", "import official", "analysis/card.py:1: "),
        ("analysis/card.py", "def f():\n    from official import x", "card.py:2: "),
        ("analysis/card.py", "from ..official import x", "imports official/__init__"),
        ("analysis/card.py", "from tests import test_a", "imports tests/test_a.py"),
    ],
    the_root_imports_no_room_at_the_top_of_a_file: [
        ("data.py", "import analysis.card", "data.py:1: imports analysis/card.py"),
        ("data.py", "if 1:\n  for x in ():\n    from analysis import *", "data.py:3: "),
        ("data.py", "class A:\n    import official", "data.py:2: "),
        ("data.py", "x = import_module('official.x')", "data.py:1: "),
        ("model/vla.py", "import official", "model/vla.py:1: imports official/__init__.py"),
    ],
    no_stage_imports_another: [
        ("finetune.py", "import quantize", "finetune.py:1: imports quantize.py"),
        ("finetune.py", "def f():\n    from quantize import g", "finetune.py:2: "),
    ],
    the_model_imports_torch_only: [
        ("model/vla.py", "import torch.nn\nimport numpy as np", "model/vla.py:2: imports numpy"),
        ("model/laq.py", "def f():\n    import data", "model/laq.py:2: imports data"),
        ("model/parts.py", "from .. import data", "model/parts.py:1: imports data"),
    ],
    imports_go_in_no_circle: [
        ("data.py", "def f():\n    import quantize", "quantize.py"),
        ("analysis/draw.py", "from . import card", "analysis/card.py"),
        ("data.py", "from analysis import card", "analysis/card.py"),
    ],
    files_are_at_most_700_lines: [
        ("tests/test_a.py", "x = 1\n" * 701, "tests/test_a.py: 701 lines"),
    ],
    product_functions_are_at_most_60_lines: [
        ("analysis/draw.py", LONG, "analysis/draw.py:1: f has 61 lines"),
        ("data.py", LONG_METHOD, "data.py:2: f has 61 lines"),
    ],
    lines_are_at_most_100_columns: [
        ("data.py", "x\n#" + "x" * 100, "data.py:2: 101 columns"),
        ("Makefile", "x" * 101, "Makefile:1: 101 columns"),
        ("data.py", "x" * 101 + "  # noqa: E501", "data.py:1: 101 columns"),
    ],
    no_lambda_has_a_name: [
        ("data.py", "\nf = lambda x: x", "data.py:2: "),
        ("data.py", "a, f = 1, lambda x: x", "data.py:1: "),
        ("tests/test_a.py", "f: object = lambda: 0", "tests/test_a.py:1: "),
        ("data.py", "parser.error = lambda text: 0", "data.py:1: "),
    ],
    the_readme_is_at_most_200_lines: [
        ("README.md", "x\n" * 201, "README.md: 201 lines"),
    ],
    the_readme_counts_the_lines_of_files: [
        ("model/laq.py", "import math", "README.md: model/laq.py has 1 lines, not 2"),
        ("common.py", "", "README.md: no row for common.py"),
        (
            "README.md",
            SOUND["README.md"].replace("| `model/vla.py` | 1 |\n", ""),
            "README.md: no row for model/vla.py",
        ),
    ],
    links_lead_somewhere: [
        ("docs/a.md", "[x](README.md)", "docs/a.md: README.md"),
        ("docs/a.md", "[x](../README.md#its-code)", "docs/a.md: ../README.md#its-code"),
        ("docs/a.md", "![x](y.png)", "docs/a.md: y.png"),
    ],
    files_that_are_named_exist: [
        ("data.py", "# see docs/c.md", "data.py: docs/c.md"),
        ("docs/a.md", "`tests/bench.py`", "docs/a.md: tests/bench.py"),
        ("docs/a.md", "`simulators/toy.py`", "docs/a.md: simulators/toy.py"),
    ],
    named_tests_exist: [
        ("data.py", "# Test: test_b", "data.py: test_b"),
        ("docs/a.md", "`test_b`", "docs/a.md: test_b"),
    ],
}


@pytest.mark.parametrize(
    "rule, path, text, culprit",
    [(rule, *case) for rule, cases in BROKEN.items() for case in cases],
)
def test_a_rule_finds_what_breaks_it(rule: Rule, path: str, text: str, culprit: str) -> None:
    found = rule(SOUND | {path: text})
    assert len(found) == 1 and culprit in found[0], found


def test_eleven_files_in_the_root_are_too_many() -> None:
    more = {f"f{i}.py": "" for i in range(8)}
    assert the_root_holds_ten_python_files(SOUND | more) == []
    (found,) = the_root_holds_ten_python_files(SOUND | more | {"g.py": ""})
    assert found.startswith("11 files: ")


@pytest.mark.slow
def test_the_stages_need_no_room_and_evaluate_only_its_simulator(
    make_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    """In a copy of the root's files alone: three stages on an own dataset, then, with the
    simulators, rollouts"""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, copy)
    shutil.copytree(ROOT / "model", copy / "model")
    dataset = make_dataset({name: 6 for name in "abcdef"}, size=32)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(line: str) -> None:
        command = [sys.executable, *line.split()]
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    short = f"--data {dataset} --preset tiny --steps 1 --batch 4 --held_out 2"
    run(f"quantize.py {short} --out q")
    run(f"pretrain.py {short} --out p --labels latent --laq q")
    run(f"finetune.py {short} --out f --init_from p --labelled 4")
    shutil.copytree(ROOT / "simulators", copy / "simulators")
    run("evaluate.py --policies RANDOM=random --episodes 1 --max_steps 1 --film 0 --out e")
