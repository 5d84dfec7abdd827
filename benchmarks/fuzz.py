"""Fuzzes the reader of headers, index and config for as long as wanted.

    python benchmarks/fuzz.py --inputs 1000000 --seed 1

Mutates small valid checkpoints in structure and bytes (tests/fuzzing.py). With atheris installed
(pip install atheris) inputs that reach new branches are kept and mutated further; without it all
start from the valid ones. Inputs with any outcome but a checkpoint or an AwqconvError, a
disagreement with the safetensors library, more than a second or more memory than the bound are
written beside the run as fuzz-<n>.bin; the exit status is then 1.
"""

import argparse
import json
import os
import random
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

try:
    import atheris
except ImportError:
    atheris = None

if atheris:
    with atheris.instrument_imports(include=["awqconv", "json"]):
        import fuzzing
else:
    import fuzzing


class Fuzzer:
    """Counts what becomes of inputs; `every` n-th is run under tracemalloc."""

    def __init__(self, inputs: int, every: int) -> None:
        self.inputs, self.every = inputs, every
        self.counts: Counter[str] = Counter()
        self.peak = self.ratio = self.seconds = 0.0
        self.start = time.monotonic()
        self.corpus = TemporaryDirectory()

    def one(self, data: bytes) -> None:
        number = self.counts.total()
        try:
            result = fuzzing.run(data, trace=number % self.every == 0)
        except (Exception, RecursionError) as error:
            self.counts["unexpected"] += 1
            Path(f"fuzz-{number}.bin").write_bytes(data)
            print(f"input {number}: {type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201
        else:
            self.counts["accepted" if result.accepted else "refused"] += 1
            self.seconds = max(self.seconds, result.seconds)
            self.peak = max(self.peak, result.peak)
            self.ratio = max(self.ratio, result.peak / fuzzing.bound(data))
        if number + 1 >= self.inputs:
            self.report()

    def report(self) -> None:
        """Prints the figures as JSON and ends the process: libFuzzer does not return."""
        seconds = time.monotonic() - self.start
        figures = {
            "inputs": self.counts.total(),
            **{kind: self.counts[kind] for kind in ("accepted", "refused", "unexpected")},
            "coverage guided": atheris is not None,
            "inputs a second": round(self.counts.total() / seconds),
            "longest input, ms": round(self.seconds * 1000, 1),
            "peak allocation of an input, KiB": round(self.peak / 1024),
            "peak allocation against its bound": round(self.ratio, 3),
            "inputs traced for allocation": -(-self.counts.total() // self.every),
            "peak of the process, MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        }
        print(json.dumps(figures, indent=2), flush=True)  # noqa: T201
        self.corpus.cleanup()
        os._exit(1 if self.counts["unexpected"] else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--trace-every", type=int, default=8, metavar="N")
    options = parser.parse_args()
    fuzzer, seeds = Fuzzer(options.inputs, options.trace_every), fuzzing.seeds()
    if atheris:
        for i, seed in enumerate(seeds):
            Path(fuzzer.corpus.name, f"seed-{i}").write_bytes(seed)

        def mutator(data: bytes, limit: int, seed: int) -> bytes:
            rng = random.Random(seed)
            if rng.random() < 0.1:
                return atheris.Mutate(data, limit)
            start = data if rng.random() < 0.6 else rng.choice(seeds)
            return fuzzing.mutate(start, rng)[:limit]

        flags = [f"-seed={options.seed}", "-max_len=65536", "-len_control=0", "-verbosity=0"]
        atheris.Setup([sys.argv[0], *flags, fuzzer.corpus.name], fuzzer.one, custom_mutator=mutator)
        atheris.Fuzz()
    rng = random.Random(options.seed)
    while True:
        fuzzer.one(fuzzing.mutate(rng.choice(seeds), rng))


if __name__ == "__main__":
    main()
