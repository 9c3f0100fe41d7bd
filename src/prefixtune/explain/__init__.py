"""What a prefix does and says: views of it, each with its controls and with what it can and cannot show.

    subject (prefix, rows, controls, limits) -> views (attention, loss, ...) -> page

Reads no files and writes none.
"""
