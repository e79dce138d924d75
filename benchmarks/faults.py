"""Injures runs for real, and measures what it costs: the fault matrix, as one table.

    python benchmarks/faults.py                     # every row, its full count: hours
    python benchmarks/faults.py killed frozen --trials 5
    python benchmarks/faults.py --show              # the table of what is known

Recovery is the time from the injection until the last of the others has finished a sum or an update
in a group without the victim; updates lost are gaps in the updates that were committed; forks are
updates that two members committed with other weights; failures are what should not have happened,
each with its reason. A row is kept once for every kind of machine, with what it was measured on.
What members wrote down is kept beside the table in results/faults-events/KIND/ROW.jsonl.gz, but for
every update's quorum.
"""

import argparse
import gzip
import json
import signal
import sys
from typing import Any

import faults_cluster
import faults_disk
import faults_inside
import faults_members
import faults_network
from injured import Event, Row
from measure import RESULTS, machine

ROWS: dict[str, Row] = {
    **faults_members.ROWS,
    **faults_disk.ROWS,
    **faults_network.ROWS,
    **faults_inside.ROWS,
    **faults_cluster.ROWS,
}
TABLE, EVENTS = RESULTS / "faults.json", RESULTS / "faults-events"


def keep(name: str, kind: str, events: list[Event]) -> None:
    """Put the events of a row in the place of those of an earlier time on this kind of machine."""
    lines = [json.dumps(one) for one in events if one["event"] != "quorum"]
    folder = EVENTS / kind.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))


def show(known: dict[str, dict[str, Any]]) -> None:
    """The table, in the order of the fault matrix; a line for every kind of machine."""
    print(
        "| row | fault | n | p50 s | p95 s | max s | wanted | failures | lost | forks | machine "
        "| commit | |"
    )
    print("| --- " * 13 + "|")
    for name, row in sorted(ROWS.items(), key=lambda item: item[1].number):
        for kind, entry in sorted(known.get(name, {}).items()):
            wanted = f"p95 {row.p95:g}" if row.p95 is not None else "none fails"
            times = [f"{entry[key]:.2f}" if key in entry else "" for key in ("p50", "p95", "max")]
            if row.goodput is not None:
                wanted = f"goodput {row.goodput:.0%}"
                times[0] = f"goodput {entry['goodput']:.0%}"
            counts = [str(entry.get(key, "")) for key in ("failures", "updatesLost", "forks")]
            cells = [str(row.number), row.fault, f"{entry['n']:,}", *times, wanted, *counts]
            cells += [kind, entry["machine"].get("commit", "")]
            print("|", " | ".join([*cells, "met" if row.met(entry) else "MISSED"]), "|")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--trials", type=int, help="instead of a row's full count")
    parser.add_argument("--show", action="store_true", help="only print the table")
    options = parser.parse_args()
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(ROWS)}")
    # Like Ctrl-C, so that no group of a row outlives it and slows what is measured next.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    known = json.loads(TABLE.read_text()) if TABLE.exists() else {"rows": {}}
    for name in () if options.show else options.rows or ROWS:
        row = ROWS[name]
        print(f"{name}: {row.fault}", flush=True)
        on = machine(("demoreset", "torch", "torchft"))
        outcome = row.measure(options.trials or row.trials)
        keep(name, on["kind"], outcome.events)
        entry = {"row": row.number, "fault": row.fault, **outcome.entry(), "machine": on}
        known["rows"].setdefault(name, {})[on["kind"]] = entry
        TABLE.write_text(json.dumps(known, indent=2) + "\n")
        print(f"  {entry}", flush=True)
    show(known["rows"])


if __name__ == "__main__":
    main()
