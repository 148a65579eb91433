# 24 all-reduces of about a tenth of the channels, with the bytes of 3 of all
# torchrun --standalone --nproc_per_node=8 train.py config/rivals/train_gpt2_caat_3.py --max_iters=20000
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-caat-3'
block_types = ['caat'] * 12
caat_share = 2 / 23
