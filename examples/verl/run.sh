#!/usr/bin/env bash
# GRPO in verl with CAPO's trust region: one node with 8 GPUs, or the Ray cluster that RAY_ADDRESS names.
#
#   MODEL=… TRAIN=train.parquet TEST=test.parquet examples/verl/run.sh [more of verl's overrides]
#
# The data are in verl's own format (verl's examples/data_preprocess writes it).
set -euo pipefail
MODEL="${MODEL:-Qwen/Qwen2.5-7B-Instruct}"
TRAIN="${TRAIN:-data/gsm8k/train.parquet}"
TEST="${TEST:-data/gsm8k/test.parquet}"
NODES="${NODES:-1}"
GPUS="${GPUS:-8}"

# Which engine verl takes; the override below hands it to workers on other nodes.
export VERL_ENGINE_VENDOR=capo

exec python3 -m verl.trainer.main_ppo \
  algorithm.adv_estimator=grpo \
  data.train_files="$TRAIN" \
  data.val_files="$TEST" \
  data.train_batch_size=256 \
  data.max_prompt_length=512 \
  data.max_response_length=1024 \
  actor_rollout_ref.model.path="$MODEL" \
  actor_rollout_ref.model.use_remove_padding=True \
  actor_rollout_ref.model.enable_gradient_checkpointing=True \
  actor_rollout_ref.actor.strategy=fsdp2 \
  actor_rollout_ref.actor.ppo_mini_batch_size=64 \
  actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4 \
  actor_rollout_ref.actor.optim.lr=1e-5 \
  actor_rollout_ref.actor.fsdp_config._target_=capo.integrations.verl.CAPOEngineConfig \
  +actor_rollout_ref.actor.fsdp_config.capo.trust_region=auto \
  +ray_kwargs.ray_init.runtime_env.env_vars.VERL_ENGINE_VENDOR=capo \
  actor_rollout_ref.ref.strategy=fsdp2 \
  actor_rollout_ref.rollout.name=vllm \
  actor_rollout_ref.rollout.n=8 \
  actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
  actor_rollout_ref.rollout.gpu_memory_utilization=0.5 \
  actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8 \
  trainer.logger='["console"]' \
  trainer.project_name=capo \
  trainer.experiment_name=grpo-trust-region \
  trainer.nnodes="$NODES" \
  trainer.n_gpus_per_node="$GPUS" \
  trainer.save_freq=20 \
  trainer.test_freq=10 \
  trainer.total_epochs=1 \
  "$@"
