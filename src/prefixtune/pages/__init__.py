"""Documents of text, tables and pictures, as one HTML page, as Markdown, and as files of figures.

    document (blocks) -> page (templates) and figures

Knows nothing of what a document is about.
"""
