# alternating SPD and Parallel, merged by the mean
# python train.py config/rivals/train_gpt2_8comm_mean.py config/cpu.py
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-8comm-mean'
block_types = ['spd', 'parallel'] * 6
merge = 'mean'
