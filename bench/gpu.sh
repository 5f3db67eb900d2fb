#!/usr/bin/env bash
# One command for a GPU host: build, gpu-marked tests, every kernel bench, the head, training steps of a 0.6B and an 8B
# shape with their memory beside `mgrpo plan`'s, shared prefixes, two ranks over NCCL where two GPUs are, vLLM where it
# is installed; one table, bench/baselines/<gpu>.json. Needs nothing from a network: torch, triton, transformers, peft,
# pydantic, msgspec, rich, numpy, pybind11, cmake, pytest, pytest-timeout and pytest-xdist come from the Python named by
# PYTHON. No step runs longer than its own limit or than what is left of SECONDS_LIMIT (530). TESTS=0 leaves the tests
# out.
#
# DEVICE=cpu goes through the same steps with tiny sizes and writes JSON=<path> alone: it shows that they run, and its
# figures mean nothing. Steps that need a GPU, a compiler or a server are left out there.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
VLLM_PYTHON=.venv-vllm/bin/python # what tests_vllm starts its servers with
export PYTHONPATH=${PYTHONPATH:-.}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
SECONDS=0
failed=()

# within LIMIT NAME COMMAND...: run it, note NAME if it fails.
within() {
  local limit=$1 name=$2 left=$((${SECONDS_LIMIT:-530} - SECONDS)) began=$SECONDS status
  shift 2
  if ((left <= 0)); then
    echo "$name: no time left"
    failed+=("$name")
    return 1
  fi
  timeout $((limit < left ? limit : left)) "$@"
  status=$?
  echo "$name: $((SECONDS - began)) s"
  if ((status)); then
    echo "$name: failed with status $status"
    failed+=("$name")
  fi
  return $status
}

# bench LIMIT NAME ARGUMENTS...: python -m bench.bench_ARGUMENTS on the device; its figures are NAME's in the table.
bench() {
  local limit=$1 name=$2 module=$3
  shift 3
  within "$limit" "$name" "$PYTHON" -m "bench.bench_$module" "$@" --device "$DEVICE" --json "$out/$name.json"
}

if [ "$DEVICE" = cuda ]; then
  echo "== build"
  within 60 configure cmake -S . -B "$out/build" -DCMAKE_BUILD_TYPE=Release \
    -DPython_EXECUTABLE="$("$PYTHON" -c 'import sys; print(sys.executable)')" \
    -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)" >"$out/cmake.log" 2>&1 || { cat "$out/cmake.log"; exit 1; }
  within 120 build cmake --build "$out/build" -j >"$out/build.log" 2>&1 || { cat "$out/build.log"; exit 1; }
  cp "$out"/build/_C*.so mgrpo/

  if [ "${TESTS:-1}" = 1 ]; then
    echo "== gpu tests"
    within 150 tests "$PYTHON" -m pytest -q -m gpu -n auto -o filterwarnings=default tests/test_triton.py tests/test_gpu.py \
      tests/test_hf_load.py
  fi

  echo "== kernels and the head"
  bench 40 group_advantage group_advantage
  bench 60 grpo_loss grpo_loss --rounds 5
  bench 80 linear_grpo_loss linear_grpo_loss --rounds 3

  echo "== training steps"
  bench 90 step_0.6b train_step --model qwen3-0.6b --rounds 3 --plan
  bench 90 step_0.6b_compiled train_step --model qwen3-0.6b --compile --rounds 3
  bench 90 prefix prefix --shape rollouts fork cut nothing
  # All of an 8B's weights, gradients and Adam's state are 131 GB: adapters on one GPU.
  bench 110 step_8b_lora train_step --model qwen3-8b --lora 16 --checkpointing --ours-only --rounds 3 --plan
  bench 110 step_8b_lora_compiled train_step --model qwen3-8b --lora 16 --checkpointing --compile --rounds 3

  if [ "$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')" -ge 2 ]; then
    echo "== two ranks"
    bench 80 two_ranks ranks --model qwen3-0.6b
  else
    echo "two_ranks: one GPU here, not run"
  fi

  if [ -f models/smollm2/config.json ] && "$VLLM_PYTHON" -c 'import vllm' 2>/dev/null; then
    echo "== vLLM, patches in place"
    within 120 vllm "$PYTHON" -m pytest -q -p no:cacheprovider tests_vllm/test_patch.py -k twenty
  else
    echo "vllm: no $VLLM_PYTHON with vllm, or no models/smollm2, not run"
  fi
else
  bench 300 group_advantage group_advantage --quick
  bench 300 step_tiny train_step --model tiny-qwen3 --tokens 2048 --micro-batch 2048 --quick --plan
  bench 300 step_tiny_lora train_step --model tiny-qwen3 --lora 2 --checkpointing --tokens 2048 --micro-batch 2048 \
    --quick
  bench 300 prefix prefix --model tiny-qwen3 --scale 0.03 --quick
  bench 300 two_ranks ranks --model tiny-qwen3 --tokens 2048 --mebibytes 1
fi

"$PYTHON" - "$out" "$DEVICE" "${JSON:-}" "${failed[*]:-}" <<'PY' || failed+=("table")
import json, pathlib, sys
import torch

folder, device, target, failed = pathlib.Path(sys.argv[1]), *sys.argv[2:5]
name = torch.cuda.get_device_name().lower().replace(" ", "-") if device == "cuda" else "cpu"
whole = {"gpu": name, "torch": torch.__version__, "failed": failed.split()}
print(f"\n== {name}, torch {torch.__version__}")
for path in sorted(folder.glob("*.json")):
    whole[path.stem] = json.loads(path.read_text())
    for f in whole[path.stem]["figures"]:
        print(f"{path.stem:18} {f['item']:52} {f['value']:12.4g} {f['unit']:4} {f['verdict']}")
path = pathlib.Path(target or f"bench/baselines/{name}.json")
path.write_text(json.dumps(whole, indent=1) + "\n")
print(f"wrote {path}")
PY
echo "$SECONDS s in all"
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
