# alternating SPD, Parallel, Parallel, merged by the mean
# python train.py config/rivals/train_gpt2_6comm_mean.py config/cpu.py
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-6comm-mean'
block_types = ['spd', 'parallel', 'parallel'] * 4
merge = 'mean'
