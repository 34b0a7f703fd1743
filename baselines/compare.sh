#!/usr/bin/env bash
# The comparison of arms for one seed:    baselines/compare.sh OUT SEED [ARM]
#
# Every arm starts from the same base and is finetuned on the same labeled robot episodes. The
# _human arms see no robot video before that. A stage whose summary.json is there is skipped; one
# that was interrupted continues. Without ARM: all arms, two processes of one thread each side by
# side (faster than one process of two threads), and their success rates in OUT/arms/results.json.
set -euo pipefail
if [ $# -lt 2 ] || [ $# -gt 3 ]; then
  echo "error: usage: baselines/compare.sh OUT SEED [ARM]" >&2
  exit 2
fi
out=$1 seed=$2 arm=${3:-all} preset=${PRESET:-tiny}
cd "$(dirname "$0")/.."
unset MAKEFLAGS MAKELEVEL # of a make that called this script
export OMP_NUM_THREADS=1

from_make() { # from_make TARGET: shared stages, LAPA and SCRATCH are in the Makefile
  make --no-print-directory "$1" DATA=data/tabletop OUT="$out" SEED="$seed" PRESET="$preset" ARGS=
}
run() { # run FILE COMMAND..: unless the file, which the command makes last, is there
  if [ ! -f "$1" ]; then (set -x && .venv/bin/python "${@:2}"); fi
}
stage() { # stage FOLDER SCRIPT OPTIONS..
  run "$out/$1/summary.json" "${@:2}" \
    --out "$out/$1" --preset "$preset" --seed "$seed" --resume true
}
guess_actions() { # guess_actions VIDEOS: VPT's pseudo-actions, from an inverse dynamics model
  run "$out/$arm/actions.safetensors" -m baselines.inverse_dynamics --data "$1" \
    --labelled_data data/tabletop --labelled_where combination=seen \
    --preset "$preset" --seed "$seed" --out "$out/$arm/actions.safetensors"
}
pretrain() { # pretrain VIDEOS LABELS..
  stage "$arm/pretrain" pretrain.py --data "$1" --init_from "$out/base" --labels "${@:2}"
}
finetune() {
  stage "$arm/finetune" finetune.py --data data/tabletop --where combination=seen \
    --init_from "$out/$arm/pretrain"
}
two_at_a_time() { # two_at_a_time ARM..
  printf '%s\n' "$@" | xargs -n 1 -P 2 baselines/compare.sh "$out" "$seed"
}

case $arm in
  base | quantize) from_make "$arm" ;;
  quantize-human) stage quantize-human quantize.py --data data/human ;;

  SCRATCH) from_make scratch ;;
  LAPA) from_make finetune ;;
  LAPA_human)
    pretrain data/human latent --laq "$out/quantize-human"
    finetune
    ;;
  VPT)
    guess_actions data/tabletop
    pretrain data/tabletop idm --labels_file "$out/VPT/actions.safetensors"
    finetune
    ;;
  VPT_human)
    guess_actions data/human
    pretrain data/human idm --labels_file "$out/VPT_human/actions.safetensors"
    finetune
    ;;
  ACTIONVLA)
    pretrain data/tabletop action
    finetune
    ;;

  all)
    from_make data
    from_make data/human/episodes.jsonl
    two_at_a_time base quantize quantize-human
    two_at_a_time LAPA LAPA_human VPT VPT_human ACTIONVLA SCRATCH
    policies=RANDOM=random,SCRATCH=$out/scratch,LAPA=$out/finetune
    for arm in VPT ACTIONVLA LAPA_human VPT_human; do
      policies+=,$arm=$out/$arm/finetune
    done
    run "$out/arms/results.json" evaluate.py --policies "$policies" --out "$out/arms" \
      --seed "${seed}000" --film 0
    ;;
  *)
    echo "error: $arm: no such arm" >&2
    exit 2
    ;;
esac
