#!/usr/bin/env bash
# Builds wheel and sdist in isolation, installs each into an environment with nothing but numpy, and uses it there.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$PYTHON" -m venv "$work/build"
"$work/build/bin/python" -m pip install -q --disable-pip-version-check build
"$work/build/bin/python" -m build --outdir "$work/dist" . >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }

use='
import json, numpy as np, fusedopt
p = np.ones(1000, np.float32)
fusedopt.adamw_step([p], [p.copy()], [0 * p], [0 * p], step=1)
assert abs(p[0] - 0.99899) < 1e-6, p[0]
assert fusedopt.env()["packages"]["torch"] == "not installed"
print("used", fusedopt.__version__, "on", fusedopt.env()["isa"], "from", fusedopt.__file__.split("/")[-3])
'
for package in "$work"/dist/*.whl "$work"/dist/*.tar.gz; do
  rm -rf "$work/bare"
  "$PYTHON" -m venv "$work/bare"
  FUSEDOPT_CUDA=0 "$work/bare/bin/python" -m pip install -q --disable-pip-version-check "$package"
  (cd "$work" && bare/bin/python -c "$use")
done

wheel=$(ls "$work"/dist/*.whl)
unzip -q -o "$wheel" -d "$work/wheel"
module=$(ls "$work"/wheel/fusedopt/_C*.so)
test "$(nm -D --defined-only "$module" | awk '{print $NF}')" = PyInit__C
if objdump -p "$module" | grep NEEDED | grep -v -e 'libc\.so' -e ld-linux; then echo "unwanted library"; exit 1; fi
size=$(stat -c %s "$wheel")
test "$size" -lt 5000000
test -f "$work/wheel/fusedopt/py.typed"
test -f "$work/wheel/fusedopt/triton_kernels/adamw.py"
test ! -e "$work/wheel/triton_kernels"  # that name is another project's
echo "wheel: $(basename "$wheel"), $size bytes, one exported symbol, links only libc"
