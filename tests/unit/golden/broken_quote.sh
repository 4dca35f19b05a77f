#!/bin/bash
NAME="gpt-small
torchrun --nproc_per_node 2 pretrain_gpt.py --micro-batch-size 1 --global-batch-size 8 --save $NAME
