"""What several scripts define under one name is the same in all of them, word for word: copies cannot drift apart."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
OWN = {
    "Args",
    "VisionTransformer",
    "evaluate",
    "main",
    "make_optimizer",
    "pretrain",
    "fine_tune",
    "two_views",
}  # said in a script's way
CONSTANTS = {"RANK", "WORLD", "SWITCH", "RAW"}  # the others are recipes


def definitions(source):
    """The functions, classes and constants at the top of a file, and the text of each with its decorators."""
    lines, texts = source.splitlines(), {}
    for node in ast.parse(source).body:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        text = "\n".join(lines[first - 1 : node.end_lineno])
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            texts[node.name] = text
        elif isinstance(node, ast.Assign):
            names = {name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)}
            texts |= dict.fromkeys(names & CONSTANTS, text)
    return texts


def drifted(sources):
    """sources {file: text} -> the names under which two of them say different things."""
    texts = {}
    for source in sources.values():
        for name, text in definitions(source).items():
            texts.setdefault(name, set()).add(text)
    return sorted(name for name, versions in texts.items() if len(versions) > 1 and name not in OWN)


def test_twins_are_the_same_word_for_word():
    sources = {path.name: path.read_text() for path in ROOT.glob("*.py") if path.name != "common.py"}
    assert set(sources) == {f"{name}.py" for name in ("clip", "dino", "mae", "moco", "rotnet", "simclr")}
    assert drifted(sources) == []


def test_a_planted_difference_is_found():
    source = (ROOT / "simclr.py").read_text()
    assert drifted({"simclr.py": source, "copy.py": source}) == []
    for name, old, new in (
        ("knn_accuracy", "k=200", "k=20"),
        ("load_checkpoint", "weights_only=True)", "weights_only=False)"),
        ("pick_device", "or the best there is", "or whatever there is"),  # a docstring counts
        ("run_folder", "@contextlib.contextmanager", "@contextlib.nothing"),
        ("RANK", 'get("RANK", 0)', 'get("RANK", 1)'),
    ):
        assert old in definitions(source)[name]
        assert name in drifted({"simclr.py": source, "copy.py": source.replace(old, new)})
    assert drifted({"simclr.py": source, "copy.py": source.replace("def main(args)", "def main(args, more)")}) == []


def test_every_name_that_may_differ_is_there_and_differs():
    texts = {name: set() for name in OWN}
    for path in ROOT.glob("*.py"):
        for name, text in definitions(path.read_text()).items():
            texts.get(name, set()).add(text)
    assert all(len(versions) > 1 for versions in texts.values())
