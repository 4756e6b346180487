"""What every peer process does: load once, warm up, then measure once for every line that comes in.

A peer prints one JSON object per line. It is stopped (SIGSTOP) by the driver between its turns, so that its waiting threads take
nothing from whoever is measured then.
"""
import json
import resource
import sys
import time


def peak_rss():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(work):
    """Seconds and CPU seconds of one call, with its own figures."""
    wall, cpu = time.perf_counter(), time.process_time()
    figures = work() or {}
    return dict(seconds=time.perf_counter() - wall, cpu_seconds=time.process_time() - cpu, peak_rss_bytes=peak_rss()) | figures


def say(figures):
    sys.stdout.write(json.dumps(figures) + "\n")
    sys.stdout.flush()


def serve(work, warm_up=True):
    """Measures `work` once per line on standard input, until it ends."""
    if warm_up:
        work()
    say(dict(ready=True))
    for _ in sys.stdin:
        say(measured(work))
