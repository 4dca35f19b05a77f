"""The reader of bash against a grammar of bash: the same commands with the same words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from es_megatron.config_files.shell.commands import DECLARES
from es_megatron.config_files.shell.grammar import Parser
from es_megatron.config_files.shell.tree import (
    Block,
    Branches,
    Case,
    Command,
    Function,
    Group,
    Loop,
    Simple,
)
from tests.shell_shapes import FORMS, shapes
from tests.unit.test_config_patch import GOLDEN, SCRIPTS

tree_sitter = pytest.importorskip("tree_sitter")
tree_sitter_bash = pytest.importorskip("tree_sitter_bash")


def simple_commands(block: Block) -> Iterator[Simple]:
    for statement in block:
        for _, pipeline in statement.parts:
            for command in pipeline.commands:
                yield from of_command(command)


def of_command(command: Command) -> Iterator[Simple]:
    if isinstance(command, Simple):
        yield command
    elif isinstance(command, Branches):
        for condition, body in command.branches:
            yield from simple_commands(condition)
            yield from simple_commands(body)
    elif isinstance(command, Case):
        for _, body in command.branches:
            yield from simple_commands(body)
    elif isinstance(command, Loop):
        yield from simple_commands(command.condition)
        yield from simple_commands(command.body)
    elif isinstance(command, Function):
        yield from of_command(command.body)
    elif isinstance(command, Group):
        yield from simple_commands(command.body)


def ours(text: str) -> list[list[str]]:
    found = []
    for command in simple_commands(Parser(text).script()):
        words = [text[word.start : word.end] for word in command.words]
        if words and words[0] not in ("[[", "((", "[", *DECLARES, "unset"):
            found.append(words)
    return found


def theirs(text: str) -> list[list[str]]:
    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_bash.language()))
    data, found = text.encode(), list[list[str]]()

    def walk(node: Any) -> None:
        if node.type == "command":
            words = [each for each in node.children if each.type not in ("variable_assignment", "herestring_redirect")]
            found.append([data[each.start_byte : each.end_byte].decode() for each in words])
        if node.type not in ("command_substitution", "process_substitution", "variable_assignment"):
            for child in node.children:
                walk(child)

    walk(parser.parse(data).root_node)
    return [words for words in found if words and words[0] != "unset"]


@pytest.mark.parametrize("form", FORMS)
def test_shapes(form):
    (shape,) = (each for each in shapes() if each.name == f"{form}-torchrun-odd")
    assert ours(shape.text) == theirs(shape.text)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_of_teams(name):
    text = (GOLDEN / name).read_text()
    assert ours(text) == theirs(text)


ODD = {
    "case with brackets": "case $x in (a|b) one 1 ;; c) two;; *) three ;; esac\nfour",
    "test with operators": "if [[ $a == b && ( $c -gt 2 || -f x ) ]]; then yes; elif ! no; then maybe; fi",
    "nested quotes": 'run "$(echo "a b" | tr a b)" `date +%s` "${x:-"y z"}" $((1 + (2)))',
    "comment after a continued line": "run a \\\n  # why\nnext b",
    "arrays": 'x=(1 "2 3" # four\n 5)\nrun "${x[@]}" "${#x[@]}" ${x[@]:1}',
    "functions": "function f { a 1; }\ng() ( b 2 )\nh ()\n{\n  c 3\n}\nf; g | h",
    "loops": "for i in 1 2; do a $i; done; for ((i=0; i<3; i++)); do b; done\n"
    "while read x; do c; done < file; until d; do e; done",
    "here-documents": "cat <<A > out\n$(one)\nA\ncat <<'B' && run x\n'two\nB\nrun y <<-C\n\tthree\n\tC\nend",
    "redirections": "run a b 2>&1 >> log &> all; exec 3<&0; run <(sub c) d; run < <(sub e)",
    "groups": "{ a; b; } && ( c || d ) & wait",
    "dollar quotes": "run $'a\\tb' a$b.c-\"$d\"e",
    "crlf": "run a\r\nrun b\r\n",
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_pieces(kind):
    text = ODD[kind].replace("\r", "")
    assert ours(text) == theirs(text)
