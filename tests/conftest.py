"""What every test starts from: the project's root importable, one thread, fixed seeds, no network."""
import os
import random
import sys
from pathlib import Path

# before transformers is imported: its models are built from a config, never fetched
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TRANSFORMERS_OFFLINE', '1')
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seeds():
    random.seed(1337)
    np.random.seed(1337)
    torch.manual_seed(1337)
