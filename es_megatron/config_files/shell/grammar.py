"""Commands of bash as a tree: simple commands, lists, branches, loops, functions, here-documents.

What launch scripts are made of is read as bash reads it. The rest of the language is passed over, not refused: only
what leads to the launch line matters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from es_megatron.config_files.shell.commands import DECLARES
from es_megatron.config_files.shell.tree import (
    Assignment,
    Block,
    Branches,
    Case,
    Command,
    Function,
    Group,
    Loop,
    Pipeline,
    Redirect,
    Simple,
    Statement,
)
from es_megatron.config_files.shell.words import BLANK, CONTINUED, META, Piece, Reader, Word
from es_megatron.errors import ConfigError

ASSIGNED = re.compile(r"([A-Za-z_]\w*)(?:\[[^\]\s]*\])?(\+?)=")
NAMED = re.compile(r"[^\s\"'`$;&|<>()=]+[ \t]*\(\s*\)")
OPERATOR = re.compile(r"&&|\|\||;;&|;;|;&|\|&|[;&|()]")
REDIRECT = re.compile(r"\d*(?:&>>|&>|<<<|<<-|<<|>>|>\||>&|<&|<>|[<>])")
IN_TEST = re.compile(r"&&|\|\||=~|[()<>]")
CLOSES = ("then", "elif", "else", "fi", "do", "done", "esac", "}")


@dataclass
class Parser(Reader):
    """Reads a script from its start to its end."""

    text: str
    at: int = 0
    waiting: list[Redirect] = field(default_factory=list[Redirect])
    """Here-documents whose body begins on the next line."""
    statements: list[Statement] = field(default_factory=list[Statement])
    """All of them, whatever they stand in."""

    def script(self) -> Block:
        """The whole text.

        Raises:
            ConfigError: a quote or bracket is never closed; names its line.
        """
        found: list[Statement] = []
        while True:
            found += self._block(())
            if self.at >= len(self.text):
                return tuple(found)
            self.at += 1 if not (word := self._keyword()) else len(word)  # a stray `fi`, `done` or bracket

    def _block(self, closes: tuple[str, ...]) -> Block:
        found: list[Statement] = []
        while True:
            self._skip(newlines=True)
            if self.at >= len(self.text) or self.text[self.at] == ")" or self.text.startswith(";;", self.at):
                return tuple(found)
            if self.text[self.at] in ";&":
                self.at += 1
            elif self._keyword() in (*closes, *CLOSES):
                return tuple(found)
            else:
                found.append(self._statement())

    def _keyword(self) -> str:
        """The bare word that stands here."""
        match = re.compile(r"[\w!{}]+(?=[\s;&|()<>]|$)").match(self.text, self.at)
        return match[0] if match else ""

    def _skip(self, *, newlines: bool) -> bool:
        """Pass over blanks and comments; whether a line was continued."""
        continued = False
        while self.at < len(self.text):
            if match := CONTINUED.match(self.text, self.at):
                self.at, continued = match.end(), True
            elif self.text[self.at] in BLANK:
                self.at += 1
            elif newlines and self.text[self.at] == "\n":
                self._newline()
            elif newlines and self.text[self.at] == "#":
                end = self.text.find("\n", self.at)
                self.at = len(self.text) if end < 0 else end
            else:
                break
        return continued

    def _newline(self) -> None:
        self.at += 1
        for redirect in self.waiting:
            tabs = redirect.operator.endswith("<<-")
            delimiter = redirect.target.literal() or self.text[redirect.target.start : redirect.target.end]
            quoted = any(piece.quoted for piece in redirect.target.pieces)
            start = self.at
            while self.at < len(self.text):
                end = self.text.find("\n", self.at)
                end = len(self.text) if end < 0 else end
                line, begin = self.text[self.at : end].rstrip("\r"), self.at
                self.at = min(end + 1, len(self.text))
                if (line.lstrip("\t") if tabs else line) == delimiter:
                    redirect.body = self.document(start, begin, expand=not quoted, tabs=tabs)
                    break
            else:
                redirect.body = self.document(start, self.at, expand=not quoted, tabs=tabs)
        self.waiting = []

    def _statement(self) -> Statement:
        start, joined, parts = self.at, "", list[tuple[str, Pipeline]]()
        while True:
            parts.append((joined, self._pipeline()))
            self._skip(newlines=False)
            joined = self.text[self.at : self.at + 2]
            if joined not in ("&&", "||"):
                found = Statement(start, max(self.at, start + 1), tuple(parts))
                self.at = max(self.at, start + 1) if self.at == start else self.at
                self.statements.append(found)
                return found
            self.at += 2
            self._skip(newlines=True)

    def _pipeline(self) -> Pipeline:
        negated = False
        while self._keyword() in ("!", "time"):
            negated = negated != (self._keyword() == "!")
            self.at += len(self._keyword())
            self._skip(newlines=False)
        commands = [self._command()]
        self._skip(newlines=False)
        while self.text.startswith("|", self.at) and not self.text.startswith("||", self.at):
            self.at += 2 if self.text.startswith("|&", self.at) else 1
            self._skip(newlines=True)
            commands.append(self._command())
            self._skip(newlines=False)
        return Pipeline(negated, tuple(commands))

    def _command(self) -> Command:
        readers = {
            "if": self._if,
            "while": self._loop,
            "until": self._loop,
            "for": self._for,
            "select": self._for,
            "case": self._case,
            "{": self._group,
            "function": self._function,
        }
        name = self._keyword()
        if self.text.startswith("((", self.at):
            return self._arithmetic()
        if self.text.startswith("(", self.at):
            found: Command = self._group()
        elif name in readers:
            found = readers[name]()
        elif NAMED.match(self.text, self.at):
            return self._function()
        else:
            return self._simple()
        redirects: list[Redirect] = []
        self._skip(newlines=False)
        while match := REDIRECT.match(self.text, self.at):
            self._redirect(match, redirects)
            self._skip(newlines=False)
        return found

    def _arithmetic(self) -> Command:
        start = self.at
        self.at = self.closing(self.at + 1, "(", ")") + 1
        found = self.text.find(")", self.at)
        self.at = len(self.text) if found < 0 else found + 1
        return Simple((Reader("((").document(0, 2, expand=False, tabs=False),), (), (), start)

    def _expect(self, *names: str) -> str:
        """Pass over a keyword if it is the next word, and say which."""
        self._skip(newlines=True)
        name = self._keyword()
        if name in names:
            self.at += len(name)
            return name
        return ""

    def _if(self) -> Command:
        branches: list[tuple[Block, Block]] = []
        name = self._expect("if")
        while name in ("if", "elif"):
            condition = self._block(("then",))
            self._expect("then")
            branches.append((condition, self._block(("elif", "else", "fi"))))
            name = self._expect("elif", "else", "fi")
        if name == "else":
            branches.append(((), self._block(("fi",))))
            self._expect("fi")
        return Branches(tuple(branches))

    def _loop(self) -> Command:
        self._expect("while", "until")
        condition = self._block(("do",))
        self._expect("do")
        body = self._block(("done",))
        self._expect("done")
        return Loop("", (), condition, body)

    def _for(self) -> Command:
        self._expect("for", "select")
        self._skip(newlines=False)
        name, words = "", list[Word]()
        if self.text.startswith("((", self.at):
            self._arithmetic()
        else:
            name = self.word().literal()
            if self._expect("in"):
                self._skip(newlines=False)
                while self.at < len(self.text) and self.text[self.at] not in ";\n&|<>()":
                    words.append(self.word())
                    self._skip(newlines=False)
        self._skip(newlines=True)
        self.at += self.text.startswith(";", self.at)
        closes = "}" if self._expect("do", "{") == "{" else "done"
        body = self._block((closes,))
        self._expect(closes)
        return Loop(name, tuple(words), (), body)

    def _case(self) -> Command:
        start = self.at
        self._expect("case")
        self._skip(newlines=False)
        word, branches = self.word(), list[tuple[str, Block]]()
        if not self._expect("in"):
            line = self.text.count("\n", 0, start) + 1
            raise ConfigError(f"Line {line}: `case` must be followed by a word and `in`. Correct it.")
        while True:
            self._skip(newlines=True)
            if self.at >= len(self.text) or self._expect("esac"):
                return Case(word, tuple(branches))
            self.at += self.text.startswith("(", self.at)
            end = self.find(")", self.at)
            pattern, self.at = self.text[self.at : end].strip(), end + 1
            branches.append((pattern, self._block(("esac",))))
            if match := re.compile(r";;&|;;|;&").match(self.text, self.at):
                self.at = match.end()
            elif self.at < len(self.text) and self.text[self.at] == ")":
                self.at += 1

    def _group(self) -> Command:
        closing = ")" if self.text[self.at] == "(" else "}"
        opened = self.at
        self.at += 1
        body = self._block((closing,))
        if not self.text.startswith(closing, self.at):
            raise self.unclosed(opened, "(" if closing == ")" else "{")
        self.at += 1
        return Group(body)

    def _function(self) -> Command:
        if self._expect("function"):
            self._skip(newlines=False)
        name = re.compile(r"[^\s()]+").match(self.text, self.at)
        self.at = name.end() if name else self.at
        self._skip(newlines=False)
        if brackets := re.compile(r"\(\s*\)").match(self.text, self.at):
            self.at = brackets.end()
        self._skip(newlines=True)
        return Function(name[0] if name else "", self._command())

    def _simple(self) -> Command:
        start, cut_at, continued = self.at, None, False
        words, assignments, redirects = list[Word](), list[Assignment](), list[Redirect]()
        while self.at < len(self.text):
            text, at = self.text, self.at
            testing = bool(words) and words[0].bare() == "[[" and words[-1].bare() != "]]"
            if text[at] == "\n" and not testing:
                break
            if text[at] == "#":
                cut_at = at if continued and words else cut_at
                end = text.find("\n", at)
                self.at = len(text) if end < 0 else end
                break
            if testing and (match := IN_TEST.match(text, at)):
                words.append(Reader(text).document(at, match.end(), expand=False, tabs=False))
                self.at = match.end()
            elif text.startswith(("<(", ">("), at):
                words.append(self._process())
            elif match := REDIRECT.match(text, at):
                self._redirect(match, redirects)
            elif text[at] in ";&|()":
                break
            else:
                self._part(words, assignments)
            self.at += testing and self.at == at  # a line break inside of [[ ]]
            continued = self._skip(newlines=False)
        return Simple(tuple(words), tuple(assignments), tuple(redirects), start, cut_at)

    def _part(self, words: list[Word], assignments: list[Assignment]) -> None:
        declares = bool(words) and words[0].bare() in DECLARES
        match = ASSIGNED.match(self.text, self.at) if not words or declares else None
        if match is None:
            words.append(self.word())
            return
        self.at = match.end()
        array = self.text.startswith("(", self.at)
        values = self._array() if array else (self.word(),)
        assignments.append(Assignment(match[1], bool(match[2]), values, array))

    def _array(self) -> tuple[Word, ...]:
        opened, words = self.at, list[Word]()
        self.at += 1
        while True:
            self._skip(newlines=True)
            if self.at >= len(self.text):
                raise self.unclosed(opened, "(")
            if self.text[self.at] == ")":
                self.at += 1
                return tuple(words)
            if self.text[self.at] in META:
                self.at += 1
            else:
                words.append(self.word())

    def _process(self) -> Word:
        """`<(...)`: the name of a file."""
        start, self.at = self.at, self.closing(self.at + 1, "(", ")") + 1
        piece = Piece("substitution", self.text[start + 2 : self.at - 1], True, start, self.at, start + 2)
        return Word(start, self.at, (piece,))

    def _redirect(self, match: re.Match[str], redirects: list[Redirect]) -> None:
        self.at = match.end()
        operator = match[0].lstrip("0123456789")
        if self.text.startswith("(", self.at):  # > (...) has no meaning
            return
        self._skip(newlines=False)
        target = self._process() if self.text.startswith(("<(", ">("), self.at) else self.word()
        redirect = Redirect(operator, target)
        redirects.append(redirect)
        if operator in ("<<", "<<-"):
            self.waiting.append(redirect)


def parse(text: str) -> Block:
    """A script as a tree.

    Raises:
        ConfigError: a quote or bracket is never closed; names its line.
    """
    return Parser(text).script()
