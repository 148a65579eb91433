# sync after attention, in the last layer after the MLP: 12 all-reduces, like 12comm
# python train.py config/rivals/train_gpt2_12comm_attn.py config/cpu.py
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-12comm-attn'
block_types = ['attn_spd'] * 11 + ['spd']
