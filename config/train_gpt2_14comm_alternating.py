# placement: the blocks of 14comm_progressive, alternating
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_14comm_alternating.py --max_iters=20000
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-14comm-alternating'
block_types = ['parallel', 'spd', 'tp'] * 4
