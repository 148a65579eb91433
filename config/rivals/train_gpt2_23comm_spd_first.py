# which layer does it: SPD in the first one alone, 23 all-reduces
# python train.py config/rivals/train_gpt2_23comm_spd_first.py config/cpu.py
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-23comm-spd-first'
block_types = ['spd'] + ['tp'] * 11
