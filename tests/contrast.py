"""How well one color is legible on another, as WCAG 2 defines it."""

import re


def contrast(one, other):
    """From 1 to 21, for colors as in style sheets (#abc, #aabbcc) or as a browser computes them (rgb(1, 2, 3))."""
    bright, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def _luminance(color):
    if color.startswith("#"):
        digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
        parts = [int(digits[start : start + 2], 16) / 255 for start in (0, 2, 4)]
    else:
        parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
