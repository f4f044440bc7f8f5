#!/usr/bin/env bash
# Runs an experiment of docs/results.md from data to tables:
#   bash experiments/run.sh photos OUT PHOTOS   # photographs at 4x; PHOTOS: a folder of at least a hundred photographs
#   bash experiments/run.sh fashion OUT         # Fashion-MNIST at 4x
#   bash experiments/run.sh orl OUT             # the ORL faces at 4x and 8x
# Steps: data, training, schedule search, evaluation, then docs/results/NAME.json and docs/results.md.
# Running the command again continues an interrupted experiment; finished steps are not repeated.
# Paths are relative to the repository. --dry-run (before NAME) prints the commands without running them.
# SR3_STAGES: a subset of "data train search evaluate collect". SR3_PYTHON: the Python interpreter.
# SR3_REHEARSE=1: a smoke test, with everything as small as possible; docs/ is not changed.
set -euo pipefail

fail() {
    echo "$1" >&2
    exit 2
}

dry=
if [[ ${1:-} == --dry-run ]]; then
    dry=1
    shift
fi
name=${1:-} out=${2:-} photos=${3:-}
[[ $name =~ ^(photos|fashion|orl)$ ]] || fail "run.sh: NAME must be photos, fashion or orl, got '$name'."
[[ -n $out ]] || fail "run.sh: OUT, the output folder, is missing: bash experiments/run.sh $name OUT"
case $name in
    photos)
        (($# == 3)) || fail "run.sh: photos needs OUT and PHOTOS: bash experiments/run.sh photos OUT PHOTOS"
        ;;
    *)
        (($# == 2)) || fail "run.sh: $name takes only OUT, got: ${*:2}"
        ;;
esac
stages=${SR3_STAGES:-data train search evaluate collect}
for stage in $stages; do
    [[ $stage =~ ^(data|train|search|evaluate|collect)$ ]] ||
        fail "run.sh: SR3_STAGES takes data, train, search, evaluate and collect, got '$stage'."
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${SR3_PYTHON:-python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

small() { :; } # options that make a command small
docs=docs
if [[ -n ${SR3_REHEARSE:-} ]]; then
    docs=$out/docs
    small() {
        case $1 in
            train) echo --config.train.num_steps=2 --config.train.batch_size=2 --config.eval.num_images=2 \
                --config.train.log_every=1 ;;
            experiments.train_classifier) echo --steps 2 --batch 8 ;;
            search-schedule) [[ " $* " == *" frechet "* ]] || echo --crops 4
                echo --candidates 2 --minutes 0.5 ;;
            evaluate) echo --limit 6 ;;
        esac
    }
fi

run() { # run a command, or only print it in a dry run
    if [[ -n $dry ]]; then
        printf '%q ' "$@" | sed 's/ $/\n/; s/\\,/,/g'
    else
        "$@"
    fi
}
sr3() {
    # shellcheck disable=SC2046 # small prints several options
    if [[ -n $dry ]]; then run sr3 "$@" $(small "$@"); else run "$python" -m sr3_jax "$@" $(small "$@"); fi
}
stage() { [[ " $stages " == *" $1 "* ]]; }
train() { # WORKDIR CONFIG OVERRIDES...
    [[ -n $dry ]] || "$python" -m experiments.collect stamp "$out/$1"
    sr3 train --config="configs/$2.py" --workdir="$out/$1" "${@:3}"
}
best() { # the regression's weights with the highest held-out PSNR
    run cp "$out/$1/best.safetensors" "$out/$1.safetensors"
}
classifier() { # FILE OPTIONS...
    [[ -n $dry || ! -f $out/$1 ]] || return 0
    sr3 train-classifier "${@:2}" -o "$out/$1"
}
small_classifier() { # FILE OPTIONS...: trained from scratch
    [[ -n $dry || ! -f $out/$1 ]] || return 0
    # shellcheck disable=SC2046 # small prints several options
    run "$python" -m experiments.train_classifier "${@:2}" -o "$out/$1" $(small experiments.train_classifier)
}
searched() { # INTO MODEL COPY DATA OPTIONS...: search a schedule for the ancestral sampler, stored next to a copy of the model
    sr3 export "$out/$2" -o "$out/$3"
    sr3 search-schedule --model "$out/$3" --data "$4" --solver ancestral --minutes 6 --no-store "${@:5}" -o "$out/$1"
    run "$python" -m experiments.collect store "$out/$1/search.json" "$out/$3"
}
evaluate() { # FOLDER MODELS... -- OPTIONS...
    local into=$1 models=()
    shift
    while [[ $1 != -- ]]; do
        models+=(--model "$out/$1")
        shift
    done
    sr3 evaluate "${models[@]}" "${@:2}" -o "$out/$into"
}

few=5,10,25 more=100 sweep=2,5,10,25,100
[[ -z ${SR3_REHEARSE:-} ]] || few=1,2 more=3 sweep=2
solvers=ddpm,ancestral,ddim,dpmpp_2m,heun

photos_4x() {
    if stage data && [[ -n $dry || ! -d $out/tiles ]]; then
        run "$python" experiments/split_photos.py "$photos" "$out/split"
        run mv "$out/split/train" "$out/split/tiles" "$out"
    fi
    # The data sets made from these photographs stay in this folder.
    [[ -z $dry ]] || echo "export SR3_DATA_DIR=$out/data"
    export SR3_DATA_DIR=$out/data
    if stage data && [[ -n $dry || ! -d $out/data/photos_probe ]]; then
        for part in gallery probe; do sr3 prepare "$out/split/$part" --name "photos_$part" --overwrite; done
    fi
    if stage data && [[ -n $dry || ! -d $out/sweep_tiles ]]; then # one tile per photograph
        run mkdir -p "$out/new_tiles"
        run find "$out/tiles" -name '*-3.png' -exec cp -t "$out/new_tiles" '{}' +
        run mv "$out/new_tiles" "$out/sweep_tiles"
    fi
    local recipe=(--config.data.source="folder:$out/train" --config.train.num_steps=8000 --config.optim.decay=cosine
        --config.optim.ema_decay=0.999 --config.eval.every=1000 --config.checkpoint.every=1000 --config.checkpoint.keep=1)
    if stage train; then
        train sr3 photos_4x_small "${recipe[@]}"
        train regression photos_4x_small "${recipe[@]}" --config.model.regression
        train sr3_l1 photos_4x_small "${recipe[@]}" --config.diffusion.norm=l1
        best regression
        classifier classifier.safetensors --data tfds:photos_gallery:train \
            --eval-data tfds:photos_probe:train
    fi
    if stage search; then
        sr3 search-schedule --model "$out/sr3" --data photos:test --metric lpips --steps 5 --minutes 6 -o "$out/search"
        searched search_ancestral sr3 searched.safetensors photos:test --metric lpips --steps 25
    fi
    if stage evaluate; then
        evaluate evaluation sr3 regression.safetensors sr3_l1 -- \
            --data "folder:$out/tiles" --steps "$few,$more" --unsearched --batch 16
        evaluate patches sr3 regression.safetensors sr3_l1 searched.safetensors -- --data "folder:$out/tiles" --patch 64 --batch 16
        evaluate recognition sr3 regression.safetensors sr3_l1 -- --data tfds:photos_probe:train --steps $few \
            --unsearched --batch 32 --classifier "$out/classifier.safetensors" --features none
        evaluate diversity sr3 sr3_l1 -- --data "folder:$out/sweep_tiles" --steps 25 --samples 2 --batch 15
        evaluate searched searched.safetensors regression.safetensors -- --data "folder:$out/tiles" --solver ancestral --steps 25 \
            --unsearched --batch 16
        evaluate sweep sr3 regression.safetensors -- --data "folder:$out/sweep_tiles" \
            --solver $solvers --steps $sweep --unsearched --features none --batch 15
    fi
}

fashion_4x() {
    if stage data; then run "$python" experiments/make_dataset.py fashion_mnist; fi
    if stage train; then
        train sr3 fashion_4x
        train regression fashion_4x --config.model.regression
        train sr3_l1 fashion_4x --config.diffusion.norm=l1
        best regression
        small_classifier classifier.safetensors --data tfds:fashion_mnist:train --eval-data tfds:fashion_mnist:test \
            --steps 2000 --width 16 --augment 0.5
    fi
    if stage search; then
        searched search_ancestral sr3 searched.safetensors 'tfds:fashion_mnist:test[5000:]' --metric frechet --steps 10 \
            --crops 256
    fi
    if stage evaluate; then
        evaluate evaluation sr3 regression.safetensors sr3_l1 -- --data tfds:fashion_mnist:test --limit 2000 \
            --steps $few --batch 100 --classifier "$out/classifier.safetensors" --features alexnet
        evaluate diversity sr3 sr3_l1 -- --data tfds:fashion_mnist:test --limit 500 --samples 2 --batch 100 \
            --features none
        evaluate searched searched.safetensors regression.safetensors -- --data tfds:fashion_mnist:test --limit 2000 \
            --solver ancestral --steps 10 --unsearched --batch 100 --classifier "$out/classifier.safetensors" \
            --features alexnet
        evaluate sweep sr3 regression.safetensors -- --data tfds:fashion_mnist:test --limit 300 --solver $solvers \
            --steps $sweep --batch 100 --classifier "$out/classifier.safetensors" --features alexnet
    fi
}

orl() {
    if stage data; then run "$python" experiments/make_dataset.py orl_faces; fi
    if stage train; then
        for scale in 8x 4x; do
            train $scale/sr3 orl_$scale
            train $scale/regression orl_$scale --config.model.regression
            best $scale/regression
        done
        local people=(--data tfds:orl_faces:gallery --eval-data tfds:orl_faces:probe)
        small_classifier classifier.safetensors "${people[@]}" --steps 300 --batch 20 --width 16
        classifier alexnet.safetensors "${people[@]}"
    fi
    if stage search; then
        searched 8x/search_ancestral 8x/sr3 8x/searched.safetensors tfds:orl_faces:gallery --metric lpips --steps 10
    fi
    if stage evaluate; then
        for scale in 8x 4x; do
            evaluate $scale/evaluation $scale/sr3 $scale/regression.safetensors -- --data tfds:orl_faces:probe \
                --steps $few --batch 20 --classifier "$out/classifier.safetensors" --features alexnet
            evaluate $scale/recognition $scale/sr3 $scale/regression.safetensors -- --data tfds:orl_faces:probe \
                --steps $few --batch 20 --classifier "$out/alexnet.safetensors" --features none
        done
        evaluate 8x/searched 8x/searched.safetensors 8x/regression.safetensors -- --data tfds:orl_faces:probe \
            --solver ancestral --steps 10 --unsearched --batch 20 --features alexnet
        evaluate 8x/sweep 8x/sr3 8x/regression.safetensors -- --data tfds:orl_faces:probe \
            --solver $solvers --steps $sweep --features none --batch 20
    fi
}

case $name in
    photos) photos_4x ;;
    fashion) fashion_4x ;;
    orl) orl ;;
esac
if stage collect; then
    credits=()
    [[ -z $photos || ! -f $photos/ATTRIBUTION.csv ]] || credits=(--credits "$photos/ATTRIBUTION.csv")
    run "$python" -m experiments.collect results "$name" "$out" --docs "$docs" "${credits[@]}"
    run "$python" -m experiments.pages results --docs "$docs"
    [[ -n $dry ]] || echo "Wrote $docs/results.md in $((SECONDS / 60)) min $((SECONDS % 60)) s"
fi
