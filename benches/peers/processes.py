#!/usr/bin/env python3
"""Training over several processes: `mpirun -n N rehearsal run` beside PyTorch DDP, and beside one process with as many threads.

Usage: pip install -r benches/peers/requirements.txt; cargo build --release --features mpi
       python benches/peers/processes.py [--model small-30m] [--ranks 2] [--pairs 3] [--steps 16]

The same work: --batch sequences of --tokens tokens a step, cut over the ranks, one thread each, AdamW, the norm clipped. Each figure is of whole
commands: the difference of a run of 4 + steps and one of 4 steps, so that starting, loading and ending count for nobody. Printed: CPU seconds
and seconds of a step, medians over the pairs, and the ratios of neighbouring runs.
"""
import argparse
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import checkpoint

ROOT = pathlib.Path(__file__).resolve().parents[2]
HERE = pathlib.Path(__file__).resolve().parent
FEW = 4

RUN = """seed = 1

[model]
config = "{root}/configs/model/{model}.json"

[tokenizer]
vocab_size = 8192
train_on = ["text"]
bytes_per_set = 400_000

[data.sets.text]
file = "{root}/data/shakespeare.txt.gz"
schema = "text"
plain_text_bytes = 256

[checkpoint]
every_steps = 1000

[[stage]]
name = "base"
kind = "pretrain"
data = [{{ set = "text", share = 1.0 }}]
steps = {few}
batch = {batch}
sequence = {tokens}

[stage.optimizer]
learning_rate = 1e-6
warmup_steps = 1
schedule = "constant"
"""


def used(command, env):
    """CPU seconds and seconds of a command with all that it starts."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([str(part) for part in command], cwd=HERE, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: {(done.stderr or done.stdout)[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, time.perf_counter() - began


def step(command, steps, env):
    few, many = used(command(FEW), env), used(command(FEW + steps), env)
    return [(m - f) / steps for f, m in zip(few, many)]


def commands(args, place):
    """By name: the command of so many steps."""
    run = place / "run.toml"
    run.write_text(RUN.format(root=ROOT, model=args.model, few=FEW, batch=args.batch, tokens=args.tokens))
    folder = place / args.model

    def ours(start, *more):
        def command(steps):
            shutil.rmtree(place / "out", ignore_errors=True)
            return [*start, args.binary, "run", run, "--out", place / "out", "--set", f"stage.base.steps={steps}", *more]
        return command

    def ddp(sharded):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", args.ranks]
        return lambda steps: [*torchrun, "peer_ddp.py", folder, args.batch, args.tokens, steps, sharded]

    mpirun = ["mpirun", "--oversubscribe", "-n", args.ranks]
    return {
        f"ours, one process, {args.ranks} threads": ours([], "--threads", args.ranks),
        f"ours, {args.ranks} processes": ours(mpirun, "--threads", 1, "--set", f"cluster.data={args.ranks}"),
        "DDP, ZeroRedundancyOptimizer": ddp(1),
        "DDP": ddp(0),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=pathlib.Path, default=ROOT / "target/release/rehearsal")
    parser.add_argument("--model", default="small-30m")
    for name, default in dict(ranks=2, pairs=3, steps=16, batch=8, tokens=256).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    args.binary = args.binary.resolve()
    env = dict(os.environ, OMP_NUM_THREADS="1", OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1", HF_HUB_OFFLINE="1")
    with tempfile.TemporaryDirectory() as place:
        place = pathlib.Path(place)
        checkpoint.write(ROOT / f"configs/model/{args.model}.json", place / args.model)
        all_of = commands(args, place)
        found = {name: [] for name in all_of}
        for pair in range(args.pairs):
            for name, command in all_of.items():
                found[name].append(step(command, args.steps, env))
                cpu, wall = found[name][-1]
                print(f"{pair + 1} of {args.pairs}  {name:32} {cpu:7.3f} CPU s  {wall:7.3f} s a step", flush=True)
    own = found[f"ours, {args.ranks} processes"]
    for name, figures in found.items():
        cpu, wall = (statistics.median(column) for column in zip(*figures))
        ratios = [statistics.median(a[i] / b[i] for a, b in zip(figures, own)) for i in (0, 1)]
        print(f"{name:42} {cpu:7.3f} CPU s  {wall:7.3f} s a step, {ratios[0]:5.2f} and {ratios[1]:5.2f} times those of ours over {args.ranks}")


if __name__ == "__main__":
    main()
