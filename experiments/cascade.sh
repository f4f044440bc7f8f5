#!/usr/bin/env bash
# Trains and measures the small cascade of docs/cascade.md, in under an hour on one core:
#   bash experiments/cascade.sh OUT
# Steps: data, three stages, the two SR stages without conditioning augmentation (the paper's ablation), a classifier,
# measurements, images, docs/cascade.md. Finished steps are not repeated. SR3_PYTHON: the Python interpreter.
# SR3_REHEARSE=1: a smoke test with a few steps of each; docs/ is not changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
(($# == 1)) || {
    echo "cascade.sh takes one argument, the output folder: bash experiments/cascade.sh OUT" >&2
    exit 2
}
out=$1
python=${SR3_PYTHON:-python}
sr3=("$python" -m sr3_jax)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
short=() classify=(--steps 2500) measure=() sample=(-n 100) docs=docs
if [[ -n ${SR3_REHEARSE:-} ]]; then
    short=(--config.train.num_steps=2 --config.train.batch_size=8 --config.eval.num_images=8)
    classify=(--steps 2) sample=(-n 4 --steps 2) docs=$out/docs
    measure=(--count 100 --guidance 1 2 --strengths 0 0.2)
fi
mkdir -p "$out/plain"

"$python" experiments/make_dataset.py fashion_mnist_32
"${sr3[@]}" train --config=configs/cascade_fashion_32.py --workdir="$out/cascade" "${short[@]}"
for stage in sr_16:fashion_8_16 sr_32:fashion_16_32; do
    "${sr3[@]}" train --config="configs/${stage#*:}.py" --workdir="$out/plain/${stage%%:*}" "${short[@]}" \
        --config.model.augment=false --config.data.augment=none
done
[[ -f $out/classifier.safetensors ]] ||
    "$python" -m experiments.train_classifier --data tfds:fashion_mnist_32:train --eval-data tfds:fashion_mnist_32:test \
        -o "$out/classifier.safetensors" "${classify[@]}"
# The measurement selects guidance and augmentation strength, and prints them as options of sr3 cascade.
options=$("$python" -m experiments.measure_cascade "$out" --classifier "$out/classifier.safetensors" \
    -o "$docs/cascade/measured.json" "${measure[@]}")
# shellcheck disable=SC2086 # two options
"${sr3[@]}" cascade --stages "$out/cascade" "${sample[@]}" $options -o "$out/images" --keep
mkdir -p "$docs/images"
for image in grid stages; do cp "$out/images/$image.png" "$docs/images/cascade_$image.png"; done
"$python" -m experiments.pages cascade --docs "$docs"
