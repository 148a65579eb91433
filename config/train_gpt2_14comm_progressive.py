# placement: more syncs with depth
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_14comm_progressive.py --max_iters=20000
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-14comm-progressive'
block_types = ['parallel'] * 4 + ['spd'] * 4 + ['tp'] * 4
