"""The rules of the house that a script can check, and the places that break them already.

    python tests/house.py            prints new offenders; exit code 1 if there are any
    python tests/house.py --all      prints every offender, the known ones too
    python tests/house.py --renew    writes the ones of today into house.json

`house.json` counts the known offenders by rule and file. A file may have more of them than it had while the whole house has
no more: so code can move between files, and the house can only get better. It is renewed when offenders are gone.
"""

import ast
import collections
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
BASELINE = Path(__file__).with_suffix(".json")
WINGS = ["base", "data", "training", "jobs", "cluster", "ui"]
VAGUE = {
    *("about", "asked", "begun", "behind", "found", "given", "here", "how", "kept", "known", "left", "made", "more", "one"),
    *("said", "seen", "shown", "some", "there", "told", "wanted", "way", "what", "where", "who", "why"),
}  # fmt: skip
MODULE_LINES, CELL_LINES, FUNCTION_LINES, ASSIGNMENTS = 400, 60, 40, 2
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Offender(NamedTuple):
    "A place that breaks a rule; the file is relative to the root"

    rule: str
    file: str
    line: int
    what: str

    def __str__(self):
        return f"{self.file}:{self.line}: {self.rule}: {self.what}"


def stored_name(node: ast.AST) -> str | None:
    "The name that a node gives to a value"
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return node.id
    return node.arg if isinstance(node, ast.arg) else None


def foreign_attributes(node: ast.AST) -> Iterator[str]:
    "Private attributes of another object that an assignment writes"
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    for target in targets:
        private = isinstance(target, ast.Attribute) and re.match("_[a-z]", target.attr)
        if private and ast.unparse(target.value) not in ("self", "cls"):
            yield ast.unparse(target)


def assignments(node: ast.AST) -> int:
    "How many values a statement gives to names; one that is unpacked counts once"
    tuples = (
        isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Tuple)
    )
    return len(node.targets[0].elts) if tuples else 1


def imported_modules(tree: ast.Module, file: str) -> Iterator[tuple[int, str]]:
    "Line and name of all that a module imports, at its top and in functions; names may be those of a module's parts"
    home = file.removesuffix(".py").split("/")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = [*home[: -node.level], *filter(None, [node.module])] if node.level else [node.module]
            yield node.lineno, ".".join(parent)
            yield from ((node.lineno, ".".join([*parent, alias.name])) for alias in node.names)


def wing_of(name: str) -> str | None:
    "The wing that a dotted name lies in"
    parts = name.split(".")
    return parts[1] if parts[0] == "gpuml" and len(parts) > 2 and parts[1] in WINGS else None


def wrong_way(tree: ast.Module, file: str) -> Iterator[tuple[int, str]]:
    "Imports of a wing that comes later than the module's own"
    wing = wing_of(file.removesuffix(".py").replace("/", "."))
    for line, name in imported_modules(tree, file) if wing else ():
        other = wing_of(name)
        if other and WINGS.index(other) > WINGS.index(wing):
            yield line, f"{wing} imports {name}"


def module_offenders(file: str, source: str) -> Iterator[Offender]:
    "What is wrong with a module"
    tree, lines = ast.parse(source), len(source.splitlines())
    if lines > MODULE_LINES:
        yield Offender("long module", file, 1, f"{lines} lines")
    yield from (Offender("import across wings", file, *place) for place in wrong_way(tree, file))
    for node in ast.walk(tree):
        if stored_name(node) in VAGUE:
            yield Offender("vague name", file, node.lineno, stored_name(node))
        if isinstance(node, FUNCTIONS):
            if (size := node.end_lineno - node.lineno + 1) > FUNCTION_LINES:
                yield Offender("long function", file, node.lineno, f"{node.name}, {size} lines")
            for inner in (n for n in node.body if isinstance(n, ast.ClassDef)):
                yield Offender("class made in a function", file, inner.lineno, inner.name)
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
            for attribute in foreign_attributes(node):
                yield Offender("private attribute of another", file, node.lineno, attribute)
        if assignments(node) > ASSIGNMENTS:
            yield Offender("many assignments in a line", file, node.lineno, ast.unparse(node.targets[0]))


def page_offenders(file: str, source: str) -> Iterator[Offender]:
    "What is wrong with a page's export cells; a line is the cell's number"
    for number, cell in enumerate(json.loads(source)["cells"]):
        code = "".join(cell["source"])
        if cell["cell_type"] != "code" or not re.search(r"^#\| *export", code, re.M):
            continue
        size = sum(bool(line.strip()) and not line.startswith("#|") for line in code.split("\n"))
        if size > CELL_LINES:
            yield Offender("long cell", file, number, f"{size} lines")
        for name in re.findall(r"^class (\w+)", code, re.M)[1:]:
            yield Offender("second class in a cell", file, number, name)


def offenders(root: Path) -> list[Offender]:
    "All places of a checkout that break a rule"
    places = []
    for path in sorted((root / "gpuml").rglob("*.py")):
        if path.name != "_modidx.py":
            places += module_offenders(path.relative_to(root).as_posix(), path.read_text())
    for path in sorted((root / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts:
            places += page_offenders(path.relative_to(root).as_posix(), path.read_text())
    return places


def counts(places: list[Offender]) -> dict[str, dict[str, int]]:
    "How many there are: by rule and file"
    table = collections.defaultdict(collections.Counter)
    for place in places:
        table[place.rule][place.file] += 1
    return {rule: dict(sorted(table[rule].items())) for rule in sorted(table)}


def new_offenders(places: list[Offender], known: dict[str, dict[str, int]]) -> list[Offender]:
    "Those of files that have more of them than is known, where the house as a whole has more"
    table = counts(places)

    def is_new(place: Offender) -> bool:
        before = known.get(place.rule, {})
        if sum(table[place.rule].values()) <= sum(before.values()):
            return False
        return table[place.rule][place.file] > before.get(place.file, 0)

    return [place for place in places if is_new(place)]


def summary(places: list[Offender], known: dict[str, dict[str, int]]) -> str:
    "How many offenders of each rule there are, and were"
    table = counts(places)
    totals = {rule: (sum(table.get(rule, {}).values()), sum(known.get(rule, {}).values())) for rule in {*table, *known}}
    return ", ".join(
        f"{rule} {now}" + f" (was {before})" * (now < before) for rule, (now, before) in sorted(totals.items())
    )


def main(arguments: list[str]) -> int:
    "Print what is asked for; the exit code"
    places = offenders(ROOT)
    if "--renew" in arguments:
        BASELINE.write_text(json.dumps(counts(places), indent=1) + "\n")
    known = json.loads(BASELINE.read_text())
    new = new_offenders(places, known)
    for place in places if "--all" in arguments else new:
        print(place)
    print(f"house: {summary(places, known) or 'nothing to put right'}")
    if new:
        print(
            "house: the places above, or others in their files, are new; put them right (tests/house.py has the rules)"
        )
    elif counts(places) != known:
        print("house: better than tests/house.json says: `make house` renews it")
    return bool(new)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
