# the dense control: plain GPT-2 (124M), to which every run is compared
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py --max_iters=20000
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M'
tp_size = 1
