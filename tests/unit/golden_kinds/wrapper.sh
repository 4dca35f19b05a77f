#!/bin/bash
OPTIONS="--micro-batch-size 1 --global-batch-size 64 --context-parallel-size 2 --fp8-format hybrid"
mpirun -np 16 bash enter.sh pretrain_gpt.py "$OPTIONS"
