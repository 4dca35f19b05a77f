#!/bin/bash
# copied from the 64-GPU script; 48 GPUs now
torchrun --nproc_per_node 8 --nnodes 6 pretrain_gpt.py \
    --num-layers 24 --hidden-size 2048 --num-attention-heads 16 --seq-length 2048 --max-position-embeddings 2048 \
    --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 \
    --micro-batch-size 4 --global-batch-size 512 \
    --data-path /data/web_text_document --bf16 \
    # --fp16 was unstable
    --train-iters 80000 --lr 2e-4
