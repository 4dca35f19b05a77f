"""The readers behind `es-megatron patch`: values of bash scripts, layouts, passes over token files, members of JSON."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest

from es_megatron.config_files.existing_run import ExistingRun, chunks_of_layout, parse_options
from es_megatron.config_files.json_members import members_of
from es_megatron.config_files.passes import passes_of, training_share
from es_megatron.config_files.shell.conditions import calculate
from es_megatron.config_files.shell.expansion import plain
from es_megatron.config_files.shell.interpreter import Interpreter, values_of
from es_megatron.config_files.shell.traced import unknowns
from es_megatron.errors import ConfigError


@pytest.mark.parametrize(
    ("script", "value"),
    [
        ('A=1; B="$A"2', "12"),
        ("B=${A:-4}", "4"),
        ("A=; B=${A:-4}", "4"),
        ("A=; B=${A-4}", ""),
        ("A=2; B=${A:+yes}", "yes"),
        ("A=(1 2 3); B=${#A[@]}", "3"),
        ("A=(1 2 3); B=${A[1]}", "2"),
        ("B=$((2 * (3 + 4) / 5 % 3 - 1))", "1"),
        ("A=8; B=$(( $A*2 ))", "16"),
        ("B=1; B+=2", "12"),
        ("A=2\nif [ $A -gt 1 ]; then B=many; else B=one; fi", "many"),
        ("A=x\nif [[ $A == y || -z $A ]]; then B=1; elif [[ $A == x ]]; then B=2; else B=3; fi", "2"),
        ("A=7b\ncase $A in 1b|3b) B=1;; 7*) B=2;; *) B=3;; esac", "2"),
        ("B=1; [ 1 -eq 2 ] && B=2", "1"),
        ("B=1; [ 1 -eq 2 ] || B=2", "2"),
        ("if ! [ a = b ]; then B=1; fi", "1"),
        ("export B='a b'", "a b"),
        (": <<EOF\nB=2\nEOF\nB=1", "1"),
        ('B="a\\"b"', 'a"b'),
        ("B=1 # B=2", "1"),
        ('A=(1 2 3 4); B="${A[*]:1:2}"', "2 3"),
        ("A=a/b.c; B=${A##*/}", "b.c"),
        ("A=a.b; B=${A%.b}${A#a}", "a.b"),
        ("A='1 2 1'; B=${A//1/x}", "x 2 x"),
        ("B=$(echo one two)", "one two"),
        ("B=$(cat <<EOF\n1\n2\nEOF\n)", "1\n2"),
        ("read -r B <<< hello", "hello"),
        ("f() { B=$2; }; f 1 2", "2"),
        ('f() { shift; B="$*"; }; f 1 2 3', "2 3"),
        ("set -- a b; B=$2$#", "b2"),
        ("B=; for A in 1 2; do B=$B$A; done", "12"),
        ("A=x; case $A in y) B=1 ;; x | z) B=2 ;; esac", "2"),
        ("eval 'B=7'", "7"),
        ("B=1; bash -c 'B=2'", "1"),
        ("A=1 B=2; A=3 true; B=$A", "1"),
        ("B=$'a\\tb'", "a\tb"),
        ("unset B; B=${B:-${C:-3}}", "3"),
    ],
)
def test_values_are_those_of_bash(script, value):
    assert plain(values_of(script)["B"]) == value
    told = subprocess.run(
        ["bash", "-c", f'{script}\nprintf %s "$B"'], capture_output=True, text=True, timeout=20, check=False
    )
    assert told.stdout == value


@pytest.mark.parametrize(
    "script",
    [
        "B=$1",
        "B=$(hostname)",
        "B=1; if [ -n $X ]; then B=2; fi",
        "for B in *.json; do :; done",
        "B=${A%x}",
        "B=$((A + 1))",
    ],
)
def test_what_the_text_does_not_tell_is_not_guessed(script):
    value = values_of(script)["B"]
    assert isinstance(value, tuple)
    assert len(unknowns(plain(value))) == 1
    (call,) = [call for call in Interpreter().run(f"{script}\necho $B") if call.fields[0].text == "echo"]
    assert [field.text for field in call.fields[1:]] == [plain(value)]


def test_arithmetic_runs_nothing():
    assert calculate("2 ** 3", {}.get) is None
    assert calculate("1 / 0", {}.get) is None
    assert calculate("__import__", {}.get) is None
    assert calculate("2 * A", {"A": "4"}.get) == 8


@pytest.mark.parametrize(("layout", "chunks"), [("E|t|t|L", 4), ("E(t|)*7L", 8), ("Et,(tt|)*3,(t|)*2,mL", 6)])
def test_chunks_of_a_pipeline_layout(layout, chunks):
    assert chunks_of_layout(layout) == chunks


def write_token_file(prefix: Path, documents: int, tokens: int) -> None:
    """Files as Megatron's IndexedDatasetBuilder writes them: zeros, one sequence per document."""
    prefix.with_suffix(".bin").write_bytes(bytes(4 * documents * tokens))
    head = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 4, documents, documents + 1)
    lengths = struct.pack(f"<{documents}i", *[tokens] * documents)
    starts = struct.pack(f"<{documents}q", *range(0, 4 * documents * tokens, 4 * tokens))
    prefix.with_suffix(".idx").write_bytes(
        head + lengths + starts + struct.pack(f"<{documents + 1}q", *range(documents + 1))
    )


def test_passes_are_told_or_counted_from_the_files(tmp_path):
    write_token_file(tmp_path / "text", 10, 1001)
    arguments = ("--data-path", str(tmp_path / "text"), "--seq-length", "100", "--train-samples", "300")
    run = ExistingRun("script", parse_options(arguments))
    assert (passes_of(run, None).count, passes_of(run, 2.5).count) == (3.0, 2.5)
    half = ExistingRun("script", parse_options((*arguments, "--split", "50,50,0")))
    assert passes_of(half, None).count == 6.0
    gone = ExistingRun("script", parse_options(("--data-path", "/no/such", *arguments[2:])))
    assert "assumed" in passes_of(gone, None).source


def test_training_share():
    assert training_share("949,50,1") == 0.949
    assert training_share(None) == 1.0
    assert training_share("a,b") == 1.0


def test_members_of_json():
    text = '{"a": {"b": "}"}, "c": [1, {"d": 2}]}'
    opened, members = members_of(text)
    assert opened == 0
    assert [text[member.start : member.end] for member in members] == ['"a": {"b": "}"}', '"c": [1, {"d": 2}]']
    with pytest.raises(ConfigError):
        members_of('{"a" 1}')
