"""The display of Containers, tables and differences: text, rich, HTML."""
