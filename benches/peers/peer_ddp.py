#!/usr/bin/env python3
"""transformers + PyTorch DDP over gloo: some training steps of one of several processes. Started by processes.py."""
import os
import sys

import torch
import torch.distributed as dist
import transformers
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel


def main():
    folder, batch, tokens, steps, sharded = sys.argv[1], *map(int, sys.argv[2:6])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="grouped_mm", attn_implementation="sdpa")
    model.train()
    # Experts without a token have no gradient; a static graph would not allow for them.
    ddp = DistributedDataParallel(model, find_unused_parameters=False, gradient_as_bucket_view=True)
    settings = dict(lr=1e-6, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    if sharded:
        optimizer = ZeroRedundancyOptimizer(ddp.parameters(), optimizer_class=torch.optim.AdamW, **settings)
    else:
        optimizer = torch.optim.AdamW(ddp.parameters(), **settings)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(300, model.config.vocab_size, (batch, tokens), generator=generator)
    own = ids[rank * batch // ranks : (rank + 1) * batch // ranks]
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=not sharded)
        ddp(input_ids=own, labels=own, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(ddp.parameters(), 1.0)
        optimizer.step()
    dist.barrier()
    sys.stdout.flush()
    # Threads of gloo would wait for one another at exit.
    os._exit(0)


main()
