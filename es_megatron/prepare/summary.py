"""What a preparation has read, kept and left out, as lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

MEGABYTE = 10**6
_SHOWN = 5


def summarise(report: dict[str, Any], output: Path) -> str:
    """Put a report into a table, with what was read and not kept below."""
    lines = [f"{'component':<16}{'documents':>11}{'megabytes':>11}{'tokens':>13}{'validation':>12}"]
    for entry in report["components"]:
        train, validation = entry["train"], entry["validation"]
        megabytes = (train["bytes"] + validation["bytes"]) / MEGABYTE
        counts = f"{train['documents'] + validation['documents']:>11,}{megabytes:>11.2f}"
        lines.append(f"{entry['name']:<16}{counts}{train['tokens']:>13,}{validation['tokens']:>12,}")
    for entry in report["components"]:
        lines.extend(_account(entry))
    lines.append(f"vocabulary {report['vocab_size']:,}, {report['seconds']:.1f} s, blend file {output / 'blend.yaml'}")
    if unread := lost(report):
        lines.append(f"NOT READ: {unread} of what was found, as named above (exit code 3)")
    return "\n".join(lines)


def lost(report: dict[str, Any]) -> int:
    """Files and folders that may hold text, and that nobody has decided to leave out."""
    return sum(each["lost"] for entry in report["components"] for each in entry["found"]["left_out"])


def _account(entry: dict[str, Any]) -> Iterator[str]:
    """What was read is what was written and what was left out; then what stands out among that."""
    name, found = entry["name"], entry["found"]
    parts = {
        "training": entry["train"]["documents"],
        "validation": entry["validation"]["documents"],
        "empty": found["empty_documents"],
        **found["bad_entries"],
        "beyond --max-megabytes": found["beyond_limit"],
        "held out elsewhere": found["held_out_elsewhere"],
    }
    told = " + ".join(f"{count:,} {what}" for what, count in parts.items() if count)
    files = f"{found['files']:,} file{'' if found['files'] == 1 else 's'}"
    yield f"{name}: {found['read']:,} read from {files} = {told}"
    if found["bad_entries"]:
        yield from _some(f"{name}: left out: ", found["bad_places"], sum(found["bad_entries"].values()))
    if found["byte_order_marks"]:
        yield f"{name}: {found['byte_order_marks']:,} byte-order marks dropped"
    if found["duplicate_documents"]:
        of_files = [f"{count:,} of {path}" for path, count in found["duplicates_by_file"].items()]
        of_files = of_files if found["files"] > 1 else []
        yield f"{name}: {found['duplicate_documents']:,} of the documents stood before, word for word"
        yield from _some(f"{name}:   ", of_files, len(of_files))
    for lost_ones in (True, False):
        told_of = [f"{each['path']} {each['reason']}" for each in found["left_out"] if each["lost"] is lost_ones]
        yield from _some(
            f"{name}: {'NOT READ' if lost_ones else 'not read'}: ", told_of, len(told_of), 20 if lost_ones else _SHOWN
        )


def _some(before: str, lines: list[str], count: int, shown: int = _SHOWN) -> Iterator[str]:
    yield from (before + line for line in lines[:shown])
    if count > shown:
        yield f"{before}{count - shown:,} more (prepare.json has a list)"
