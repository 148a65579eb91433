# Megatron's tensor parallelism, the guide's baseline
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_24comm.py --max_iters=20000
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-24comm'
block_types = ['tp'] * 12
