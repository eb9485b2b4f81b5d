#!/usr/bin/env bash
# Checks that need NVIDIA GPUs: kernels, the demo model's tokens, decoding speed.
# Needs nvcc of a CUDA 13 toolkit, g++ and Python >= 3.10; installs into .venv-gpu.
set -euo pipefail
cd "$(dirname "$0")/.."

python3 -m venv .venv-gpu
. .venv-gpu/bin/activate
pip install --quiet --editable '.[cuda,dev]'

capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
arch=sm_$capability
[ "$arch" = sm_90 ] && arch=sm_90a
gpus=$(nvidia-smi --list-gpus | wc -l)
export SHARDWRIGHT_ARCHS=$arch

python -m pytest -m gpu

bench=()
for n in 1 2 4 8; do
    [ "$n" -le "$gpus" ] || continue
    shardwright build --model demo/model --target cuda --arch "$arch" --use-cuda-graph \
        --num-shards "$n" --max-batch-size 1 -o "dist/gpu-demo-$n"
    bench+=("dist/gpu-demo-$n")
done
python scripts/bench_decode.py "${bench[@]}" --context 128 --tokens 256
