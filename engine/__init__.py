"""plexrank's core: it retrieves, ranks, learns and experiments through plugins that it does not know by name."""

__version__ = "0.1.0"
