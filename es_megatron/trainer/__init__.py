"""The reference pretraining loop: a GPT on Megatron-Core, with Evolved Sampling deciding what gets a backward pass."""
