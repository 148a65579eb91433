# dense, whose embedding is four times as large in the residual stream
# torchrun --standalone --nproc_per_node=8 train.py config/rivals/train_gpt2_embed_4.py --max_iters=20000
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-embed-4'
tp_size = 1
embed_scale = 4.0
