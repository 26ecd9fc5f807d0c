#!/usr/bin/env bash
# The tests that use a GPU and benchmarks/gpu.py, in one run on a machine that needs no network.
#   benchmarks/gpu.sh pack            where there is a network: puts what that machine lacks into .gpu
#   benchmarks/gpu.sh run [FOLDER]    there, beside the checkout and .gpu: seven minutes at most
# The results come into FOLDER (benchmarks/results) while it runs: DEVICE.json and DEVICE.txt, to be committed.
# The output ends with the table, and the tests that failed.
# PYTHON is the Python to pack with (.venv/bin/python), and there the one that has CUDA's torch (python3).
# Where gpuml is installed already, .gpu is not needed.
set -euo pipefail
MOST=430  # seconds for everything; the tests get 180 of them at most
cd "$(dirname "$0")/.."

pack() {
  local python=${PYTHON:-.venv/bin/python}
  PYTHONPATH=. $python benchmarks/parcel.py pack
}

tests() {
  local options=(-v -ra --tb=short --durations=12 -p no:cacheprovider)
  if $python -c "import xdist" 2>/dev/null; then options+=(-n 4 --dist worksteal); fi
  if $python -c "import pytest_timeout" 2>/dev/null; then options+=(--timeout 100 --timeout-method thread); fi
  timeout --foreground -k 30 -s INT 180 $python -m pytest -o addopts= "${options[@]}" tests/gpu
}

summary() {
  echo "tests: $(grep -acE '\bPASSED\b' "$1") passed"
  grep -aE '\b(FAILED|ERROR)\b.*tests/|^[0-9]+ tests need a GPU|^=+ .*(passed|failed|error|no tests ran)' "$1" | cut -c1-180 | tail -40 || true
}

run() {
  local results=${1:-benchmarks/results} python=${PYTHON:-python3} name log
  SECONDS=0
  mkdir -p "$results"
  if [ -d .gpu/wheels ] && [ ! -d .gpu/data ]; then $python benchmarks/parcel.py unpack; fi
  export PYTHONPATH="$PWD:$PWD/.gpu/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
  name=$(PYTHONPATH=benchmarks:$PYTHONPATH $python -c "import gpu; print(gpu.file_name((gpu.devices() or ['no gpu'])[0]))" || echo gpu)
  log=$results/$name.txt
  { local status=0
    tests || { status=$?; echo "the tests ended with $status"; }
    echo "unpacked and tested in $SECONDS s"
    $python benchmarks/gpu.py --results "$results" --limit $((MOST - SECONDS)) || status=$?
    summary "$log"
    echo "all in $SECONDS s"
    exit $status; } 2>&1 | tee "$log"
}

case ${1:-} in
  pack) pack ;;
  run) run "${2:-}" ;;
  *) sed -n '2,8s/^# //p' "$0"; exit 2 ;;
esac
