# sync after the MLP early, after attention late: 12 all-reduces, like 12comm
# python train.py config/rivals/train_gpt2_12comm_attn_late.py config/cpu.py
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-12comm-attn-late'
block_types = ['spd'] * 6 + ['attn_spd'] * 5 + ['spd']
