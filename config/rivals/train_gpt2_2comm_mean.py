# all Parallel, merged by the mean
# python train.py config/rivals/train_gpt2_2comm_mean.py config/cpu.py
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-2comm-mean'
block_types = ['parallel'] * 12
merge = 'mean'
