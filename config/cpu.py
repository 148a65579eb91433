# any config at a size that two CPU cores train in under a minute, on the Python standard library's sources
# python train.py config/train_gpt2_12comm.py config/cpu.py
dataset = 'pystdlib'
device = 'cpu'
dtype = 'float32'
compile = False
wandb_log = False

n_head = 8
n_embd = 64
block_size = 64
batch_size = 16
gradient_accumulation_steps = 1

learning_rate = 2e-3
max_iters = 400
warmup_iters = 40
eval_interval = 100
eval_tokens = 65_536
