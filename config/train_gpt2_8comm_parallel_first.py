# placement: the blocks of 8comm, Parallel at the start
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_8comm_parallel_first.py
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-8comm-parallel-first'
block_types = ['parallel'] * 6 + ['spd'] * 6
