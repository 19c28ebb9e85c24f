#!/usr/bin/env bash
# Token masks in the aggressive regime, Adam (five seeds) and SGD (three): about fifteen minutes on two cores.
#
#     benchmarks/aggressive_seeds.sh [DIRECTORY]
#
# Writes the runs, then DIRECTORY/compare.json and the tables of results/aggressive.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/aggressive}
capo=.venv/bin/capo

runs() {
  for seed in 0 1 2 3 4; do
    echo "small-aggressive run.seed=$seed -o $out/adam-grpo-s$seed"
    echo "small-aggressive-capo run.seed=$seed -o $out/adam-capo-s$seed"
  done
  for lr in 0.06 0.15 0.5 1.5; do
    for seed in 0 1 2; do
      echo "configs/sgd-capo.toml capo.selection=none training.learning_rate=$lr run.seed=$seed -o $out/sgd-$lr-grpo-s$seed"
      echo "configs/sgd-capo.toml training.learning_rate=$lr run.seed=$seed -o $out/sgd-$lr-capo-s$seed"
    done
  done
}

# Two at a time: each run uses one thread. A finished run is kept.
runs | while read -r line; do
  [ -e "${line##* }/final" ] || echo "$line"
done | xargs -P 2 -I{} sh -c "$capo train {} records.tokens=false --quiet --overwrite"
"$capo" compare "$out"/*-s* --json > "$out/compare.json"
"$capo" compare "$out"/*-s*
