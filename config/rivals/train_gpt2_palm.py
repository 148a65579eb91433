# PaLM's layer: attention beside the MLP, one all-reduce a layer and no drift
# torchrun --standalone --nproc_per_node=8 train.py config/rivals/train_gpt2_palm.py --max_iters=20000
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-palm'
block_types = ['palm'] * 12
