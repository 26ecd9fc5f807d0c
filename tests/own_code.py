"A model and scores as a cell of a notebook has them"

import linecache

CELL = """\
import torch
from torch import nn

WIDTH = 16


class Bag(nn.Module):
    "The mean of the words, which one layer looks at"

    def __init__(self, words, classes):
        super().__init__()
        self.words = nn.Embedding(words, WIDTH)
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(WIDTH, classes))

    def forward(self, ids, mask):
        return self.head((self.words(ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def make_model(config, labels, tokenizer):
    return Bag(len(tokenizer), len(labels))


def scores(labels, probabilities, classes):
    return {"sure": float(probabilities.max(1).mean()), "classes-seen": len(classes)}
"""
count = iter(range(1000))


def cell(source=CELL):
    "What a cell of a notebook defines"
    file = f"<cell {next(count)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    space = {"__name__": "__main__"}
    exec(compile(source, file, "exec"), space)
    return space
