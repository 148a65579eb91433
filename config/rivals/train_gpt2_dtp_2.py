# sums over ranks arrive 2 sublayers late: 22 all-reduces, all but the last hidden
# torchrun --standalone --nproc_per_node=8 train.py config/rivals/train_gpt2_dtp_2.py --max_iters=20000
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-dtp-2'
block_types = ['dtp'] * 12
dtp_delay = 2
