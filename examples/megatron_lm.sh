#!/usr/bin/env bash
# A launch script of Megatron-LM as teams have it, for a small GPT. Nothing in it or in the checkout knows of Evolved
# Sampling. Make the data, patch the script, start the copy; `unpatch` takes out again what was put in:
#
#     es-megatron prepare --output data --component docs='docs/*.md' --vocab-size 1000
#     es-megatron patch examples/megatron_lm.sh --es-selection-keep-ratio 0.25
#     MEGATRON_LM=CHECKOUT bash examples/megatron_lm.es.sh
#     es-megatron unpatch examples/megatron_lm.es.sh
#
# MORE_ARGS holds further flags. Without GPUs the patched script needs two:
#     MORE_ARGS="--distributed-backend gloo --use-cpu-initialization"
set -euo pipefail

GPUS_PER_NODE=${GPUS_PER_NODE:-2}
TRAIN_ITERS=${TRAIN_ITERS:-60}
RUN_DIR=${RUN_DIR:-runs/megatron_lm}
export CUDA_DEVICE_MAX_CONNECTIONS=1

MODEL_ARGS=(
    --num-layers 2
    --hidden-size 64
    --num-attention-heads 4
    --seq-length 64
    --max-position-embeddings 64
    --transformer-impl local # without Transformer Engine and Apex, as the flags `--no-...`
    --no-persist-layer-norm
    --no-gradient-accumulation-fusion
    --no-masked-softmax-fusion
    --no-bias-gelu-fusion
    --no-bias-dropout-fusion
    --no-rope-fusion
)
TRAINING_ARGS=(
    --micro-batch-size 2
    --global-batch-size 32
    --train-iters "$TRAIN_ITERS"
    --lr 1e-2
    --lr-decay-style cosine
    --lr-warmup-iters 5
    --attention-dropout 0
    --hidden-dropout 0
)
DATA_ARGS=(
    --data-path 1.0 data/docs.train
    --split 90,5,5
    --data-cache-path "$RUN_DIR/cache"
    --tokenizer-type GPTSentencePieceTokenizer
    --tokenizer-model data/tokenizer.model
    --num-workers 0
)
LOGGING_ARGS=(
    --log-interval 5
    --eval-interval 1000
    --eval-iters 1
    --save "$RUN_DIR"
    --save-interval 1000
    --ckpt-format torch_dist
)

torchrun --standalone --nproc-per-node "$GPUS_PER_NODE" "${MEGATRON_LM:?a checkout of Megatron-LM}/pretrain_gpt.py" \
    "${MODEL_ARGS[@]}" \
    "${TRAINING_ARGS[@]}" \
    "${DATA_ARGS[@]}" \
    "${LOGGING_ARGS[@]}" \
    ${MORE_ARGS:-}
