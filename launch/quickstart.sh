#!/usr/bin/env bash
# From a clone to results in under ten minutes on two cores: bash launch/quickstart.sh
# Installs, upscales a photograph with the shipped model, trains a small model, and compares both with bicubic.
# Every run gets its own folder, out/quickstart/DATE-TIME; out/quickstart/*.png are the images of the latest run.
# SR3_QUICKSTART_MINUTES: training time (default 4). SR3_PYTHON: the Python to install with.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
    echo "$1" >&2
    exit 2
}

minutes=${SR3_QUICKSTART_MINUTES:-4}
(($# == 0)) || fail "quickstart.sh takes no arguments, got: $*; set SR3_QUICKSTART_MINUTES for the training time."
[[ $minutes =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)$ && $minutes =~ [1-9] ]] ||
    fail "SR3_QUICKSTART_MINUTES must be a positive number, got '$minutes'."

bash launch/setup_venv.sh
sr3=.venv/bin/sr3
out=out/quickstart
here=$out/$(date +%Y%m%d-%H%M%S)
photo=sr3_jax/data/photos/test/kingfisher.jpg
mkdir -p "$here"

echo
echo "== 1 of 3: upscale a photograph with the shipped model, photo_4x"
.venv/bin/python launch/downscale.py "$photo" "$here/kingfisher_low_res.png" 4
"$sr3" upscale "$here/kingfisher_low_res.png" -o "$here/kingfisher_4x.png" --model photo_4x

echo
echo "== 2 of 3: train configs/photos_4x_small.py for $minutes min"
"$sr3" train --config=configs/photos_4x_small.py --workdir="$here/run" --config.train.minutes="$minutes"

echo
echo "== 3 of 3: compare on the test photographs"
"$sr3" evaluate --model "$here/run" --model photo_4x --data photos:test -o "$here/evaluation"

cp "$here"/*.png "$here"/evaluation/*.png "$out/"
echo
echo "Images: $(cd "$out" && echo *.png) in $out"
echo "This run: $here (to continue training: $sr3 train --config=configs/photos_4x_small.py --workdir=$here/run)"
echo "Your own images: $sr3 upscale IMAGE_OR_FOLDER -o OUT"
echo "Took $((SECONDS / 60)) min $((SECONDS % 60)) s"
