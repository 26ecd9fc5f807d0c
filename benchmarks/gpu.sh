#!/usr/bin/env bash
# The tests that use a GPU and benchmarks/gpu.py, in one run on a machine that needs no network.
#   benchmarks/gpu.sh pack            where there is a network: puts what that machine lacks into .gpu
#   benchmarks/gpu.sh run [FOLDER]    there, beside the checkout and .gpu: about six minutes
# The results come into FOLDER (benchmarks/results): DEVICE.json and DEVICE.txt, to be committed.
# PYTHON is the Python that has CUDA's torch (python3). Where gpuml is installed already, .gpu is not needed.
set -euo pipefail
cd "$(dirname "$0")/.."

pack() {
  local python=.venv/bin/python
  [ -x $python ] || python=python3
  PYTHONPATH=. $python benchmarks/parcel.py pack
}

run() {
  local results=${1:-benchmarks/results} python=${PYTHON:-python3} log workers status=0
  mkdir -p "$results"
  log=$(mktemp)
  if [ -d .gpu/wheels ] && [ ! -d .gpu/site ]; then $python benchmarks/parcel.py unpack; fi
  export PYTHONPATH="$PWD:$PWD/.gpu/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
  workers=$($python -c "import xdist" 2>/dev/null && echo "-n 4 --dist worksteal" || true)
  { timeout -s INT 200 $python -m pytest -o addopts= -q -ra --durations=12 -p no:cacheprovider $workers tests/gpu \
      || { status=$?; echo "the tests ended with $status"; }
    $python benchmarks/gpu.py --results "$results" || status=$?
    exit $status; } 2>&1 | tee "$log" || status=$?
  cat "$log" > "$results/$($python -c "import sys; sys.path.insert(0, 'benchmarks'); import gpu; print(gpu.file_name((gpu.devices() or ['no gpu'])[0]))").txt"
  return $status
}

case ${1:-} in
  pack) pack ;;
  run) run "${2:-}" ;;
  *) sed -n '2,6s/^# //p' "$0"; exit 2 ;;
esac
