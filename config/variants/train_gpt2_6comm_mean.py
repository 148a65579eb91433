# SPD and two Parallel in turn, merged by the mean
# python variants.py config/variants/train_gpt2_6comm_mean.py config/cpu.py
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-6comm-mean'
block_types = ['mean_spd', 'mean_parallel', 'mean_parallel'] * 4
