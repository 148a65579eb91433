# any config on FineWeb with the hyperparameters of llm.c's GPT-2 (124M), the run that ended at 3.2722
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_12comm.py config/fineweb.py
dataset = 'fineweb'
eval_tokens = 10_485_760
batch_size = 16
gradient_accumulation_steps = 32  # 524,288 tokens a step
max_iters = 19_560
learning_rate = 6e-4
min_lr = 0.0
warmup_iters = 700
