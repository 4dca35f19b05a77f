#!/bin/bash
SOURCE="${ROOT}/pretrain_gpt.py"
COMMAND="torchrun --nproc_per_node ${GPUS:-8}"
COMMAND="${COMMAND} ${SOURCE}"
COMMAND+=" --num-layers 12 --micro-batch-size 1 --global-batch-size 64 --train-iters 1000"
if [ "$PRECISION" = fp8 ]; then
    COMMAND+=" --fp8-format hybrid --fp8-recipe tensorwise"
fi
if [ "$PROFILE" = true ]; then COMMAND="nsys profile -o trace $COMMAND"; fi
echo "${COMMAND}"
eval "${COMMAND}"
