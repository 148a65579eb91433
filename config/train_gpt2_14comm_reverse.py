# placement: fewer syncs with depth
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_14comm_reverse.py --max_iters=20000
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-14comm-reverse'
block_types = ['tp'] * 4 + ['spd'] * 4 + ['parallel'] * 4
