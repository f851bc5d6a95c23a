"""The exercises of results/README.md: without its body a function's tests fail.

Run as a program, this file deletes one body after the other and runs the tests of each, in a
process of its own, since pytest within pytest would import conftest.py anew for all later tests.
"""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROW = r"^\| `(\w+)\.py` \| `([\w.]+)` \| .* \| `python -m pytest (tests/\S+) -k (\w+)` \|$"
PAGE = (ROOT / "results/README.md").read_text()
EXERCISES = re.findall(ROW, PAGE, re.MULTILINE)


def exit_code(script, name, path, words):
    """pytest's exit code without the body of a function, which is put back afterwards."""
    *places, function = name.split(".")
    owner = importlib.import_module(script)
    for place in places:
        owner = getattr(owner, place)
    whole = getattr(owner, function)
    assert whole.__doc__  # is left, and says what to do
    setattr(owner, function, lambda *args, **options: None)
    code = pytest.main([path, "-k", words, "-q", "-x", "-p", "no:cacheprovider"])
    setattr(owner, function, whole)
    return code


def test_there_are_about_twelve():
    assert 10 <= len(EXERCISES) <= 14
    assert PAGE.count("`python -m pytest tests/") == len(EXERCISES)


def test_without_its_body_the_tests_of_a_function_fail():  # with it they pass here like all
    command = [sys.executable, __file__]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    assert codes == [pytest.ExitCode.TESTS_FAILED] * len(EXERCISES)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    print(json.dumps([exit_code(*exercise) for exercise in EXERCISES]))
