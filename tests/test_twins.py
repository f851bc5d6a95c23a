"""What several scripts define under one name is the same in all of them, word for word: copies cannot drift apart."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
OWN = {
    "Args",
    "VisionTransformer",
    "evaluate",
    "fit_recipe",
    "main",
    "pretrain",
    "two_views",
}  # what scripts say in their own way


def definitions(source):
    """The functions and classes at the top of a file, and the text of each."""
    lines, nodes = source.splitlines(), ast.parse(source).body
    kinds = ast.FunctionDef | ast.ClassDef
    return {n.name: "\n".join(lines[n.lineno - 1 : n.end_lineno]) for n in nodes if isinstance(n, kinds)}


def drifted(sources):
    """sources {file: text} -> the names under which two of them say different things."""
    texts = {}
    for source in sources.values():
        for name, text in definitions(source).items():
            texts.setdefault(name, set()).add(text)
    return sorted(name for name, versions in texts.items() if len(versions) > 1 and name not in OWN)


def test_twins_are_the_same_word_for_word():
    sources = {path.name: path.read_text() for path in ROOT.glob("*.py") if path.name != "common.py"}
    new = {name: source for name, source in sources.items() if "# === Nothing below is about" in source}
    old = {name: source for name, source in sources.items() if name not in new}  # until all are in the new form
    assert {"simclr.py", "moco.py"} <= set(new) and drifted(new) == drifted(old) == []


def test_a_planted_difference_is_found():
    source = (ROOT / "simclr.py").read_text()
    assert drifted({"simclr.py": source, "copy.py": source}) == []
    for name, old, new in (
        ("knn_accuracy", "k=200", "k=20"),
        ("load_checkpoint", "weights_only=True)", "weights_only=False)"),
        ("pick_device", "or the best there is", "or whatever there is"),  # a docstring counts
    ):
        assert old in definitions(source)[name]
        assert drifted({"simclr.py": source, "copy.py": source.replace(old, new)}) == [name]
    assert drifted({"simclr.py": source, "copy.py": source.replace("def main(args)", "def main(args, more)")}) == []


def test_every_name_that_may_differ_is_there_and_differs():
    texts = {name: set() for name in OWN}
    for path in ROOT.glob("*.py"):
        for name, text in definitions(path.read_text()).items():
            texts.get(name, set()).add(text)
    assert all(len(versions) > 1 for versions in texts.values())
