#!/usr/bin/env bash
# Checks on AMD GPUs: the self-test, the demo model's tokens on 1 and 2 GPUs, decoding speed.
# Needs ROCm 5.5 or later, g++ and Python >= 3.10; installs into .venv-amd.
set -euo pipefail
cd "$(dirname "$0")/.."

python3 -m venv .venv-amd
. .venv-amd/bin/activate
pip install --quiet --editable '.[rocm,dev]'

arch=$(rocminfo | grep -o 'gfx[0-9a-f]*' | head -n 1)
gpus=$(rocminfo | grep -c '^ *Device Type: *GPU')
bench=()
for n in 1 2; do
    [ "$n" -le "$gpus" ] || continue
    out=dist/amd-demo-$n
    shardwright build --model demo/model --target rocm --arch "$arch" --num-shards "$n" \
        --max-batch-size 4 -o "$out"
    shardwright inspect "$out" --verify
    shardwright selftest "$out" --target rocm
    python tests/demo.py "$out"
    bench+=("$out")
done
python scripts/bench_decode.py "${bench[@]}" --context 128 --tokens 256
