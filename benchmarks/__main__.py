"""Runs all benchmarks at a chosen size, and puts their comparisons with others into one table and one JSON file.

    python benchmarks [--quick] [--only WORD ...] [--jobs N] [--out FOLDER]

Each runs in a process of its own; its table goes to `FOLDER/<benchmark>/log.txt`, beside its JSON and its figures. With
more than one job at a time, seconds mean little, and numbers of gradients are what they are.
"""

import argparse
import concurrent.futures
import json
import pathlib
import subprocess
import sys
import time

from support import records

HERE = pathlib.Path(__file__).parent


def run(script, quick, folder):
    """The exit status and the seconds of one benchmark."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(script), "--out", str(folder), *(["--quick"] if quick else [])]
    began = time.perf_counter()
    with (folder / "log.txt").open("w") as log:
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    return status, time.perf_counter() - began


def table(comparisons):
    rows = [("benchmark", "what", "peer", "peer / ours", "of")]
    for name, entries in comparisons.items():
        for row in entries:
            times = "-" if row["times"] is None else f"{row['times']:.3g}"
            rows.append((name, row["what"], row["peer"], times, row["of"]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{size}}" for cell, size in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="toy size, seconds each")
    parser.add_argument("--only", nargs="*", default=[], help="words, of which the name of a benchmark has one")
    parser.add_argument("--jobs", type=int, default=1, help="benchmarks at a time")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
    arguments = parser.parse_args()
    scripts = [p for p in sorted(HERE.glob("*.py")) if p.stem != "figures" and not p.stem.startswith("__")]
    scripts = [p for p in scripts if not arguments.only or any(word in p.stem for word in arguments.only)]
    if not scripts:
        raise SystemExit(f"no benchmark has a name with one of {arguments.only} in it")
    failed, comparisons, skipped = [], {}, {}
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        runs = {p.stem: pool.submit(run, p, arguments.quick, arguments.out / p.stem) for p in scripts}
        for name, future in runs.items():
            status, seconds = future.result()
            print(f"{name:<17} {'ok' if status == 0 else f'failed ({status})':<11} {seconds:6.0f} s", flush=True)
            if status != 0:
                failed.append(name)
                print((arguments.out / name / "log.txt").read_text())
                continue
            record = json.loads((arguments.out / name / f"{name}.json").read_text())
            comparisons[name] = record["comparisons"]
            skipped |= record.get("skipped", {})
    print(f"\n{table(comparisons)}\n")
    for name, why in skipped.items():
        print(f"skipped: {name} ({why})")
    print(", ".join(f"{name} {version}" for name, version in records.versions().items()))
    everything = {"benchmark": "all", "quick": arguments.quick, "comparisons": comparisons, "skipped": skipped}
    print(f"written: {records.write(everything, arguments.out)}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
