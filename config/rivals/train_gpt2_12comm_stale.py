# the last third of the layers reads an old stream in its attention: 12 all-reduces, like 12comm
# torchrun --standalone --nproc_per_node=8 train.py config/rivals/train_gpt2_12comm_stale.py --max_iters=20000
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-12comm-stale'
block_types = ['spd'] * 8 + ['stale'] * 4
