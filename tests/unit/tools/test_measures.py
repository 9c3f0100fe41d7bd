from tools.measures import long_functions, python_lines

SOURCE = '''"""A docstring.

Of several lines.
"""

# A comment.
import os  # and one beside code


def join(*parts: str) -> str:
    """Another docstring."""
    text = """a text
that is a value"""
    return os.path.join(
        text,

        *parts,
    )
'''


def test_docstrings_comments_and_blank_lines_are_no_code():
    assert python_lines(SOURCE) == 8


def test_a_long_function_is_found(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "class A:\n    def long(self):\n" + "        x = 1\n" * 60 + "    def short(self):\n" + "        x = 1\n" * 59,
        encoding="utf-8",
    )
    assert list(long_functions(path, tmp_path)) == [(61, "module.py: long")]
