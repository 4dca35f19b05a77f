"""Commands of bash that the reader knows."""

from __future__ import annotations

from collections.abc import Sequence

from es_megatron.config_files.shell.traced import Traced

SHELLS = ("bash", "sh", "zsh", "dash")
DECLARES = ("export", "declare", "local", "readonly", "typeset")
SILENT = (
    "echo",
    "printf",
    "ls",
    "cp",
    "mv",
    "cat",
    "test",
    "[",
    "[[",
    "ln",
    "chmod",
    "md5sum",
    "grep",
    "sed",
    "awk",
    "git",
    "export",
    "pkill",
    "kill",
    "killall",
    "rm",
    "mkdir",
    "scp",
    "rsync",
    "wc",
    "head",
    "tail",
    "find",
    "sleep",
    "source",
    "read",
)
"""Commands that name a training script without starting it."""


def script_after(texts: Sequence[str], at: int) -> int | None:
    """Where the script of `bash -c SCRIPT` stands; None if that shell is given none."""
    for place in range(at + 1, len(texts) - 1):
        if not texts[place].startswith("-"):
            return None
        if not texts[place].startswith("--") and "c" in texts[place]:
            return place + 1
    return None


def trimmed(runs: Traced) -> Traced:
    """Without line ends at its end, as `$(...)` gives it."""
    found = list(runs)
    while found and not found[-1].text.rstrip("\r\n"):
        found.pop()
    if found:
        last = found[-1]
        found[-1] = last.part(0, len(last.text.rstrip("\r\n")))
    return tuple(found)
