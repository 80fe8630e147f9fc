"""What test_torchrun starts: processes.train_some(folder, base, packed, options), from the command line."""

import json
import sys
from pathlib import Path

import torch
from processes import train_some

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, base, packed, options = sys.argv[1:]
    train_some(Path(folder), base, json.loads(packed), json.loads(options))
