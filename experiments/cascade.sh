#!/usr/bin/env bash
# The small cascade from nothing to its figures in docs/cascade.md: under an hour of one core.
#   bash launch/cascade.sh OUT
# Data, three stages, the two SR stages again without augmentation of their condition (the paper's ablation), a
# classifier, a page of images, the measurements. What is done is not done again.
# SR3_REHEARSE=1: a few steps of each, to see that everything runs; docs/ is left alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
(($# == 1)) || {
    echo "cascade.sh takes a folder for its results: bash launch/cascade.sh OUT" >&2
    exit 2
}
out=$1
python=${PYTHON:-python}
sr3=("$python" -m sr3_jax)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
short=() classify=(--steps 2500) measure=() draw=(-n 100) docs=docs/cascade
if [[ -n ${SR3_REHEARSE:-} ]]; then
    short=(--config.train.num_steps=2 --config.train.batch_size=8 --config.eval.num_images=8)
    classify=(--steps 2) draw=(-n 4 --steps 2) docs=$out/docs
    measure=(--count 100 --guidance 1 2 --strengths 0 0.2)
fi
mkdir -p "$out/plain"

"$python" launch/make_dataset.py fashion_mnist_32
"${sr3[@]}" train --config=configs/cascade_fashion_32.py --workdir="$out/cascade" "${short[@]}"
for stage in sr_16:fashion_8_16 sr_32:fashion_16_32; do
    "${sr3[@]}" train --config="configs/${stage#*:}.py" --workdir="$out/plain/${stage%%:*}" "${short[@]}" \
        --config.model.augment=false --config.data.augment=none
done
[[ -f $out/classifier.safetensors ]] ||
    "${sr3[@]}" train-classifier --data tfds:fashion_mnist_32:train --eval-data tfds:fashion_mnist_32:test \
        -o "$out/classifier.safetensors" "${classify[@]}"
"$python" launch/cascade_measure.py "$out" --classifier "$out/classifier.safetensors" -o "$docs/measured.json" "${measure[@]}"
settings=$("$python" launch/cascade_doc.py --settings "$docs/measured.json")
# shellcheck disable=SC2086 # two options
"${sr3[@]}" cascade --stages "$out/cascade" "${draw[@]}" $settings -o "$out/images" --keep
"$python" launch/cascade_doc.py "$docs/measured.json" --images "$out/images" -o "$(dirname "$docs")"
