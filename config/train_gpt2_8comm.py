# alternating SPD and Parallel
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_8comm.py --max_iters=20000
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-8comm'
block_types = ['spd', 'parallel'] * 6
