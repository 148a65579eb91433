# any config at a size of which an H200 trains four in two minutes, on the Python standard library's sources
# python train.py config/train_gpt2_12comm.py config/gpu.py
dataset = 'pystdlib'
wandb_log = False

block_size = 256
batch_size = 16
gradient_accumulation_steps = 1

learning_rate = 1e-3
max_iters = 2000
warmup_iters = 100
eval_interval = 250
eval_tokens = 524_288
eval_train_tokens = 131_072
log_diagnostics = True
