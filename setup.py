"""Everything is in pyproject.toml."""

__import__("setuptools").setup()
