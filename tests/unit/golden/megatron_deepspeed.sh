#!/bin/sh
# Megatron-DeepSpeed, 1.3B, ZeRO 1 with 2 stages
BASE=/data/megatron-deepspeed
NGPU=16
GLOBAL=256
MICRO=4

deepspeed --num_nodes 2 --num_gpus $(( NGPU / 2 )) --hostfile hosts \
    $BASE/pretrain_gpt.py \
    --deepspeed --deepspeed_config ds_config.json --zero-stage 1 \
    --tensor-model-parallel-size 1 --pipeline-model-parallel-size 2 \
    --num-layers 24 --hidden-size 2048 --num-attention-heads 16 \
    --seq-length 2048 --max-position-embeddings 2048 \
    --micro-batch-size ${MICRO} --global-batch-size ${GLOBAL} \
    --train-iters 50000 --lr 2.0e-4 --bf16 --checkpoint-activations \
    --data-path /data/pile_text_document > train.log 2>&1
