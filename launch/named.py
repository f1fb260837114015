"""What a command is told to run with: a preset by name, a recipe by name, or any run.json by path."""

from __future__ import annotations

import textwrap
from pathlib import Path

from launch import recipes
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import load_run, preset_named
from limoe_dist.config.presets import TWINS, base_names, base_of, names
from limoe_dist.config.schema import Run


def run_named(word: str) -> Run:
    """The run of a preset, of a recipe, of a twin of either, or of a file. Raises UserError, with the nearest name.

    A name wins over a file that is called so.
    """
    if word in names():
        return preset_named(word)
    if base_of(word) in recipes.names():
        return _recipe(word)
    path = Path(word)
    if path.is_dir():
        fix = f"give {path / 'run.json'}" if (path / "run.json").is_file() else "it holds no run.json"
        raise UserError(f"{word} is a directory, and not a preset, a recipe or a run.json: {fix}")
    if path.suffix == ".json" or path.is_file():
        return load_run(path)
    return preset_named(word, recipes=recipes.names())


def _recipe(name: str) -> Run:
    run = load_run(recipes.path(base_of(name)))
    if suffix := name.removeprefix(base_of(name)):
        _, twin = TWINS[suffix]
        return twin(run).model_copy(update={"preset": run.preset + suffix})
    return run


def listing() -> str:
    """Every preset and recipe with a line about it, for the help of a command."""
    known = {"presets": base_names(), "recipes": recipes.names()}
    width = max(len(name) for group in known.values() for name in group)
    lines = []
    for title, group in known.items():
        lines += [f"{title}:", *(f"  {name:<{width}}  {about}" for name, about in group.items()), ""]
    twins = "; ".join(f"NAME{suffix} ({about})" for suffix, (about, _) in TWINS.items())
    return "\n".join(
        [
            *lines,
            *textwrap.wrap(f"Each also as {twins}.", 110),
            "A recipe is a run.json with all settings of one of the paper's runs: see docs/recipes.md.",
            "FILE.json is any run.json.",
        ]
    )
