"""How Containers, tables and differences look: text, rich, HTML."""
