# GPT-2 medium's size: all SPD
# torchrun --standalone --nproc_per_node=8 train.py config/train_350M_24comm.py --max_iters=20000
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-350M-24comm'
block_types = ['spd'] * 24
n_layer = 24
n_head = 16
n_embd = 1024
batch_size = 6  # half of the recipe's, to save memory; the step is the same
gradient_accumulation_steps = 80
