"""The text that every Python carries: the language reference's help topics, about 460 kB of English prose."""

from __future__ import annotations

from pydoc_data.topics import topics


def default_corpus() -> list[str]:
    """One document for each help topic, in the order of the topics' names. They differ a little between Python versions."""
    return [topics[name] for name in sorted(topics)]
