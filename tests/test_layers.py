"""The order of the house: which rooms may import which. Reads the source of the package and imports none of it."""

import ast
import functools
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1] / "maestro_jax"

# From the top down; a room may import from its own layer and from those below. A room is a directory of the package or
# a file beside them; the registry, with layers inside, counts as several. docs/architecture.md draws the same.
LAYERS = (
    ("maestro_jax", "train", "evaluate", "export", "plan", "slice_check", "doctor", "experts", "api"),
    ("jobs",),
    ("config", "session", "training", "evaluation", "suite", "aot"),
    ("grpo", "rollout", "warm_start", "fleet"),
    ("registry.dispatch", "policy", "rewards", "data"),
    ("registry.experts", "registry.skills", "registry.record"),
    ("registry.description",),
    ("command", "settings", "sandbox", "checkpoint", "observe"),
    ("parallel", "plugins", "failpoints", "images", "types", "errors", "strict_json", "mapping", "waiting"),
)
# How an expert is asked, how a skill runs and what is written down: none of the three knows of another.
SIDE_BY_SIDE = {"registry.experts", "registry.skills", "registry.record"}

# Imports inside functions, and why they are not at the top of the file: "importer > imported".
INSIDE_FUNCTIONS = {
    "command > parallel.cluster": "it imports jax, and some commands do without",
    "train > jobs.train": "likewise; --print_config, --help and mistakes of the command line do without",
    "train > parallel.cluster": "likewise",
}
# Imports that break a rule, and what is to become of them.
KNOWN: dict[str, str] = {}

JAX = {"jax", "flax", "optax", "orbax"}
WITHOUT_JAX = {
    "config",
    "mapping",
    "plugins",
    "registry",
    "rewards",
    "data",
    "sandbox",
    "fleet",
    "images",
    "types",
    "errors",
    "strict_json",
    "waiting",
}
# Export compares with the reference where it is installed, inside functions.
NEVER_AT_THE_TOP = {"torch", "tensorflow", "transformers"}


class Import(NamedTuple):
    """A module of the package names another one, or a package from outside ("numpy")."""

    importer: str
    imported: str
    ours: bool
    inside: bool  # a function

    def __str__(self) -> str:
        return f"{self.importer} > {self.imported}"


@functools.cache
def modules() -> Mapping[str, Path]:
    """Names below the package, "maestro_jax" for its own `__init__`, and their files."""
    names = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix("__init__").removesuffix(".") or "maestro_jax": path for name, path in names.items()}


@functools.cache
def imports() -> list[Import]:
    return [found for name in sorted(modules()) for found in imports_of(name, modules()[name].read_text())]


def imports_of(importer: str, text: str) -> list[Import]:
    """The imports in the text of a module, from its first line to its last."""
    found = []

    def visit(node: ast.AST, inside: bool) -> None:
        named: Iterable[str] = ()
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level and node.module, f"{importer}, line {node.lineno}: write the whole name of the module"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            named = [name if name.removeprefix("maestro_jax.") in modules() else node.module for name in whole]
        for name in dict.fromkeys(named):
            ours = name.partition(".")[0] == "maestro_jax"
            short = name.removeprefix("maestro_jax.") if ours else name.partition(".")[0]
            found.append(Import(importer, short, ours, inside))
        inside |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(text), False)
    return found


def room(module: str) -> str:
    names = module.split(".")
    return ".".join(names[:2]) if names[0] == "registry" else names[0]


def layer(module: str) -> int:
    """0 is the lowest."""
    found = [number for number, rooms in enumerate(reversed(LAYERS)) if room(module) in rooms]
    assert found, f"{room(module)} has no layer: say in LAYERS (tests/test_layers.py) which it is"
    return found[0]


def wrong(found: Import) -> bool:
    here, there = room(found.importer), room(found.imported)
    return layer(found.imported) > layer(found.importer) or (here != there and {here, there} <= SIDE_BY_SIDE)


def cycles(edges: Iterable[tuple[str, str]]) -> list[str]:
    """What is left of a graph after everything is taken away that leads nowhere or that nothing leads to."""
    left = {(a, b) for a, b in edges if a != b}
    while True:
        kept = {(a, b) for a, b in left if b in {x for x, _ in left} and a in {y for _, y in left}}
        if kept == left:
            return sorted(f"{a} > {b}" for a, b in left)
        left = kept


# Whoever imports a module imports the package above it, too, whose own `__init__` may not count for anything.
OURS = [found for found in imports() if found.ours and found.imported not in ("maestro_jax", "registry")]


def test_nothing_imports_upwards() -> None:
    assert sorted({str(found) for found in OURS if wrong(found)}) == sorted(KNOWN)


def test_no_cycle_between_rooms_or_modules() -> None:
    held = [found for found in OURS if str(found) not in KNOWN]
    assert cycles((room(found.importer), room(found.imported)) for found in held) == []
    assert cycles((found.importer, found.imported) for found in OURS) == []


def test_imports_inside_functions_have_a_reason() -> None:
    assert sorted({str(found) for found in OURS if found.inside}) == sorted(INSIDE_FUNCTIONS)


def test_rooms_that_do_without_jax() -> None:
    at_the_top = [found for found in imports() if not found.inside]
    using = {found.importer for found in at_the_top if found.imported in JAX}
    assert "policy.model" in using
    while more := {found.importer for found in at_the_top if found.imported in using} - using:
        using |= more
    assert sorted(name for name in using if name.partition(".")[0] in WITHOUT_JAX) == []


def test_heavy_packages_are_not_imported_with_ours() -> None:
    found = [found for found in imports() if found.imported in NEVER_AT_THE_TOP and not found.inside]
    assert [str(each) for each in found] == []


def test_imports_are_found_wherever_they_stand() -> None:
    text = "import os.path\nfrom maestro_jax import types\nasync def f():\n  from maestro_jax.policy.rope import Rope\n"
    assert imports_of("data", text) == [
        Import("data", "os", False, False),
        Import("data", "types", True, False),
        Import("data", "policy.rope", True, True),
    ]
    assert [wrong(Import("types", *pair)) for pair in (("policy.rope", True, True), ("errors", True, False))] == [1, 0]
    assert wrong(Import("registry.record.cache", "registry.experts.chat", True, False))
    assert cycles(["ab", "bc", "ca", "cd", "xa"]) == ["a > b", "b > c", "c > a"]
    assert cycles(itertools.combinations("abcd", 2)) == []
