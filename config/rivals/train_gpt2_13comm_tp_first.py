# which layer does it: SPD in all but the first one, 13 all-reduces
# python train.py config/rivals/train_gpt2_13comm_tp_first.py config/cpu.py
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-13comm-tp-first'
block_types = ['tp'] + ['spd'] * 11
