#!/usr/bin/env bash
# 128k-token continuation of an 8B model
set -e
NODES=16
LAYERS=32

case "${CONTEXT:-128k}" in
    32k)  SEQ=32768;  CP=2 ;;
    128k) SEQ=131072; CP=8 ;;
    *) echo "unknown context" >&2; exit 1 ;;
esac

torchrun --nproc-per-node=8 --nnodes=$NODES --node-rank=$SLURM_NODEID --master-addr=$HEAD --master-port=29600 \
    pretrain_gpt.py \
    --num-layers $LAYERS --hidden-size 4096 --num-attention-heads 32 --group-query-attention --num-query-groups 8 \
    --seq-length $SEQ --max-position-embeddings $SEQ --rotary-base 8000000 --use-rotary-position-embeddings \
    --micro-batch-size 1 --global-batch-size 32 --train-iters 4000 \
    --tensor-model-parallel-size 4 --context-parallel-size $CP --sequence-parallel \
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 \
    --use-distributed-optimizer --bf16 --lr 1e-5 --finetune --load /ckpt/base \
    --data-path /data/books_long_text "$@"
