#!/bin/bash
#SBATCH --job-name=moe-8x3b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8 --exclusive
#SBATCH --time=48:00:00

MEGATRON=/opt/megatron-lm
MODEL="--num-layers 24 --hidden-size 2048 --num-attention-heads 16 --seq-length 4096 \
 --max-position-embeddings 4096 --num-experts 8 --moe-router-topk 2 \
 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 \
 --moe-expert-capacity-factor 1.25 --moe-grouped-gemm --moe-token-dispatcher-type alltoall"
PARALLEL="--pipeline-model-parallel-size 4 --expert-model-parallel-size 8 --use-distributed-optimizer"
TRAIN="--micro-batch-size 1 --global-batch-size 1024 --train-samples 48828125 --lr-decay-samples 48828125 --lr 2e-4 --bf16"

if [ -n "${WANDB_PROJECT}" ]; then
    EXTRA="--wandb-project ${WANDB_PROJECT} --wandb-exp-name moe"
else
    EXTRA=""
fi

CMD="cd $MEGATRON && python -u pretrain_gpt.py $MODEL $PARALLEL $TRAIN $EXTRA --data-path $DATA_PREFIX --tokenizer-type GPT2BPETokenizer"

srun --label --container-image=$IMAGE bash -c "${CMD}"
