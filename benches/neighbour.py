#!/usr/bin/env python3
"""Two threads beside a busy neighbour on two cores, against one thread beside the same neighbour.

Usage: cargo build --release; python benches/neighbour.py [--model tiny] [--pairs 9] [--bin target/release/rehearsal]

A process that never rests runs all the while. Decoding and training take turns with 1 thread and with 2; printed is the median,
least and largest ratio of neighbouring turns by wall clock. 1.0 means that the second thread does no harm.
"""
import argparse
import json
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
WORKS = {
    "decode 1 sequence": ("decode_tokens_per_second", ["generate", "--batch", "1", "--new-tokens", "512"]),
    "decode 64 sequences": ("decode_tokens_per_second", ["generate", "--batch", "64", "--new-tokens", "64"]),
    "train": ("tokens_per_second", ["train", "--batch", "8", "--sequence", "128", "--steps", "3"]),
}


def rate(binary, model, work, threads):
    key, args = WORKS[work]
    command = [binary, "bench", *args, "--model", str(ROOT / f"configs/model/{model}.json"), "--threads", str(threads), "--json"]
    if args[0] == "generate":
        command += ["--prompt-tokens", "16"]
    return json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)[key]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--bin", default=str(ROOT / "target/release/rehearsal"))
    options = parser.parse_args()
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        for work in WORKS:
            pairs = [[rate(options.bin, options.model, work, threads) for threads in (1, 2)] for _ in range(options.pairs)]
            ratios = sorted(two / one for one, two in pairs)
            ones = statistics.median(one for one, _ in pairs)
            print(f"{work:20} 1 thread {ones:9.0f} tok/s, 2 threads x {statistics.median(ratios):.2f} "
                  f"({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)
    finally:
        neighbour.kill()
        neighbour.wait()


if __name__ == "__main__":
    main()
