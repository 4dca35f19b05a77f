#!/bin/bash
deepspeed --num_gpus 8 pretrain_gpt.py --deepspeed --micro-batch-size 1 --global-batch-size 64 --seq-length 2048 \
    --train-samples 200000 --train-tokens 300000000
