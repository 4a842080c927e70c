#!/usr/bin/env bash
# Everything that needs a GPU, in about 8 minutes: build, the tests marked gpu, compute-sanitizer, CUDA graphs, speed.
#   bench/gpu_lab.sh             on a machine with a GPU, nvcc, torch, pybind11, cmake and ninja; fetches nothing
#   bench/gpu_lab.sh --dry-run   every step on the CPU, with the GPU's part faked
# Results: $OUT (or --out), else bench/results/gpu_lab. Exit status 1 if a step failed; the others have run all the same.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m bench.gpu_lab "$@"
