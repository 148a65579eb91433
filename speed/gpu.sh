#!/usr/bin/env bash
# everything that needs a GPU, in one go on a fresh machine: speeds, profiles, and runs of real text at three
# widths. what is finished is not done again, so the same command continues after an interruption.
#
#   speed/gpu.sh                # one GPU, 124M, 350M and 774M: results in out/gpu
#   SMALL=1 speed/gpu.sh        # the same commands at a size that takes two CPU cores a few minutes
#   SPEED=1 speed/gpu.sh        # without the runs: speeds and profiles, the most important ones first
#   SEEDS=1 speed/gpu.sh        # the seeds of each run; default: 1,2,3
#
# PYTHON is the interpreter, OUT the folder of the results
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=${OUT:-out/gpu}
rounds=25
size=() largest=(--largest)
runs=(--with config/gpu.py --n_embd=192,384,768 --seed="${SEEDS:-1,2,3}" --jobs 4)
if [ -n "${SMALL:-}" ]; then
    out=${OUT:-out/gpu-small} rounds=6
    size=(--with config/cpu.py --n_embd=32 --batch_size=4 --vocab_size=512) largest=(--batch_size=6)
    runs=(--with config/gpu.py --with config/cpu.py --n_embd=16,32,64 --seed="${SEEDS:-1}" --jobs 2
          --eval_tokens=8192 --eval_train_tokens=8192 --eval_interval=10 --max_iters=20 --warmup_iters=5)
fi
mkdir -p "$out"

# measure NAME ARGUMENT...: bench.py's output in $out/NAME.txt, its numbers in NAME.json, profiles in NAME/
measure() {
    local name=$1 profile=(--profile="$out/$1")
    shift
    [[ $1 = --decode ]] && profile=()  # only steps have one
    [ -e "$out/$name.txt" ] && return
    "$python" bench.py "$@" --rounds=$rounds --json="$out/$name.json" "${profile[@]}" |
        tee "$out/$name.part" || return 1
    mv "$out/$name.part" "$out/$name.txt"
}

"$python" data/pystdlib/prepare.py
measure 124M --textbook "${size[@]}"
# the recipe's step, five micro-batches; then as many windows in one as fit
measure 124M-recipe config/train_gpt2_12comm.py "${size[@]}" --micro_steps=5
measure 124M-largest config/train_gpt2_12comm.py "${size[@]}" "${largest[@]}" --micro_steps=5
measure 124M-tp4 config/train_gpt2_{24,12,2}comm.py "${size[@]}" --tp_size=4
measure 350M config/train_350M.py config/train_350M_24comm.py config/train_350M_2comm.py "${size[@]}"
measure 774M config/train_774M.py config/train_774M_36comm.py config/train_774M_2comm.py "${size[@]}"
measure 774M-tp4 config/train_774M.py config/train_774M_2comm.py "${size[@]}" --tp_size=4
measure 774M-recomputed config/train_774M.py config/train_774M_2comm.py "${size[@]}" --tp_size=4 --recompute_layers=36
measure 124M-decode --decode --textbook "${size[@]}"
[ -n "${SPEED:-}" ] && exit

"$python" sweep.py config/train_gpt2_{24,12,6,2}comm.py "${runs[@]}" --tp_size=4 --out="$out/runs"
"$python" compare.py "$out/runs" --out="$out/compare"
