# sums over ranks arrive 1 sublayer late: 23 all-reduces, all but the last hidden
# torchrun --standalone --nproc_per_node=8 train.py config/rivals/train_gpt2_dtp_1.py --max_iters=20000
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-dtp-1'
block_types = ['dtp'] * 12
dtp_delay = 1
