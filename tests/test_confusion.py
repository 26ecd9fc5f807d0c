"The confusion matrix in a browser without scripts: names stand beside each other, a click shows a cell's texts"

import pytest

from gpuml.base.confusion import confusion_html
from gpuml.training.answers import texts_of_cells
from tests.test_lab import CHROMIUM, FLAGS

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: install it to see the matrix")
LONG = "balance_not_updated_after_cheque_or_cash_deposit"


@pytest.fixture(scope="module")
def page():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        context = chromium.new_context(java_script_enabled=False, viewport={"width": 1000, "height": 900})
        context.set_default_timeout(600_000)
        yield context.new_page()
        chromium.close()


def matrix(labels: list[str]) -> str:
    "The report's matrix, in which the first class is taken for the last one twice"
    row = {"file": "a.csv", "label": labels[0], "predicted": labels[-1], "probability": "0.9"}
    wrong = [{**row, "line": str(i), "text": f"where is parcel {i}"} for i in (2, 3)]
    last = len(labels) - 1
    confusion = [[7 * (i == j) + 2 * ((i, j) == (0, last)) for j in range(last + 1)] for i in range(last + 1)]
    return confusion_html(confusion, labels, texts_of_cells(wrong), "one")


def apart(a: dict, b: dict) -> bool:
    "Whether two boxes have nothing in common, or less than a pixel"
    beside = a["x"] + a["width"] <= b["x"] + 1 or b["x"] + b["width"] <= a["x"] + 1
    return beside or a["y"] + a["height"] <= b["y"] + 1 or b["y"] + b["height"] <= a["y"] + 1


@pytest.mark.parametrize(
    "labels", [["a", "b"], ["x", LONG], [f"{LONG}_{i}" for i in range(30)]], ids=["short", "long", "30"]
)
@pytest.mark.parametrize("width", [1000, 420])
def test_a_cell_opens_its_texts(page, labels, width):
    page.set_viewport_size({"width": width, "height": 900})
    page.set_content(matrix(labels))
    head, side = page.locator("svg text[opacity]"), page.locator("svg text[text-anchor=end]:not([opacity])")
    boxes = [
        place.bounding_box() for place in [*head.all(), *page.locator("svg text[transform]").all()[:1], *side.all()]
    ]
    assert all(apart(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :]) and min(b["x"] for b in boxes) >= 0
    assert page.locator("svg title").all_text_contents().count(f"{labels[0]} → {labels[-1]}: 2") == 1
    text, cell = page.get_by_text("where is parcel 3"), page.locator("summary")
    number = page.locator("rect", has=page.locator("title", has_text=f"{labels[0]} → {labels[-1]}: 2"))
    over, square = cell.bounding_box(), number.bounding_box()
    assert max(abs(over[name] - square[name]) for name in over) < 2  # it lies over its square
    assert not text.is_visible()
    cell.click()
    assert text.is_visible() and f"label='{labels[0]}'" in page.locator("details").inner_text()
    cell.click()
    assert not text.is_visible()


def test_many_classes_are_a_table_of_pairs(page):
    labels = [f"{LONG}_{i}" for i in range(77)]
    page.set_content(matrix(labels))
    row = page.locator("tbody tr").first
    assert row.locator("td").all_inner_texts()[:4] == [labels[0], labels[-1], "2", "22%"]
    row.locator("summary").click()
    assert page.get_by_text("where is parcel 3").is_visible()
