# each sublayer does without the one before it: 23 all-reduces, 22 of them hidden
# torchrun --standalone --nproc_per_node=8 train.py config/rivals/train_gpt2_ladder.py --max_iters=20000
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-ladder'
block_types = ['ladder'] * 12
