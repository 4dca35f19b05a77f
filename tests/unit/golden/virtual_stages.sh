#!/bin/bash

# 30B, interleaved pipeline: 4 stages of 3 chunks
SIZE=${1:-30b}
MBS=1

if [[ "$SIZE" == "30b" ]]; then
  NUM_LAYERS=48; HIDDEN=7168; HEADS=56
elif [[ "$SIZE" == "7b" ]]; then
  NUM_LAYERS=32; HIDDEN=4096; HEADS=32
else
  echo "size?"; exit 1
fi

ARGS=(
  --num-layers $NUM_LAYERS --hidden-size $HIDDEN --num-attention-heads $HEADS
  --seq-length 4096 --max-position-embeddings 4096
  # memory is tight: recompute all layers
  --recompute-granularity full --recompute-method block --recompute-num-layers 4
  --tensor-model-parallel-size 8
  --pipeline-model-parallel-size 4
  --num-layers-per-virtual-pipeline-stage 4   # 48 / 4 / 4 = 3 chunks
  --micro-batch-size $MBS --global-batch-size 144
  --train-iters 100000 --lr 1.2e-4 --bf16
  --dataloader-type cyclic --num-workers 8
  --data-path /data/mix_text_document
)
if [ "${PROFILE:-0}" -eq 1 ]; then
  ARGS+=(--profile --profile-step-start 10 --profile-step-end 12)
fi

LAUNCH="torchrun --nproc_per_node 8 --nnodes 12"
SCRIPT=${MEGATRON_PATH:-.}/pretrain_gpt.py

for attempt in 1 2 3; do
  # a node may drop out: go on from the last checkpoint
  NCCL_DEBUG=WARN \
  $LAUNCH "$SCRIPT" "${ARGS[@]}" \
    --save /ckpt/$SIZE --load /ckpt/$SIZE && break
done
