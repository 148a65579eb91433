# any config at width 384 on 20M GPT-2 tokens of your own text: an H100 trains it in half a minute
# python data/text/prepare.py --input FILE --out=data/english_bpe
# python train.py config/train_gpt2_12comm.py config/english.py
dataset = 'english_bpe'
wandb_log = False

n_head = 6
n_embd = 384
block_size = 1024
batch_size = 16
gradient_accumulation_steps = 2  # 32,768 tokens a step

learning_rate = 1.2e-3
max_iters = 610
warmup_iters = 60
eval_interval = 305
eval_tokens = 524_288
eval_train_tokens = 131_072
always_save_checkpoint = False
