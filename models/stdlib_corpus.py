"""The text the tiny checkpoint learns from: the running Python's own standard library.

Promises: documents come in an order fixed by module name, so one Python version gives one corpus,
and a held-out document shares no file with the training set. Another Python version has other
files and so gives another corpus. Knows nothing of tokens or models.

Three kinds of document: the sources (code, comments, docstrings), the language reference that
`help()` reads (prose), and questions about a function answered by its docstring (chat).
"""

import ast
import inspect
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

HELD_OUT_PERIOD = 50  # one document in fifty, 2%
MAX_ANSWER_CHARS = 600
SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "encodings",  # generated character tables
        "idle_test",
        "lib2to3",  # a grammar and its pickled tables
        "msilib",  # generated installer tables
        "pydoc_data",  # read as topics instead
        "site-packages",
        "test",
        "tests",
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """One question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """What to train on and what to measure on. No held-out file has a part in the rest."""

    texts: tuple[str, ...]
    exchanges: tuple[Exchange, ...]
    held_out: tuple[str, ...]


def read_corpus() -> Corpus:
    """Read the standard library of the Python that runs this."""
    sources = list(read_sources(Path(sysconfig.get_paths()["stdlib"])))
    prose = [text.strip() + "\n" for _, text in sorted(topics.items())]
    code_train, code_held = hold_out(sources)
    prose_train, prose_held = hold_out(prose)
    exchanges = tuple(exchange for source in code_train for exchange in read_exchanges(source))
    return Corpus(
        texts=(*code_train, *prose_train),
        exchanges=exchanges,
        held_out=(*code_held, *prose_held),
    )


def read_sources(stdlib: Path) -> Iterator[str]:
    """Every source worth reading under `stdlib`, sorted by module name."""
    paths = (path.relative_to(stdlib) for path in stdlib.rglob("*.py"))
    modules = {path.with_suffix("").parts: path for path in paths if is_readable(path)}
    for _, path in sorted(modules.items()):
        text = (stdlib / path).read_text(encoding="utf-8", errors="replace")
        if text.strip():
            yield text.expandtabs(8)


def is_readable(path: Path) -> bool:
    """Whether a person wrote the file at `path` (relative to the library) to be read."""
    *folders, name = path.parts
    generated = name.startswith("_sysconfigdata") or any("config-" in part for part in folders)
    return not generated and SKIPPED_FOLDERS.isdisjoint(folders)


def hold_out(documents: list[str]) -> tuple[list[str], list[str]]:
    """Split in two: (to train on, to measure on). Spread evenly, the same every time."""
    middle = HELD_OUT_PERIOD // 2
    held = [text for i, text in enumerate(documents) if i % HELD_OUT_PERIOD == middle]
    kept = [text for i, text in enumerate(documents) if i % HELD_OUT_PERIOD != middle]
    return kept, held


def read_exchanges(source: str) -> Iterator[Exchange]:
    """For each public function or class of `source` with a docstring, a question about it."""
    for name, docstring in public_docstrings(ast.parse(source).body):
        if len(docstring) <= MAX_ANSWER_CHARS:
            yield Exchange(question=f"What does {name} do?", answer=docstring)


def public_docstrings(body: Iterable[ast.stmt], owner: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of what `body` defines, classes before their methods."""
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_"):
            continue
        if docstring := ast.get_docstring(node):
            yield owner + node.name, inspect.cleandoc(docstring)
        if isinstance(node, ast.ClassDef):
            yield from public_docstrings(node.body, f"{owner}{node.name}.")
