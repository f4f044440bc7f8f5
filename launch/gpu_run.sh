#!/usr/bin/env bash
# Uses an hour of a GPU, stage by stage: bash launch/gpu_run.sh STAGE OUT [...]
#   test OUT                           run the core's tests on the device
#   measure OUT [PRESET:BATCH ...]     time training and sampling of the presets next to PyTorch: OUT/speed.json
#   train OUT MINUTES PHOTOS [INIT]    train photos_4x on a folder of photographs, from the weights of the model INIT:
#                                      OUT/photo_4x.safetensors (moving average, bfloat16) and OUT/metrics.jsonl
#   evaluate OUT [DATA ...]            evaluate OUT/photo_4x.safetensors at 5, 10, 25 and 50 steps on each data source
# PYTHON names the interpreter (default python3). SR3_GPU_REHEARSE=1 runs everything on the CPU, as small as possible.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
    echo "$1" >&2
    exit 2
}

(($# >= 2)) || fail "gpu_run.sh: STAGE (test, measure, train or evaluate) and OUT are missing."
stage=$1 out=$2
shift 2
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# PyTorch shares the device in `measure`, so JAX must not preallocate most of its memory.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
rehearse=${SR3_GPU_REHEARSE:-}
if [[ -z $rehearse ]]; then
    export JAX_PLATFORMS=cuda,cpu
    "$python" -c 'import jax; print(jax.devices()[0].device_kind)'
fi

case $stage in
test)
    "$python" -m pytest -q -p no:cacheprovider tests/test_process.py tests/test_schedule.py tests/test_space.py \
        tests/test_loss.py tests/test_solvers.py tests/test_guidance.py tests/test_unet.py tests/test_image_ops.py \
        tests/test_metrics.py "$@" \
        2>&1 | tee "$out/test.log"
    ;;
measure)
    presets=("$@")
    if ((${#presets[@]} == 0)); then
        presets=(faces_16_128:32 imagenet_64_256:8 faces_64_512:4 faces_256_1024:2 base_imagenet_64:16 photos_4x:256
            photos_4x_robust:256)
    fi
    [[ -e $out/speed.json ]] || cp docs/speed.json "$out/" # rows of other devices are kept
    for item in "${presets[@]}"; do # one process each, so that peak memory is measured separately
        "$python" benchmarks/speed.py "$item" -o "$out/speed.json" ${rehearse:+--calls 1 --small} ||
            echo "gpu_run.sh: measuring $item failed" >&2
    done
    ;;
train)
    (($# >= 2)) || fail "gpu_run.sh: train needs OUT, MINUTES and PHOTOS, a folder of photographs."
    minutes=$1 photos=$2 init=${3:-}
    overrides=(--config.data.source="folder:$photos" --config.data.cache_mb=4000 --config.train.minutes="$minutes"
        --config.data.threads=12 --config.data.crop=128 --config.train.batch_size=128)
    if [[ -n $rehearse ]]; then
        overrides+=(--config.train.batch_size=2 --config.data.crop=32 --config.data.threads=2)
    fi
    if [[ -n $init ]]; then overrides+=(--config.train.init_from="$init"); fi
    "$python" -m sr3_jax train --config=configs/photos_4x.py --workdir="$out/run" "${overrides[@]}"
    "$python" -m sr3_jax export "$out/run" -o "$out/photo_4x.safetensors" --dtype bfloat16
    cp "$out/run/metrics.jsonl" "$out/run/config.json" "$out/"
    ;;
evaluate)
    sources=("$@")
    if ((${#sources[@]} == 0)); then sources=(photos:test); fi
    steps=5,10,25,50
    if [[ -n $rehearse ]]; then steps=1,2; fi
    for index in "${!sources[@]}"; do
        "$python" -m sr3_jax evaluate --model "$out/photo_4x.safetensors" --data "${sources[$index]}" --steps "$steps" \
            -o "$out/evaluation-$index" ${rehearse:+--limit 2 --crop 64}
    done
    ;;
*)
    fail "gpu_run.sh: STAGE must be test, measure, train or evaluate, got '$stage'."
    ;;
esac
