#! /bin/bash
# 20B with batch-size ramp-up: 64 -> 1024 over the first 2 M samples

N_GPUS=64
TP=8; PP=2

options=" \
    --tensor-model-parallel-size ${TP} \
    --pipeline-model-parallel-size ${PP} \
    --num-layers 44 \
    --hidden-size 6144 \
    --num-attention-heads 48 \
    --seq-length 2048 \
    --max-position-embeddings 2048 \
    --micro-batch-size 2 \
    --global-batch-size 1024 \
    --rampup-batch-size 64 64 2000000 \
    --train-samples 73242188 \
    --lr-decay-samples 70000000 \
    --lr-warmup-samples 183105 \
    --lr 9.7e-5 \
    --min-lr 9.7e-6 \
    --lr-decay-style cosine \
    --hidden-dropout 0.1 --attention-dropout 0.1 \
    --fp16 \
    --data-path ${DATA_PATH} \
    --split 969,30,1"

run="python -m torch.distributed.run --nproc_per_node 8 --nnodes $((N_GPUS / 8)) ./pretrain_gpt.py ${options}"
echo ${run}
eval ${run}
