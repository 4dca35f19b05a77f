#!/bin/bash
# 7B dense model, 4 nodes of 8 GPUs.
set -euo pipefail
export CUDA_DEVICE_MAX_CONNECTIONS=1

GPUS_PER_NODE=8
NNODES=${NNODES:-4}
WORLD_SIZE=$((GPUS_PER_NODE * NNODES))
RUN_DIR=/scratch/runs/dense_7b
DATA="0.7 /data/web_text 0.3 /data/code_text"

DISTRIBUTED_ARGS=(
    --nproc_per_node $GPUS_PER_NODE
    --nnodes $NNODES
    --rdzv_backend c10d
    --rdzv_endpoint "${MASTER_ADDR:-localhost}:29501"
)

GPT_MODEL_ARGS=(
    --num-layers 32
    --hidden-size 4096
    --ffn-hidden-size 11008
    --num-attention-heads 32
    --seq-length 4096
    --max-position-embeddings 4096
    --position-embedding-type rope
    --swiglu
    --disable-bias-linear
    --normalization RMSNorm
    --attention-dropout 0.0
    --hidden-dropout 0.0
)

# 2.1 M tokens a step
TRAINING_ARGS=(
    --micro-batch-size 2
    --global-batch-size 512
    --train-iters 240000   # three passes over the blend
    --lr 3.0e-4 --min-lr 3.0e-5
    --lr-decay-style cosine
    --lr-warmup-iters 2000
    --weight-decay 0.1 --clip-grad 1.0
    --bf16
)

MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size 2
    --sequence-parallel
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
)

DATA_ARGS=(
    --data-path $DATA
    --tokenizer-type SentencePieceTokenizer
    --tokenizer-model /data/tokenizer.model
    --split 990,10,0
    --reset-position-ids
    --eod-mask-loss
)

LOGGING_ARGS=(
    --save "$RUN_DIR/checkpoints" --load "$RUN_DIR/checkpoints"
    --save-interval 2000
    --eval-interval 1000 --eval-iters 20
    --log-interval 10
)

mkdir -p "$RUN_DIR/logs"
torchrun "${DISTRIBUTED_ARGS[@]}" pretrain_gpt.py \
    "${GPT_MODEL_ARGS[@]}" \
    "${TRAINING_ARGS[@]}" \
    "${MODEL_PARALLEL_ARGS[@]}" \
    "${DATA_ARGS[@]}" \
    "${LOGGING_ARGS[@]}" 2>&1 | tee "$RUN_DIR/logs/train.log"
