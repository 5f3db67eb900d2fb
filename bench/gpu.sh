#!/usr/bin/env bash
# One command for a GPU host: build, gpu-marked tests, every kernel bench, one table, bench/baselines/<gpu>.json.
# Needs nothing from a network: torch, triton, transformers, pydantic, msgspec, rich, numpy, pybind11, cmake, pytest,
# pytest-timeout and pytest-xdist come from the Python named by PYTHON. No step runs longer than its own limit or than
# what is left of SECONDS_LIMIT (530).
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH=${PYTHONPATH:-.}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
SECONDS=0
failed=()

# within LIMIT NAME COMMAND...: run it, note NAME if it fails.
within() {
  local limit=$1 name=$2 left=$((${SECONDS_LIMIT:-530} - SECONDS))
  shift 2
  if ((left <= 0)); then
    echo "$name: no time left"
    failed+=("$name")
    return 1
  fi
  timeout $((limit < left ? limit : left)) "$@" && return 0
  echo "$name: failed with status $?"
  failed+=("$name")
  return 1
}

echo "== build"
within 60 configure cmake -S . -B "$out/build" -DCMAKE_BUILD_TYPE=Release \
  -DPython_EXECUTABLE="$("$PYTHON" -c 'import sys; print(sys.executable)')" \
  -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)" >"$out/cmake.log" 2>&1 || { cat "$out/cmake.log"; exit 1; }
within 120 build cmake --build "$out/build" -j >"$out/build.log" 2>&1 || { cat "$out/build.log"; exit 1; }
cp "$out"/build/_C*.so mgrpo/

echo "== gpu tests"
within 180 tests "$PYTHON" -m pytest -q -m gpu -n auto -o filterwarnings=default tests/test_triton.py tests/test_gpu.py

echo "== benches"
for op in group_advantage grpo_loss linear_grpo_loss; do
  within 90 "bench_$op" "$PYTHON" -m "bench.bench_$op" --device cuda --json "$out/$op.json"
done
for model in smollm2 llama-1b; do
  within 90 "train_step_$model" "$PYTHON" -m bench.bench_train_step --model $model --device cuda \
    --json "$out/train_step_$model.json"
done

"$PYTHON" - "$out" <<'PY'
import json, pathlib, sys
import torch

folder = pathlib.Path(sys.argv[1])
name = torch.cuda.get_device_name().lower().replace(" ", "-")
whole = {"gpu": name, "torch": torch.__version__}
print(f"\n== {name}, torch {torch.__version__}")
for path in sorted(folder.glob("*.json")):
    whole[path.stem] = json.loads(path.read_text())
    for f in whole[path.stem]["figures"]:
        print(f"{path.stem:18} {f['item']:52} {f['value']:12.4g} {f['unit']:3} {f['verdict']}")
target = pathlib.Path("bench/baselines") / f"{name}.json"
target.write_text(json.dumps(whole, indent=1) + "\n")
print(f"wrote {target}")
PY
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
