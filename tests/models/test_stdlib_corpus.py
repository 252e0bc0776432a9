"""What the tiny checkpoint reads: the right files, split and asked about the same every time."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "models" / "stdlib_corpus.py"


@pytest.fixture(scope="module")
def stdlib_corpus() -> ModuleType:
    """The module, which lies beside the training script and in no package."""
    spec = importlib.util.spec_from_file_location("stdlib_corpus", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_sources_come_sorted_and_without_tests_or_empty_files(
    stdlib_corpus: ModuleType, tmp_path: Path
) -> None:
    for name in ("b.py", "a/z.py", "a.py", "test/test_a.py", "encodings/cp437.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# {name}\n")
    (tmp_path / "a" / "__init__.py").write_text("")
    assert list(stdlib_corpus.read_sources(tmp_path)) == ["# a.py\n", "# a/z.py\n", "# b.py\n"]


def test_one_document_in_fifty_is_held_out_and_in_one_part_only(
    stdlib_corpus: ModuleType,
) -> None:
    documents = [f"document {i}" for i in range(200)]
    kept, held = stdlib_corpus.hold_out(documents)
    assert len(held) == 4
    assert sorted(kept + held) == sorted(documents)


def test_public_docstrings_become_exchanges(stdlib_corpus: ModuleType) -> None:
    source = '''
class Queue:
    """Hold items in order."""

    def put(self, item):
        """Add an item."""

    def _grow(self):
        """Make room."""

def size(queue): return len(queue)
'''
    exchanges = list(stdlib_corpus.read_exchanges(source))
    assert [(e.question, e.answer) for e in exchanges] == [
        ("What does Queue do?", "Hold items in order."),
        ("What does Queue.put do?", "Add an item."),
    ]
