#!/usr/bin/env python3
"""Speed over one quantity at a time, as pictures: what `rehearsal bench` measures beside what the machine allows.

Usage: cargo build --release; python benches/sweep.py [--pictures batch,threads] [--out FOLDER] [--quick]
       python benches/sweep.py --from docs/sweep.json        draws anew, without measuring

Each picture goes over one quantity and leaves the others as its panels say; on the left tokens are generated, on the right
trained on. Two models are measured: configs/model/tiny.json and small-30m.json.

  batch       sequences at once, 1 to 128
  context     tokens of a prompt, or of a sequence that is trained on, 16 to 1792
  experts     routed experts of a layer, 4 to 64
  vocabulary  tokens of the vocabulary, 1024 to 65536
  threads     1 to --threads

Written are FOLDER/sweep-PICTURE.svg and all figures with the machine's rates, FOLDER/sweep.json, which keeps its other pictures.
Solid lines were measured, prompts included (medians of --repeat runs, bars from the least to the most); dashed lines are
`limit_tokens_per_second`, the most that the machine's measured rates allow for the same work.
"""
import argparse
import itertools
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from html import escape
from typing import Callable, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
MODELS = ("tiny", "small-30m")
WORKS = {"generate": "new tokens a second", "train": "trained tokens a second"}
BASE = {"generate": {"batch": 32, "prompt-tokens": 16, "new-tokens": 128}, "train": {"batch": 8, "sequence": 128}}
SPEED, LIMIT, DECODE = "tokens_per_second", "limit_tokens_per_second", "decode_tokens_per_second"


class Sweep(NamedTuple):
    """One picture: its quantity, the names of the panels' axes, the values, and what a value sets: flags or a key of config.json."""
    quantity: str
    axes: tuple
    values: tuple
    settings: Callable = lambda work, value: {}
    config_key: str = ""


def context(work, value):
    if work == "train":
        return {"batch": max(1, 2048 // value), "sequence": value}
    return {"batch": 8, "prompt-tokens": value, "new-tokens": 256}


def sweeps(threads):
    """The pictures by name, for at most so many threads."""
    counts = range(1, threads + 1) if threads <= 8 else sorted({threads} | {2**i for i in range(threads.bit_length())})
    return {
        "batch": Sweep("the batch", ("sequences in all", "sequences of a step"), (1, 2, 4, 8, 16, 32, 64, 128),
                       lambda work, value: {"batch": value}),
        "context": Sweep("the context", ("tokens of a prompt", "tokens of a sequence (about 2048 in a step)"),
                         (16, 64, 256, 512, 1024, 1792), context),
        "experts": Sweep("the number of experts", ("routed experts of a layer",) * 2, (4, 8, 16, 32, 64), config_key="n_routed_experts"),
        "vocabulary": Sweep("the vocabulary", ("tokens of the vocabulary",) * 2, tuple(2**i for i in range(10, 17)),
                            config_key="vocab_size"),
        "threads": Sweep("threads", ("threads",) * 2, tuple(counts), lambda work, value: {"threads": value}),
    }


def fail(message):
    sys.exit(f"error: {message}")


def rehearsal(binary, *arguments):
    """The JSON object that the program prints."""
    command = [str(binary), *map(str, arguments), "--json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            fail(f"`{' '.join(command)}` ended with {done.returncode}: {done.stderr.strip()}")
        return json.loads(done.stdout)
    except (OSError, ValueError) as error:
        fail(f"`{' '.join(command)}`: {error}; build it with `cargo build --release`")


def measure(options, sweep, work, model, value, folder):
    """The point of one model at one value: its settings, and the medians of its speeds."""
    path = ROOT / f"configs/model/{model}.json"
    if sweep.config_key:
        config = json.loads(path.read_text())
        path = pathlib.Path(folder) / f"{model}.json"
        path.write_text(json.dumps(config | {sweep.config_key: value}))
    settings = BASE[work] | {"threads": options.threads} | sweep.settings(work, value)
    if work == "train":
        settings["steps"] = min(16, max(1, (1024 if options.quick else 8192) // (settings["batch"] * settings["sequence"])))
    elif options.quick:
        settings["new-tokens"] = 32
    flags = [word for name, setting in settings.items() for word in (f"--{name}", setting)]
    runs = [rehearsal(options.binary, "bench", work, "--model", path, *flags) for _ in range(options.repeat)]
    if LIMIT not in runs[0]:
        fail(f"{options.binary} tells no {LIMIT}: it is older than this script; build it with `cargo build --release`")
    speeds = [run[SPEED] for run in runs]
    medians = {key: statistics.median(run[key] for run in runs) for key in (SPEED, LIMIT, DECODE) if key in runs[0]}
    return {"work": work, "model": model, "value": value, "settings": settings, "least": min(speeds), "most": max(speeds)} | medians


def measure_all(options):
    """Measures, draws and writes picture after picture, so that who stops it loses none that was done."""
    file = options.out / "sweep.json"
    figures = read(file) if file.exists() else {}
    known, done = sweeps(options.threads), 0
    values = {name: known[name].values for name in options.pictures}
    if options.quick:
        values = {name: sorted({all[0], all[len(all) // 2], all[-1]}) for name, all in values.items()}
    places = len(WORKS) * len(MODELS) * sum(map(len, values.values()))
    machine = rehearsal(options.binary, "bench", "machine", "--threads", options.threads)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.pictures:
            points = []
            for work, model, value in itertools.product(WORKS, MODELS, values[name]):
                points.append(measure(options, known[name], work, model, value, folder))
                done += 1
                speed, limit = points[-1][SPEED], points[-1][LIMIT]
                print(f"[{done}/{places}] {name} {value}, {work}, {model}: {speed:,.0f} tokens/s of {limit:,.0f}", flush=True)
            settings = {key: getattr(options, key) for key in ("threads", "repeat", "quick")}
            figures[name] = {"machine": machine, **settings, "points": points}
            file.write_text(json.dumps(figures).replace('{"work"', '\n{"work"') + "\n")  # A point a line.
            draw(options, name, figures[name])


def redraw(options):
    figures = read(options.figures)
    for name in options.pictures or figures:
        if name not in figures:
            fail(f"{options.figures} has figures of {', '.join(figures) or 'nothing'}, not of {name}; measure it without --from")
        draw(options, name, figures[name])


def draw(options, name, figure):
    file = options.out / f"sweep-{name}.svg"
    file.write_text(picture(sweeps(1)[name], figure))
    print(f"wrote {file}", flush=True)


def read(file):
    """Figures that this script wrote: a picture's by its name."""
    try:
        figures = json.loads(file.read_text())
        if not [picture(sweeps(1)[name], figure) for name, figure in figures.items()]:
            fail(f"{file} has no figures")
        return figures
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        fail(f"{file} is not as this script writes it ({type(error).__name__}: {error}); move it away and measure anew")


# The picture. Colours and forms differ by model, so that neither alone must be seen; light unless a reader prefers dark.
WIDTH, HEIGHT, TOP, BOTTOM, LEFTS, PANEL = 960, 452, 112, 366, (76, 556), 380
COLOURS = ("#2f7fd0", "#d9701a")
STYLE = """<style>@media (prefers-color-scheme: dark) {
.ground { fill: #14171c } .ink { fill: #e2e5ea } .pale { fill: #a3aab5 } .grid { stroke: #343a44 } .axis { stroke: #a3aab5 } }</style>"""


def text(x, y, content, anchor="start", kind="ink", size=12, more=""):
    fill = {"ink": "#1f2328", "pale": "#59636e"}[kind]
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}" fill="{fill}" font-size="{size}"{more}>{escape(content)}</text>'


def line(x1, y1, x2, y2, more='class="axis" stroke="#59636e"'):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {more}/>'


def ticks(low, high):
    """1, 2 and 5 times powers of ten around a range: the last below it to the first above it."""
    low, high = low / 1.05, high * 1.05
    marks = [m * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for m in (1, 2, 5)]
    first, last = max(m for m in marks if m <= low), min(m for m in marks if m >= high)
    return [m for m in marks if first <= m <= last]


def logarithmic(low, high, start, end):
    """Numbers to places; a lone number stands in the middle."""
    span = math.log(high / low)
    return lambda number: start + (end - start) * (math.log(number / low) / span if span else 0.5)


def marker(index, x, y, hollow):
    """A disc or a square, or its outline."""
    paint = f'stroke="{COLOURS[index]}" stroke-width="1.5" fill="{"none" if hollow else COLOURS[index]}"'
    return f'<rect x="{x - 3.3:.1f}" y="{y - 3.3:.1f}" width="6.6" height="6.6" rx="{(3.3, 0)[index]}" {paint}/>'


def curve(index, places, dashes="", width=2):
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    stroke = f'stroke="{COLOURS[index]}" stroke-width="{width}" stroke-dasharray="{dashes or "none"}"'
    return f'<polyline points="{points}" fill="none" {stroke}/>'


def panel(work, axis, points, left, decoding):
    """Frame, ticks and lines of one kind of work."""
    values = sorted({point["value"] for point in points})
    keys = ["least", "most", LIMIT] + ([DECODE] if decoding else [])
    marks = ticks(*(bound(point[key] for point in points for key in keys) for bound in (min, max)))
    across = logarithmic(values[0], values[-1], left + 14, left + PANEL - 14)
    up = logarithmic(marks[0], marks[-1], BOTTOM, TOP)
    right, first = left + PANEL, points[0]["settings"]
    same = [f" --{key} {value}" for key, value in first.items() if all(point["settings"][key] == value for point in points)]
    parts = [text(left, TOP - 12, f"bench {work}{''.join(same)}", kind="pale", size=11),
             text((left + right) / 2, BOTTOM + 42, axis, "middle"),
             text(left - 58, (TOP + BOTTOM) / 2, WORKS[work], "middle", more=f' transform="rotate(-90 {left - 58} {(TOP + BOTTOM) / 2})"')]
    for mark in marks:
        parts += [line(left, up(mark), right, up(mark), 'class="grid" stroke="#d8dee4"'),
                  text(left - 6, up(mark) + 4, f"{mark:,.0f}" if mark >= 1 else f"{mark:g}", "end")]
    for value in values:
        parts += [line(across(value), BOTTOM, across(value), BOTTOM + 5), text(across(value), BOTTOM + 19, str(value), "middle", size=11)]
    parts.append(line(left, BOTTOM, right, BOTTOM))
    for index, model in enumerate(MODELS):
        own = sorted((point for point in points if point["model"] == model), key=lambda point: point["value"])

        def places(key, own=own):
            return [(across(point["value"]), up(point[key])) for point in own]
        # A lone limit is a dash, too.
        limits = places(LIMIT) if len(values) > 1 else [(x + by, y) for x, y in places(LIMIT) for by in (-14, 14)]
        parts.append(curve(index, limits, "7 5", 1.5))
        if decoding:
            parts += [curve(index, places(DECODE), "1.5 3.5", 1.5)] + [marker(index, x, y, True) for x, y in places(DECODE)]
        parts += [line(x, low, x, high, f'stroke="{COLOURS[index]}"') for (x, low), (_, high) in zip(places("least"), places("most"))]
        parts += [curve(index, places(SPEED))] + [marker(index, x, y, False) for x, y in places(SPEED)]
    return parts


def legend(decoding):
    """A row for each model."""
    parts, kinds = [], [("measured", ""), ("limit", "7 5")] + [("decoding alone, without its prompts", "1.5 3.5")] * decoding
    for (index, model), (column, (words, dashes)) in itertools.product(enumerate(MODELS), enumerate(kinds)):
        x, y = LEFTS[0] + 190 * column, 56 + 18 * index
        parts += [curve(index, [(x, y), (x + 30, y)], dashes), text(x + 36, y + 4, f"{model}, {words}")]
        parts += [] if words == "limit" else [marker(index, x + 15, y, bool(dashes))]
    return parts


def picture(sweep, figure):
    """The SVG text of one picture."""
    machine, title = figure["machine"], f"Speed over {sweep.quantity}: measured, and the machine's limit"
    decoding, rates = sweep.quantity == "the context", machine["all_threads"]
    runs = "one run each" if figure["repeat"] == 1 else f"medians of {figure['repeat']} runs, bars from least to most"
    foot = (f"{machine['processor']}, {machine['instruction_set']}; with --threads {figure['threads']}: "
            f"{rates['f32_flops_per_second'] / 1e9:,.0f} GFLOP/s in f32, {rates['dram_bytes_per_second'] / 1e9:,.0f} GB/s of memory; "
            f"{runs}; axes are logarithmic")
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-family="sans-serif">',
             f"<title>{escape(title)}</title>", STYLE, f'<rect width="{WIDTH}" height="{HEIGHT}" class="ground" fill="#ffffff"/>',
             text(LEFTS[0], 32, title, size=17), text(LEFTS[0], HEIGHT - 14, foot, kind="pale", size=11), *legend(decoding)]
    for work, axis, left in zip(WORKS, sweep.axes, LEFTS):
        points = [point for point in figure["points"] if point["work"] == work]
        parts += panel(work, axis, points, left, decoding and work == "generate")
    return "\n".join(parts + ["</svg>"]) + "\n"


def count(word):
    if word.isascii() and word.isdigit() and 1 <= int(word) <= 4096:
        return int(word)
    raise argparse.ArgumentTypeError(f"{word!r} is no whole number from 1 to 4096")


def names(word):
    asked, known = dict.fromkeys(word.split(",")), sweeps(1)
    for wrong in (name for name in asked if name not in known):
        raise argparse.ArgumentTypeError(f"no picture is called {wrong!r}; there are {', '.join(known)}")
    return list(asked)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs", metavar="FOLDER", help="where to write (default: docs)")
    parser.add_argument("--pictures", type=names, metavar="NAMES", help="names with commas between them (default: all)")
    parser.add_argument("--threads", type=count, metavar="N", help="threads of every run (default: all cores)")
    parser.add_argument("--repeat", type=count, metavar="R", help="runs of a point (default: 3, with --quick 1)")
    parser.add_argument("--binary", type=pathlib.Path, metavar="PATH", help="the program (default: target/release/rehearsal)")
    parser.add_argument("--quick", action="store_true", help="three values of each quantity and less work at each, to try it out")
    parser.add_argument("--from", dest="figures", type=pathlib.Path, metavar="FILE", help="draw these figures; measure nothing")
    options = parser.parse_args()
    if options.figures and (options.threads or options.repeat or options.binary or options.quick):
        parser.error("--from measures nothing, so --threads, --repeat, --binary and --quick do not go with it")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        if options.figures:
            return redraw(options)
        options.pictures = options.pictures or list(sweeps(1))
        options.threads = options.threads or len(os.sched_getaffinity(0))
        options.repeat = options.repeat or (1 if options.quick else 3)
        options.binary = options.binary or ROOT / "target/release/rehearsal"
        measure_all(options)
    except OSError as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit("stopped; the pictures that were finished are written")


if __name__ == "__main__":
    main()
