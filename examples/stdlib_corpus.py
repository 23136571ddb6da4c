"""A text corpus that every machine with Python already has: the standard library.

The corpus is the source text of the running interpreter's standard library - comments
and docstrings included, so it is part code and part English - together with the pages
of ``pydoc``'s language reference.  It is split three ways:

``library``
    the modules themselves and the reference pages,
``tests``
    CPython's own test-suite, where the distribution ships it: more text, less prose,
``heldout``
    a fixed list of well-known modules that is never trained on.  Their test files are
    dropped as well, since a test quotes its subject.

The result depends on nothing but the installed Python: files are read in the order of
their paths, exact duplicates are dropped, and every document starts with a one-line
header (``# file: json/decoder.py``) which tells documents apart in a plain text file.
"""

from __future__ import annotations

import random
import re
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

HELDOUT_MODULES = (
    "calendar.py",
    "csv.py",
    "fractions.py",
    "graphlib.py",
    "heapq.py",
    "html/parser.py",
    "http/cookies.py",
    "json/__init__.py",
    "json/decoder.py",
    "json/encoder.py",
    "json/scanner.py",
    "json/tool.py",
    "queue.py",
    "sched.py",
    "shelve.py",
    "statistics.py",
    "tarfile.py",
    "textwrap.py",
)
"""Never trained on: algorithms, formats, text, containers and numbers in about 400 kB."""

HELDOUT_TESTS = re.compile(
    r"test_(calendar|csv|fractions|graphlib|heapq|html_?parser|http_?cookies|json|queue"
    r"|sched|shelve|statistics|tarfile|textwrap)\b"
)
"""The test files of the held-out modules, which are left out altogether."""

TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})

# Third-party code, lookup tables, and files that describe the machine Python was built on.
SKIPPED = re.compile(
    r"(site|dist)-packages/|__pycache__/|encodings/(?!(__init__|aliases|utf_8|idna|punycode)\.py)"
    r"|pydoc_data/|config-[^/]*/|_sysconfigdata"
)

LONGEST_LINE = 1000
"""Files with a longer line are data in disguise."""


@dataclass(frozen=True)
class Document:
    """One file: its path below the standard library and its text."""

    path: str
    text: str

    def __str__(self) -> str:
        """The document as the model sees it, with its header line."""
        return f"# file: {self.path}\n{self.text.strip()}\n"


@dataclass
class Corpus:
    """The three parts of the corpus, each in the order of the paths."""

    library: list[Document] = field(default_factory=list)
    tests: list[Document] = field(default_factory=list)
    heldout: list[Document] = field(default_factory=list)


def build_corpus(stdlib: Path | None = None) -> Corpus:
    """Read the standard library (by default the running Python's) and split it."""
    root = stdlib or Path(sysconfig.get_path("stdlib"))
    corpus = Corpus()
    corpus.heldout = [doc for path in HELDOUT_MODULES if (doc := _read(root, PurePosixPath(path))) is not None]
    if len(corpus.heldout) != len(HELDOUT_MODULES):
        raise RuntimeError(f"held-out modules are missing below {root}")

    texts = {doc.text for doc in corpus.heldout}
    for doc in (*source_files(root), *_reference_pages()):
        if doc.text in texts or not doc.text.strip():
            continue
        texts.add(doc.text)
        is_test = not TEST_FOLDERS.isdisjoint(PurePosixPath(doc.path).parts)
        if not is_test:
            corpus.library.append(doc)
        elif not HELDOUT_TESTS.search(doc.path):
            corpus.tests.append(doc)
    return corpus


def source_files(root: Path) -> Iterator[Document]:
    """The Python files below a folder, in the order of their paths."""
    paths = (PurePosixPath(path.relative_to(root).as_posix()) for path in root.rglob("*.py"))
    for path in sorted(paths, key=str):
        if not SKIPPED.search(str(path)) and (doc := _read(root, path)) is not None:
            yield doc


def sample(documents: Iterable[Document], max_bytes: int, seed: int) -> list[Document]:
    """Choose whole documents at random, at most ``max_bytes`` together, in path order."""
    shuffled = list(documents)
    random.Random(seed).shuffle(shuffled)
    chosen: list[Document] = []
    room = max_bytes
    for doc in shuffled:
        # No single file may take more than a tenth: breadth matters more than length.
        size = len(str(doc).encode()) + 1
        if size <= min(room, max_bytes // 10):
            chosen.append(doc)
            room -= size
    return sorted(chosen, key=lambda doc: doc.path)


def join(documents: Iterable[Document]) -> str:
    """The documents as one plain text: a header line each, an empty line between them."""
    return "\n".join(str(doc) for doc in documents)


def _read(root: Path, path: PurePosixPath) -> Document | None:
    """Read a source file; ``None`` for what is not text (some tests ship broken files)."""
    try:
        with tokenize.open(root / path) as file:  # honours the file's coding declaration
            text = file.read()
        text.encode()
    except (SyntaxError, UnicodeError):
        return None
    if max(map(len, text.splitlines()), default=0) > LONGEST_LINE:
        return None
    return Document(str(path), text)


def _reference_pages() -> Iterator[Document]:
    """The pages behind ``help("lambda")``: the language reference as plain text."""
    from pydoc_data import topics

    for name, page in sorted(topics.topics.items()):
        yield Document(f"help/{name}.txt", page)
