# sync after attention, alternating with Parallel, Parallel: 5 all-reduces, like 6comm
# python train.py config/rivals/train_gpt2_6comm_attn.py config/cpu.py
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-6comm-attn'
block_types = ['attn_spd', 'parallel', 'parallel'] * 4
