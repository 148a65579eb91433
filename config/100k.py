# any config for 100k steps, if 20k are too few to tell
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_12comm.py config/100k.py
max_iters = 100_000
