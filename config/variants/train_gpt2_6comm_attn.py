# syncs after attention in every third layer: 5 all-reduces, as 6comm
# python variants.py config/variants/train_gpt2_6comm_attn.py config/cpu.py
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-6comm-attn'
block_types = ['attn_spd', 'parallel', 'parallel'] * 4
