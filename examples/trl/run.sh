#!/usr/bin/env bash
# GRPO in TRL with CAPO's trust region, on one node. Needs the extras trl and tasks (math-verify grades).
#
#   MODEL=… DATA=… examples/trl/run.sh [ddp|fsdp2|zero3] [more options of CAPOConfig]
# To see on CPUs that a script runs before it is given GPUs:
#   LAUNCH="--num_processes 2 --mixed_precision no" examples/trl/run.sh ddp --use_cpu true --bf16 false
set -euo pipefail
cd "$(dirname "$0")/../.."
MODEL="${MODEL:-Qwen/Qwen2.5-7B-Instruct}"
DATA="${DATA:-trl-lib/DeepMath-103K}"
ENGINE="${1:-fsdp2}"
shift || true
config="examples/trl/$ENGINE.yaml"
if [[ ! -f "$config" ]]; then
  echo "run.sh: the engine must be ddp, fsdp2 or zero3, got '$ENGINE'" >&2
  exit 2
fi
# What the launcher is told beside its configuration.
read -ra launch <<<"${LAUNCH:-}"

exec accelerate launch --config_file "$config" "${launch[@]}" examples/trl/train.py \
  --model_name_or_path "$MODEL" \
  --dataset_name "$DATA" \
  --output_dir runs/trl \
  --trust_region auto \
  --learning_rate 1e-5 \
  --num_generations 8 \
  --per_device_train_batch_size 4 \
  --gradient_accumulation_steps 8 \
  --max_completion_length 1024 \
  --save_steps 50 \
  --report_to none \
  "$@"
