#!/usr/bin/env bash
# From nothing to results in under ten minutes on two cores: bash launch/quickstart.sh
# Installs, upscales a photograph with the shipped model, trains a small one, and compares both with bicubic.
# Every run has a folder of its own, out/quickstart/DATE-TIME, so that it trains from the start and nothing of an
# earlier run is lost; out/quickstart/*.png are copies of the latest run's images.
# SR3_QUICKSTART_MINUTES: how long to train (default 4). SR3_PYTHON: the Python to install with.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
    echo "$1" >&2
    exit 2
}

minutes=${SR3_QUICKSTART_MINUTES:-4}
(($# == 0)) || fail "quickstart.sh takes no arguments, got: $*; SR3_QUICKSTART_MINUTES sets how long it trains."
[[ $minutes =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)$ && $minutes =~ [1-9] ]] ||
    fail "SR3_QUICKSTART_MINUTES must be a number of minutes above 0, got '$minutes'."

bash launch/setup_venv.sh
sr3=.venv/bin/sr3
out=out/quickstart
here=$out/$(date +%Y%m%d-%H%M%S)
photo=sr3_jax/data/photos/test/kingfisher.jpg
mkdir -p "$here"

echo
echo "== 1 of 3: upscale a photograph with the shipped model, photo_4x"
.venv/bin/python - "$photo" "$here/kingfisher_low_res.png" <<'PY'
import sys
from pathlib import Path

import jax

jax.config.update("jax_platforms", "cpu")  # a moment's work, which need not take a GPU
from sr3_jax import image_ops as images
from sr3_jax.image_io.image_file import Image, read_rgb, write_image

rgb = read_rgb(Path(sys.argv[1]))
height, width = (side // 4 * 4 for side in rgb.shape[:2])
small = images.to_uint8(images.degrade(images.to_unit(rgb[None, :height, :width]), 4))[0]
write_image(Path(sys.argv[2]), Image(jax.device_get(small)))
print(f"{sys.argv[1]}, {width}x{height} pixels, made 4x smaller")
PY
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
echo "This run: $here (to train it longer: $sr3 train --config=configs/photos_4x_small.py --workdir=$here/run)"
echo "Your own images: $sr3 upscale IMAGE_OR_FOLDER -o OUT"
echo "Took $((SECONDS / 60)) min $((SECONDS % 60)) s"
