# FAL's layer: PaLM's, whose MLP also reads the first attention's output; 13 all-reduces, like 12comm
# torchrun --standalone --nproc_per_node=8 train.py config/rivals/train_gpt2_fal.py --max_iters=20000
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-fal'
block_types = ['fal'] * 12
