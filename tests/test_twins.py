"""What several scripts define under one name is the same in all of them, word for word."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = "simclr.py", "moco.py", "rotnet.py", "mae.py", "dino.py", "clip.py"
# What each script has in its own way: all of it stands above the ruled line.
OWN = {"Args", "two_views", "gather", "training_step", "make_optimizer", "evaluate", "main"}
OWN |= {"ENCODERS", "VisionTransformer", "fine_tune"}
# What the others have below it, and these in their own way above it.
INSTEAD = {"clip.py": "pretrain", "dino.py": "make_update"}
CONSTANTS = {"RANK", "WORLD", "ENCODERS"}  # the others are recipes


def definitions(source):
    """The functions, classes and constants at the top level of a file, and the text of each."""
    lines = source.splitlines()
    texts = {}
    for node in ast.parse(source).body:
        decorators = [decorator.lineno for decorator in getattr(node, "decorator_list", [])]
        text = "\n".join(lines[min([node.lineno, *decorators]) - 1 : node.end_lineno])
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            texts[node.name] = text
        elif isinstance(node, ast.Assign):
            names = [name for target in node.targets for name in ast.walk(target)]
            names = {name.id for name in names if isinstance(name, ast.Name)}
            texts |= dict.fromkeys(names & CONSTANTS, text)
    return texts


def drifted(*sources):
    """The names under which two of the sources have different texts."""
    texts = {}
    for source in sources:
        for name, text in definitions(source).items():
            texts.setdefault(name, set()).add(text)
    own = OWN | set(INSTEAD.values())
    return sorted(name for name, versions in texts.items() if len(versions) > 1 and name not in own)


def below_the_line(source):
    _, _, below = source.partition("# === Nothing below is about ")
    return below.split("\n", 1)[1]


def test_twins_are_the_same_word_for_word():
    assert drifted(*[(ROOT / name).read_text() for name in SCRIPTS]) == []


def test_every_script_is_compared():
    assert {*SCRIPTS, "common.py"} == {path.name for path in ROOT.glob("*.py")}


def test_below_the_line_all_scripts_are_one_text():
    common = below_the_line((ROOT / "simclr.py").read_text())
    assert not OWN & definitions(common).keys()
    for path in SCRIPTS:
        expected = common
        if path in INSTEAD:
            expected = common.replace(definitions(common)[INSTEAD[path]] + "\n\n\n", "")
            assert expected != common
        assert below_the_line((ROOT / path).read_text()) == expected


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("knn_accuracy", "k=200", "k=20"),
        ("load_checkpoint", "weights_only=True)", "weights_only=False)"),
        ("pick_device", "the best there is", "whatever there is"),  # a docstring counts
        ("run_folder", "@contextlib.contextmanager", "@contextlib.nothing"),
        ("RANK", 'get("RANK", 0)', 'get("RANK", 1)'),
    ],
)
def test_a_planted_difference_is_found(name, old, new):
    source = (ROOT / "simclr.py").read_text()
    assert drifted(source, source) == []
    assert old in definitions(source)[name]
    assert name in drifted(source, source.replace(old, new))


def test_what_a_script_has_in_its_own_way_may_differ():
    source = (ROOT / "simclr.py").read_text()
    assert "def main(args, " in source
    assert drifted(source, source.replace("def main(args, ", "def main(args, more, ")) == []


def test_every_name_that_may_differ_does():
    texts = {name: set() for name in OWN}
    for path in ROOT.glob("*.py"):
        for name, text in definitions(path.read_text()).items():
            texts.get(name, set()).add(text)
    assert all(len(versions) > 1 for versions in texts.values())
