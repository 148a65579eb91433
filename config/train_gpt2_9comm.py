# 7 SPD layers, spread evenly among Parallel ones
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_9comm.py --max_iters=20000
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-9comm'
block_types = ['spd' if i * 7 % 12 < 7 else 'parallel' for i in range(12)]
