# GPT-2 large's size: alternating SPD, Parallel, Parallel
# torchrun --standalone --nproc_per_node=8 train.py config/train_774M_14comm.py --max_iters=20000
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-774M-14comm'
block_types = ['spd', 'parallel', 'parallel'] * 12
n_layer = 36
n_head = 20
n_embd = 1280
batch_size = 4  # a third of the recipe's, to save memory; the step is the same
gradient_accumulation_steps = 120
