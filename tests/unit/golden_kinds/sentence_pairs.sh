#!/bin/bash
deepspeed --num_gpus 8 train_bert.py --checkpoint_dir out --num_layers 6 --micro-batch-size 1 --global-batch-size 64
