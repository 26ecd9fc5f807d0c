"""What gpuml draws in a notebook, as its lessons store it, in a browser without Jupyter's style sheets and variables

Pictures of all of it go to the folder named by GPUML_PICTURES.
"""

import json
import os
from html import escape
from pathlib import Path

import pytest

from gpuml.base.files import write_json
from gpuml.base.grid import grid_of
from gpuml.training.sweep import Outcome, SweepFile, new_sweep
from gpuml.ui.sweep_table import SweepTable
from tests.conftest import ROOT
from tests.test_lab import CHROMIUM, browser  # noqa: F401  a fixture

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: install it to run the browser tests")

PICTURES = os.environ.get("GPUML_PICTURES")
STYLES = {
    "light": "background: #fff; color: #111; color-scheme: light",
    "dark": "background: #1e1e1e; color: #ccc; color-scheme: dark; --vscode-editor-foreground: #ccc; --vscode-editor-background: #1e1e1e",
}
# Luminance and contrast as the Web Content Accessibility Guidelines 2.2 define them
CONTRAST = """outputs => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const over = (top, below) => {
    canvas.fillStyle = below; canvas.fillRect(0, 0, 1, 1);
    canvas.fillStyle = top; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = canvas.getImageData(0, 0, 1, 1).data;
    return `rgb(${r}, ${g}, ${b})`;
  };
  const luminance = colour => {
    const parts = colour.match(/[0-9.]+/g).slice(0, 3).map(part => part / 255);
    const [r, g, b] = parts.map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = element => {
    const own = getComputedStyle(element).backgroundColor;
    return element.parentElement ? over(own, ground(element.parentElement)) : over(own, 'white');
  };
  const weak = [];
  for (const output of outputs)
    for (const element of [output, ...output.querySelectorAll('*')]) {
      const text = [...element.childNodes].filter(node => node.nodeType === 3).map(node => node.data.trim()).join('');
      const rect = element.getBoundingClientRect();
      if (!/[\\p{L}\\p{N}]/u.test(text) || !rect.width || element.closest('style, script, defs, option') || element.closest('svg')) continue;
      const below = ground(element);
      const [a, b] = [luminance(over(getComputedStyle(element).color, below)), luminance(below)].sort((x, y) => x - y);
      const contrast = (b + 0.05) / (a + 0.05);
      if (contrast < 3) weak.push(`${output.dataset.lesson}: '${text.slice(0, 40)}' ${contrast.toFixed(1)}`);
    }
  return weak;
}"""
CUT = "outputs => outputs.filter(output => output.scrollWidth > output.clientWidth + 1).map(output => output.dataset.lesson)"


def drawn() -> dict[str, str]:
    "What each lesson stores as HTML, by its page and cell"
    outputs = {}
    for path in sorted((ROOT / "nbs").glob("*/*.ipynb")):
        for number, cell in enumerate(json.loads(path.read_text())["cells"]):
            for output in cell.get("outputs", ()):
                if "text/html" in output.get("data", {}):
                    outputs[f"{path.stem}, cell {number}"] = "".join(output["data"]["text/html"])
    return outputs


def sweep(folder: Path) -> str:
    "A sweep of four runs, one of which failed"
    grid = grid_of(["train.learning_rate=1e-4,4e-4", "train.seed=0,1", f"output={folder}"])
    made = new_sweep("dev-1", "dev", grid)
    for place, run in enumerate(made.runs[:3]):
        scores = {"macro_f1": 0.8 + place / 100, "accuracy": 0.9, "loss": 0.1}
        write_json(f"{folder}/{run}/certificate.json", {"evaluation": scores})
    outcomes = {run: Outcome("finished") for run in made.runs[:3]}
    failed = Outcome("failed", reason="the loss is nan at update 7")
    return SweepTable(SweepFile(made, outcomes | {made.runs[3]: failed}))._repr_html_()


@pytest.mark.parametrize("width", [1000, 700])
@pytest.mark.parametrize("scheme", STYLES)
def test_all_is_seen(browser, tmp_path, scheme, width):  # noqa: F811
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    outputs = "".join(
        f"<section data-lesson='{escape(name, quote=True)}' style='margin: 1.5em 0'>{html}</section>"
        for name, html in {**drawn(), "a sweep": sweep(tmp_path)}.items()
    )
    page.set_content(f"<body class='vscode-{scheme}' style='font: 14px sans-serif; {STYLES[scheme]}'>{outputs}")
    if PICTURES:
        Path(PICTURES).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(PICTURES) / f"outputs-{scheme}-{width}.png", full_page=True)
    sections = page.locator("section")
    assert sections.evaluate_all(CUT) == []
    assert sections.evaluate_all(CONTRAST) == []
    page.close()
