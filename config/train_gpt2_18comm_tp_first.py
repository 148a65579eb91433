# placement: the blocks of 18comm, TP at the start
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_18comm_tp_first.py --max_iters=20000
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-18comm-tp-first'
block_types = ['tp'] * 6 + ['spd'] * 6
