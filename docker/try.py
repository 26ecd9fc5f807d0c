"The bundle of try.sh: the project that `gpuml init` lays down, with the offline encoder and an output on /work"

from pathlib import Path

from gpuml.base.loading import load
from gpuml.jobs.bundle import pack
from gpuml.ui.cli import main

project = Path("/work/project")
main(["init", "--offline", str(project)])
overrides = [
    "train.epochs=1",
    "output=/work/outputs",
    f"data.train={project}/data/sample-small",
]
made = pack(load("dev", overrides, start=project), project / "nbs" / "train.ipynb")
Path("/work/bundle.tar.gz").write_bytes(made.archive)
