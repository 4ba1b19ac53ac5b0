"""Report of a run folder as HTML and Markdown."""
