#!/bin/bash
# speed test on one node: everything on
torchrun --standalone --nproc_per_node 8 pretrain_gpt.py \
    --num-layers 16 --hidden-size 2048 --num-attention-heads 16 --seq-length 8192 --max-position-embeddings 8192 \
    --micro-batch-size 1 --global-batch-size 16 --train-iters 1000 --lr 1e-4 --bf16 \
    --fp8-format hybrid --fp8-amax-history-len 1024 --fp8-amax-compute-algo max \
    --cuda-graph-impl local --mtp-num-layers 1 \
    --dataloader-type external --mock-data \
    --tensor-model-parallel-size 2
