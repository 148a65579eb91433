# the recipe: GPT-2 (124M) as the guide trains it. a run's config file changes what it has to and nothing
# else. every key that train.py knows is here, with its type; the comment is what --help prints.
from typing import Literal

# output
out_dir: str | None = None                  # the run's folder; None: out/ and the run's name
eval_interval: int = 1000                   # updates between evaluations
eval_tokens: int = 2_457_600                # validation reads the first so many tokens of val, each once
log_interval: int = 10                      # updates between log lines
eval_train_tokens: int = 0                  # evaluations read the first so many tokens of train, too
log_drift: bool = False                     # log at evaluations how far apart the ranks' streams are
eval_only: bool = False                     # evaluate once and stop
always_save_checkpoint: bool = True         # save at every evaluation; False: only at the best so far
checkpoint_interval: int | None = None      # save every so many updates instead, and at the best so far
keep_checkpoints: int = 0                   # so many before the latest stay, too, named by step
init_from: Literal['scratch', 'resume'] = 'scratch'     # resume: continue from out_dir/ckpt.pt
seed: int = 1337                            # initial weights, batches and dropout follow from it

# weights & biases
wandb_log: bool = False                     # log to Weights & Biases
wandb_project: str = 'owt'                  # the W&B project that the run goes to
wandb_run_name: str = 'gpt2-124M'           # also names out_dir; later config files append their own names

# data
dataset: str = 'openwebtext'                # a folder under data/ that its prepare.py has filled
batch_size: int = 12                        # windows in a micro-batch, at most
gradient_accumulation_steps: int = 5 * 8    # micro-batches in a step, over all processes
block_size: int = 1024                      # tokens in a window

# model
n_layer: int = 12                           # blocks
n_head: int = 12                            # attention heads, of all ranks together
n_embd: int = 768                           # width of the residual stream
dropout: float = 0.0                        # of embeddings, attention and sublayers' outputs
bias: bool = False                          # biases in linear layers and LayerNorms
tp_size: int = 2                            # tensor-parallel ranks, R; 1 is the dense control
block_types: list | None = None             # a type for each layer, or a pattern: tp,spd,spd; None: tp
merge: Literal['sum', 'mean'] = 'sum'       # of what the ranks added, at each sync

# optimizer
learning_rate: float = 6e-4                 # the highest, after warmup
max_iters: int = 600_000                    # updates to make
weight_decay: float = 1e-1                  # of matrices and embeddings
beta1: float = 0.9                          # AdamW's
beta2: float = 0.95                         # AdamW's
grad_clip: float = 1.0                      # clip the gradient's norm to this; 0: do not

# learning rate schedule
decay_lr: bool = True                       # False: learning_rate throughout, without warmup
warmup_iters: int = 2000                    # updates over which the rate rises
lr_decay_iters: int | None = None           # the cosine reaches min_lr here; None: at max_iters
min_lr: float = 6e-5                        # the lowest, after the cosine

# system
backend: Literal['nccl', 'gloo'] | None = None  # of torch.distributed; None: nccl on CUDA, gloo elsewhere
device: str = 'cuda'                        # cpu, cuda, cuda:1, mps ...
dtype: Literal['float32', 'bfloat16', 'float16'] = 'bfloat16'   # of the matmuls; weights are float32
compile: bool = True                        # use torch.compile
shard: bool = False                         # one tensor-parallel rank a process, with real all-reduces
tp_across_nodes: bool = False               # sharded: a group's ranks on as many nodes; False: side by side
