# a sync a layer in the first half of the steps, two in the second
# python train.py config/rivals/train_gpt2_12comm_then_24.py config/cpu.py
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-12comm-then-24'
block_types = ['spd'] * 12
block_types_at = '50%:tp'
