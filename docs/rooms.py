"Write the list of rooms in docs/design.md: each page's name and the sentence below it"

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
WINGS = {
    "base": "what every wing needs",
    "data": "from files to updates",
    "training": "from a config to a certified model",
    "jobs": "a notebook that something else executes",
    "cluster": "Kubernetes, and jobs on this machine",
    "ui": "what people see and type",
}


def row(page: Path) -> str:
    "A room's row: its page's first cell says what it is about"
    cells = json.loads(page.read_text())["cells"]
    prose = "".join(cells[0]["source"]).split("\n")
    about = next(line.lstrip("> ").strip() for line in prose[1:] if line.strip())
    room = re.sub(r"^\d+_", "", page.stem)
    return f"| [`{room}`](../nbs/{page.parent.name}/{page.name}) | {about} |"


def table(wing: str, subject: str) -> str:
    "All rooms of a wing, in their order"
    pages = sorted((ROOT / "nbs" / wing).glob("*.ipynb"))
    return "\n".join([f"### {wing}: {subject}", "", "| room | what it is about |", "|---|---|", *map(row, pages)])


if __name__ == "__main__":
    document = ROOT / "docs" / "design.md"
    tables = "\n\n".join(table(*wing) for wing in WINGS.items())
    start, end = "<!-- rooms: written by docs/rooms.py -->", "<!-- end of the rooms -->"
    before, rest = document.read_text().split(start)
    document.write_text(f"{before}{start}\n\n{tables}\n\n{end}{rest.split(end)[1]}")
