"""Makes stdlib_qa.jsonl: questions and answers about Python's standard library.

The answers are docstrings of CPython, Copyright (c) Python Software Foundation, under the PSF
licence (https://docs.python.org/3/license.html). Their text depends on the Python version (and
they vanish under -OO), so one frozen file is shipped, made with Python 3.11 on Linux; peers that
made their own would train on different rows. Make it again with:

    python -m p2pllm.data.make_stdlib_qa > stdlib_qa.jsonl
"""

import importlib
import inspect
import json
import re
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

# Importing these opens a browser, prints a poem, needs a display, or drags in test suites.
SKIPPED = {"antigravity", "this", "idlelib", "test", "turtle", "turtledemo", "tkinter", "lib2to3"}
SIGNATURE = re.compile(r"^[\w.]+\([^)]*\)( ?->.*|:)?$")
SHORTEST, LONGEST = 30, 600  # characters: less says nothing, more is a table or a listing


def modules() -> Iterator[ModuleType]:
    """The importable public top-level modules, by name; importing a submodule can run things."""
    for name in sorted(sys.stdlib_module_names - SKIPPED):
        if name.startswith("_"):
            continue
        try:
            yield importlib.import_module(name)
        except ImportError:  # belongs to another platform, or was built without
            continue


def answer_of(thing: object) -> str | None:
    """The first paragraph of the docstring that is not merely a signature, on one line."""
    doc = inspect.getdoc(thing)
    for paragraph in re.split(r"\n\s*\n", doc or ""):
        lines = paragraph.strip().splitlines()
        while lines and SIGNATURE.match(lines[0].strip()):
            lines = lines[1:]
        text = " ".join(" ".join(lines).split())
        if text:
            return text if SHORTEST <= len(text) <= LONGEST else None
    return None


def members(module: ModuleType) -> Iterator[tuple[str, object]]:
    """The module's own public functions and classes, and the classes' own public methods."""
    exported = getattr(module, "__all__", None)
    for name, thing in sorted(vars(module).items()):
        if name.startswith("_") or not (inspect.isclass(thing) or inspect.isroutine(thing)):
            continue
        # Without __all__ a module also shows what it imported for itself.
        at_home = getattr(thing, "__module__", None) == module.__name__
        if not (at_home if exported is None else name in exported):
            continue
        yield name, thing
        if inspect.isclass(thing):
            for method, function in sorted(vars(thing).items()):
                if not method.startswith("_") and inspect.isroutine(function):
                    yield f"{name}.{method}", getattr(thing, method)


def rows() -> Iterator[dict[str, str]]:
    """Rows in dolly's schema. An answer is asked for once: re-exports would leak across modules."""
    answered = set()
    for module in modules():
        for name, thing in members(module):
            answer = answer_of(thing)
            if answer and answer not in answered:
                answered.add(answer)
                yield {
                    "instruction": f"What does `{module.__name__}.{name}` do?",
                    "context": "",
                    "response": answer,
                    "category": module.__name__,
                }


def main() -> None:
    warnings.simplefilter("ignore", DeprecationWarning)  # deprecated modules have docstrings, too
    for row in rows():
        sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
