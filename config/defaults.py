# the recipe: GPT-2 (124M) as the guide trains it, and all keys of train.py with their types. a run's config
# file sets only what differs from it. --help prints the comments.
from typing import Literal

# output
out_dir: str | None = None  # the run's folder; None: out/ and the run's name
eval_interval: int = 1000  # updates between evaluations
eval_tokens: int = 2_457_600  # tokens of val that an evaluation reads, from the first on, each once
log_interval: int = 10  # updates between log lines
eval_train_tokens: int = 0  # tokens of train that an evaluation reads too, from the first on
log_diagnostics: bool = False  # log what the ranks' streams and gradients are like, at evaluations
eval_only: bool = False  # evaluate once and stop
always_save_checkpoint: bool = True  # save at every evaluation; False: only at the best so far
checkpoint_interval: int | None = None  # updates between saves instead, besides the best so far
keep_optimizer: bool = True  # False: a finished run's checkpoints lose AdamW's state, two thirds of them
keep_checkpoints: int = 0  # earlier checkpoints to keep besides the latest, named by step
init_from: str = 'scratch'  # or resume; auto: if there is a checkpoint; weights: gpt2, a folder, a file
plan: str | None = None  # a file that states the experiment before it runs; run.json keeps its text
seed: int = 1337  # of initial weights, batches and dropout

# weights & biases
wandb_log: bool = False  # log to Weights & Biases
wandb_project: str = 'owt'  # the run's project in W&B
wandb_run_name: str = 'gpt2-124M'  # also names out_dir; later config files append their own names

# data
dataset: str = 'openwebtext'  # a folder under data/ that its prepare.py has filled
batch_size: int = 12  # windows in a micro-batch, at most
gradient_accumulation_steps: int = 5 * 8  # micro-batches in a step, over all processes
block_size: int = 1024  # tokens in a window

# model
n_layer: int = 12  # blocks
n_head: int = 12  # attention heads, of all ranks together
n_embd: int = 768  # width of the residual stream
dropout: float = 0.0  # of embeddings, attention and sublayers' outputs
bias: bool = False  # biases in linear layers and LayerNorms
gelu: Literal['erf', 'tanh'] = 'erf'  # the exact GELU, or its approximation in released GPT-2
vocab_size: int | None = None  # None: the tokenizer's, rounded up to a multiple of 64
tp_size: int = 2  # tensor-parallel ranks, R; 1 is the dense control
block_types: list | None = None  # a type for each layer, or a pattern: tp,spd,spd; None: all tp
block_types_at: str | None = None  # STEP:pattern[;STEP:pattern]: other blocks from there; STEP may be 25%
merge: Literal['sum', 'mean', 'rsqrt', 'desync'] = 'sum'  # how a sync merges what the ranks have added
dtp_delay: int = 1  # sublayers until the sum over ranks enters, in dtp blocks
caat_share: float = 0.5  # of the channels, those that a sync of caat blocks sums
embed_scale: float = 1.0  # times the embeddings, where the residual stream starts
perturb: float = 0.0  # relative size of a random change of the initial weights, for the noise floor

# repair of a net that init_from names
distill: bool = False  # train on that net's logits, as it is dense; train_loss is then this loss
distill_temperature: float = 1.0  # divides the logits of both nets
distill_weight: float = 1.0  # of the loss against its logits; the text's cross-entropy has the rest
train_layers: list | None = None  # the layers to train, counted from 0, as in 3,4; None: everything

# optimizer
learning_rate: float = 6e-4  # the highest, after warmup
max_iters: int = 600_000  # updates to make
weight_decay: float = 1e-1  # of matrices and embeddings
beta1: float = 0.9  # AdamW's
beta2: float = 0.95  # AdamW's
grad_clip: float = 1.0  # clip the gradient's norm to this; 0: no clipping

# learning rate schedule
decay_lr: bool = True  # False: learning_rate throughout, without warmup
warmup_iters: int = 2000  # updates over which the rate rises
lr_decay_iters: int | None = None  # the cosine reaches min_lr here; None: at max_iters
min_lr: float | None = None  # the lowest, after the cosine; None: a tenth of learning_rate

# system
backend: Literal['nccl', 'gloo'] | None = None  # of torch.distributed; None: nccl on CUDA, gloo elsewhere
device: str = 'cuda'  # cpu, cuda, cuda:1, mps ...
dtype: Literal['float32', 'bfloat16', 'float16'] = 'bfloat16'  # of matrix products; weights are float32
compile: bool = True  # use torch.compile
recompute_layers: int = 0  # activation checkpointing of the first layers: less memory, slower
shard: bool = False  # one tensor-parallel rank per process, with real all-reduces
tp_across_nodes: bool = False  # sharded: each rank of a group on a node of its own; False: side by side
