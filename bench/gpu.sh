#!/usr/bin/env bash
# One command for a GPU host: build, gpu-marked tests, every kernel bench, one table, bench/baselines/<gpu>.json.
# Needs nothing from a network: torch, triton, pybind11, cmake and pytest come from the Python named by PYTHON. Every
# step has its own deadline; together they stay under 9 minutes.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH=${PYTHONPATH:-.}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

echo "== build"
timeout 120 cmake -S . -B "$out/build" -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$("$PYTHON" -c 'import sys; print(sys.executable)')" \
  -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)" >"$out/cmake.log" || { cat "$out/cmake.log"; exit 1; }
timeout 120 cmake --build "$out/build" -j >"$out/build.log" || { cat "$out/build.log"; exit 1; }
cp "$out"/build/_C*.so mgrpo/

echo "== gpu tests"
timeout 150 "$PYTHON" -m pytest -q -m gpu tests/test_triton.py

echo "== benches"
failed=0
for op in group_advantage grpo_loss linear_grpo_loss; do
  timeout 100 "$PYTHON" -m "bench.bench_$op" --device cuda --json "$out/$op.json" || { echo "bench_$op failed"; failed=1; }
done
timeout 60 "$PYTHON" -m bench.bench_compile --json "$out/compile.json" || failed=1

"$PYTHON" - "$out" <<'PY'
import json, pathlib, sys
import torch

folder = pathlib.Path(sys.argv[1])
name = torch.cuda.get_device_name().lower().replace(" ", "-")
whole = {"gpu": name, "torch": torch.__version__}
for path in sorted(folder.glob("*.json")):
    whole[path.stem] = json.loads(path.read_text())
target = pathlib.Path("bench/baselines") / f"{name}.json"
target.write_text(json.dumps(whole, indent=1) + "\n")
print(f"wrote {target}")
PY
exit $failed
