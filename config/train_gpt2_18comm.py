# alternating TP and SPD
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_18comm.py --max_iters=20000
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-18comm'
block_types = ['tp', 'spd'] * 6
