# alternating SPD, Parallel, Parallel
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_6comm.py --max_iters=20000
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-6comm'
block_types = ['spd', 'parallel', 'parallel'] * 4
