# alternating Parallel, Parallel, SPD: 4 all-reduces, for none follows the last sync
# python train.py config/rivals/train_gpt2_6comm_parallel_first.py config/cpu.py
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-6comm-parallel-first'
block_types = ['parallel', 'parallel', 'spd'] * 4
