#!/usr/bin/env python3
"""Rehearsal beside transformers, TRL and llama.cpp: the same random checkpoint, threads and work, in turns.

Usage: pip install -r benches/peers/requirements.txt; cargo build --release
       python benches/peers/compare.py [--rows REGEX] [--pairs 5] [--out FILE.json] [--folder FOLDER]

Every row of ROWS is one kind of work on one model. A peer is a process that loads once and then works once per turn; between its turns it is
stopped, so that threads that wait actively take nothing from ours. It is started twice, with OMP_WAIT_POLICY active and passive, and the
faster one is kept. Ours is a whole new process of `rehearsal bench` each turn (its loading is not counted, nor is a peer's). Printed: medians
of the rates, and the median, least and largest of the ratios of neighbouring turns, by wall clock and by CPU seconds.
"""
import argparse
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import time

import checkpoint

ROOT = pathlib.Path(__file__).resolve().parents[2]
HERE = pathlib.Path(__file__).resolve().parent


def row(name, model, work, peers, ours, count, **sizes):
    return dict(name=name, model=model, work=work, peers=peers, ours=ours, count=count, sizes=sizes)


def decode(model, dtype, batch, peer, new=128):
    """Tokens a second after the prompts."""
    name = f"decode {batch} {'sequence' if batch == 1 else 'sequences'} of {model}, {dtype}, against {peer}"
    ours = ["generate", "--batch", batch, "--prompt-tokens", 64, "--new-tokens", new, "--dtype", dtype]
    return row(name, model, "decode", [peer], ours, batch * (new - 1), batch=batch, tokens=64, new=new)


def generate(model, batch=64, new=64):
    name = f"generate {batch} sequences of {model}, f32, against transformers"
    ours = ["generate", "--batch", batch, "--prompt-tokens", 64, "--new-tokens", new]
    return row(name, model, "generate", ["transformers"], ours, batch * new, batch=batch, tokens=64, new=new)


def prefill(model, tokens):
    name = f"prefill {tokens} tokens of {model}, f32, against the better of both"
    ours = ["generate", "--batch", 1, "--prompt-tokens", tokens, "--new-tokens", 1]
    return row(name, model, "prefill", ["llama-f32", "transformers"], ours, tokens, batch=1, tokens=tokens, new=1)


def train(model, steps):
    ours = ["train", "--batch", 8, "--sequence", 256, "--steps", steps]
    return row(f"train {model}, 8 x 256 tokens, f32, against transformers", model, "train", ["transformers"], ours, 2048, batch=8, tokens=256)


def grpo(model, steps):
    ours = ["grpo", "--prompts", 8, "--group", 8, "--prompt-tokens", 64, "--new-tokens", 64, "--steps", steps, "--kl-weight", 0]
    return row(f"GRPO step of {model}, 8 x 8 x (64 + 64) tokens, against TRL", model, "grpo", ["trl"], ours, 1)


ROWS = [
    decode("tiny", "f32", 1, "llama-f32", new=256), decode("tiny", "int8", 1, "llama-q8_0", new=256),
    decode("tiny", "f32", 64, "llama-f32"), decode("small-30m", "f32", 64, "llama-f32", new=32), decode("small-64m", "f32", 64, "llama-f32", new=32),
    decode("small-30m", "int8", 64, "llama-q8_0", new=32), decode("small-64m", "int8", 64, "llama-q8_0", new=32),
    decode("base", "int8", 32, "llama-q8_0", new=32),
    generate("tiny"), generate("small-30m", new=32), generate("base", new=16),
    prefill("tiny", 256), prefill("tiny", 1024), prefill("base", 256), prefill("base", 1024),
    train("tiny", 4), train("small-30m", 2), train("small-64m", 2), train("base", 1),
    grpo("tiny", 3), grpo("small-30m", 1), grpo("small-64m", 1),
]


class Peer:
    """A peer process between its turns: stopped."""

    def __init__(self, command, policy, threads):
        settings = dict(os.environ, OMP_NUM_THREADS=str(threads), OMP_WAIT_POLICY=policy, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
        self.policy = policy
        self.process = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=HERE, env=settings, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.read(lambda line: line.get("ready"))
        self.process.send_signal(signal.SIGSTOP)

    def read(self, wanted):
        for line in self.process.stdout:
            if line.startswith("{") and wanted(figures := json.loads(line)):
                return figures
        raise SystemExit(f"the peer ended: {self.process.stderr.read()[-2000:]}")

    def measure(self):
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        figures = self.read(lambda line: "seconds" in line)
        self.process.send_signal(signal.SIGSTOP)
        return figures

    def end(self):
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()


def peer_command(row, peer, place, threads):
    folder, sizes = place / row["model"], row["sizes"]
    options = ["--threads", threads, *(text for key, value in sizes.items() for text in (f"--{key}", value))]
    if peer == "trl":
        return ["peer_trl.py", folder, "--threads", threads]
    if peer == "transformers":
        return ["peer_transformers.py", row["work"], folder, *options]
    return ["peer_llama.py", row["work"], place / f"{row['model']}-{peer.removeprefix('llama-')}.gguf", *options]


def start(row, peer, place, threads):
    """The faster of active and passive waiting."""
    both = [Peer(peer_command(row, peer, place, threads), policy, threads) for policy in ("active", "passive")]
    took = [min(seconds_of(row, p.measure()) for _ in range(2)) for p in both]
    slower, faster = sorted(range(2), key=lambda i: -took[i])
    both[slower].end()
    return both[faster]


def seconds_of(row, figures):
    return figures["decode_seconds"] if row["work"] == "decode" else figures["seconds"]


def cpu_of(row, figures):
    return figures["decode_cpu_seconds"] if row["work"] == "decode" else figures["cpu_seconds"]


def measure_ours(row, binary, place, threads):
    command = [binary, "bench", *map(str, row["ours"]), "--model", place / row["model"], "--threads", str(threads), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: {done.stderr}")
    figures = json.loads(done.stdout)
    share = figures["cpu_seconds"] / figures["wall_seconds"]
    rate = dict(decode="decode_tokens_per_second", prefill="prefill_tokens_per_second").get(row["work"], "tokens_per_second")
    seconds = figures["seconds_per_step"] if row["work"] == "grpo" else row["count"] / figures[rate]
    return dict(seconds=seconds, cpu_seconds=seconds * share, peak_rss_bytes=figures["peak_rss_bytes"], figures=figures)


def run(row, args):
    peers = {peer: start(row, peer, args.folder, args.threads) for peer in row["peers"]}
    turns = []
    measure_ours(row, args.binary, args.folder, args.threads)
    for _ in range(args.pairs):
        turn = dict(ours=measure_ours(row, args.binary, args.folder, args.threads))
        for name, peer in peers.items():
            figures = peer.measure()
            turn[name] = dict(figures, seconds=seconds_of(row, figures), cpu_seconds=cpu_of(row, figures))
        turns.append(turn)
    middle = {name: statistics.median(turn[name]["seconds"] for turn in turns) for name in peers}
    best = min(middle, key=middle.get)
    policy = peers[best].policy
    for peer in peers.values():
        peer.end()
    wall = [turn[best]["seconds"] / turn["ours"]["seconds"] for turn in turns]
    cpu = [turn[best]["cpu_seconds"] / turn["ours"]["cpu_seconds"] for turn in turns]
    rate = lambda who: row["count"] / statistics.median(turn[who]["seconds"] for turn in turns)
    memory = lambda who: max(turn[who]["peak_rss_bytes"] for turn in turns)
    return dict(
        name=row["name"], peer=best, policy=policy, settings=turns[0][best].get("settings"), ours=rate("ours"), theirs=rate(best),
        ratio=statistics.median(wall), least=min(wall), most=max(wall), cpu_ratio=statistics.median(cpu),
        our_bytes=memory("ours"), their_bytes=memory(best), turns=turns,
    )


def prepare(rows, args):
    """Random checkpoints, and their GGUF files."""
    for model in {row["model"] for row in rows}:
        checkpoint.write(ROOT / "configs/model" / f"{model}.json", args.folder / model)
    for row in rows:
        for peer in row["peers"]:
            file = args.folder / f"{row['model']}-{peer.removeprefix('llama-')}.gguf"
            if peer.startswith("llama") and not file.exists():
                command = [args.binary, "export", args.folder / row["model"], "--format", "gguf", "--dtype", peer.removeprefix("llama-"), "--out", file]
                subprocess.run(command, check=True, capture_output=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=pathlib.Path, default=ROOT / "target/release/rehearsal")
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "target/peers", help="checkpoints are made here once")
    parser.add_argument("--rows", default=".", help="a regular expression on the rows' names; --list prints them")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, help="every turn's figures as JSON")
    args = parser.parse_args()
    rows = [row for row in ROWS if re.search(args.rows, row["name"])]
    if args.list:
        raise SystemExit("\n".join(row["name"] for row in rows))
    prepare(rows, args)
    results = []
    for row in rows:
        began = time.time()
        result = run(row, args)
        results.append(result)
        unit = "steps/s" if row["work"] == "grpo" else "tok/s"
        print(
            f"{result['name']}\n  ours {result['ours']:.4g} {unit}, {result['peer']} ({result['policy']}) {result['theirs']:.4g}: {result['ratio']:.2f}x "
            f"({result['least']:.2f} to {result['most']:.2f}), by CPU seconds {result['cpu_ratio']:.2f}x; peak {result['our_bytes'] >> 20} and "
            f"{result['their_bytes'] >> 20} MiB [{time.time() - began:.0f} s]",
            flush=True,
        )
        if args.out:
            args.out.write_text(json.dumps(results, indent=1))
