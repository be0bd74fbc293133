"""The page docs/methods.md, made of what the modules of the methods say about themselves."""

from ml_collections import ConfigDict

from ieg_jax import methods
from ieg_jax.methods.base import ALL_VIEWS, MAIN, TRUSTED, Method

HEAD = """# Methods

`method.name` chooses one. This page is made of the modules in `ieg_jax/methods` (`make docs`); a test holds it to them.
Cost is that of a step in forward passes of one network over a batch, a backward pass counting two, with the usual two
views and as many trusted images as noisy ones.
"""
USUAL = {"batch_size": 64, "trusted.batch_size": 0, "augment.num_views": 2}


def usual_config() -> ConfigDict:
    """As much of a configuration as the cost of a method depends on."""
    config = ConfigDict({"trusted": {}, "augment": {}, "method": {}, "meta": {}})
    config.update_from_flattened_dict(USUAL | methods.defaults())
    return config


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def streams(method: Method) -> str:
    """What a batch is drawn from, in words."""
    said = []
    for name, stream in method.streams.items():
        what = "trusted images" if stream.source == TRUSTED else "training images with their given labels"
        views = (
            "with strong views" if stream.views is ALL_VIEWS else "" if stream.views == 1 else f"{stream.views} views"
        )
        said.append(" ".join(filter(None, [what, views, "" if name == MAIN else f"(`{name}_…` in a batch)"])))
    return "; ".join(said)


def section(method: Method) -> str:
    """The description of one method."""
    facts = [
        f"- A batch is drawn from: {streams(method)}.",
        f"- Networks: {method.networks}. Cost: {method.passes(usual_config()):g} forward passes.",
    ]
    keys = [
        [f"`{key}`", f"`{value.default!r}`", value.check.expected, value.comment]
        for key, value in sorted(method.keys.items())
    ]
    parts = [f"## {method.title}: `{method.name}`", _unwrapped(method.about), "\n".join(facts)]
    if keys:
        parts.append(table(["key", "default", "allowed", "meaning"], keys))
    return "\n\n".join(parts)


def page() -> str:
    """The whole page."""
    described = [methods.get(name) for name in methods.REGISTRY]
    summary = table(
        ["method", "`method.name`", "trusted images", "networks", "cost"],
        [
            [one.title, f"`{one.name}`", "yes" if one.needs_trusted else "no", str(one.networks),
             f"{one.passes(usual_config()):g}"]
            for one in described
        ],
    )  # fmt: skip
    return "\n\n".join([HEAD.rstrip(), summary, *map(section, described)]) + "\n"


def _unwrapped(text: str) -> str:
    """A docstring whose indented formulas become blocks of code in Markdown."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        lines = paragraph.splitlines()
        if all(line.startswith("    ") for line in lines):
            paragraph = "\n".join(["```", *(line[4:] for line in lines), "```"])
        paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)
