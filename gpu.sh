#!/usr/bin/env bash
# all that wants a GPU, in one go on a fresh machine: speeds, profiles, and four runs of real text in turn.
# what is finished is not done again, so that the same command goes on after an interruption.
#
#   ./gpu.sh                # one GPU, 124M, 350M and 774M: results in out/gpu
#   SMALL=1 ./gpu.sh        # the same commands at a size that two CPU cores do in some minutes
#   STEPS=2000 ./gpu.sh     # updates of each of the four runs; default 1000
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python}
out=${OUT:-out/gpu}
steps=${STEPS:-1000}
rounds=25
size=()
text=(--dataset=pystdlib --batch_size=32 --gradient_accumulation_steps=1 --warmup_iters=100
      --eval_interval=100 --eval_tokens=524288 --eval_train_tokens=524288)
if [ -n "${SMALL:-}" ]; then
    out=${OUT:-out/gpu-small} steps=${STEPS:-20} rounds=6
    size=(--with config/cpu.py)
    text=(--eval_tokens=8192 --eval_train_tokens=8192 --eval_interval=10 --warmup_iters=5)
fi
mkdir -p "$out"

# measure NAME ARGUMENT...: bench.py's output in $out/NAME.txt, and each config's profile in $out/NAME/
measure() {
    local name=$1
    shift
    [ -e "$out/$name.txt" ] && return
    "$python" bench.py "$@" "${size[@]}" --rounds=$rounds --profile="$out/$name" | tee "$out/$name.part"
    mv "$out/$name.part" "$out/$name.txt"
}

"$python" data/pystdlib/prepare.py
measure 124M --textbook
measure 124M-tp4 --tp_size=4
measure 350M config/train_350M.py config/train_350M_24comm.py config/train_350M_2comm.py
measure 774M config/train_774M.py config/train_774M_36comm.py config/train_774M_2comm.py

"$python" sweep.py config/train_gpt2_{12,6,2}comm.py "${size[@]}" "${text[@]}" \
    --max_iters="$steps" --seed=1 --wandb_log=False --log_drift=True --out="$out/runs-$steps"
"$python" compare.py "$out/runs-$steps" --out="$out/compare-$steps"
