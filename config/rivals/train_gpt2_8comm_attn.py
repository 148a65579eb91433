# sync after attention, alternating with Parallel: 7 all-reduces, like 8comm
# python train.py config/rivals/train_gpt2_8comm_attn.py config/cpu.py
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-8comm-attn'
block_types = ['attn_spd', 'parallel'] * 6
