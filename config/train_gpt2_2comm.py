# all Parallel: one sync, at the end of the model
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_2comm.py --max_iters=20000
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-2comm'
block_types = ['parallel'] * 12
