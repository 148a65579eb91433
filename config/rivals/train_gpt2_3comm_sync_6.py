# all Parallel but layer 6, one sync slid over depth: 2 all-reduces
# torchrun --standalone --nproc_per_node=8 train.py config/rivals/train_gpt2_3comm_sync_6.py --max_iters=20000
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-3comm-sync-6'
block_types = ['parallel'] * 6 + ['spd'] + ['parallel'] * 5
