# all SPD, merged by the mean
# python train.py config/rivals/train_gpt2_12comm_mean.py config/cpu.py
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-12comm-mean'
block_types = ['spd'] * 12
merge = 'mean'
