#!/bin/bash
TRAINING="cd /opt/megatron && torchrun --nproc_per_node 4 --nnodes 2 pretrain_gpt.py ${@}"
sbatch <<EOF
#!/bin/bash
#SBATCH --nodes=2
srun --container-image=$IMAGE bash -c "${TRAINING} --micro-batch-size 2 --global-batch-size 128 --train-iters 500"
EOF
