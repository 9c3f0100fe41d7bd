"""Texts that a program which reads lines might stumble over."""

ODD = [
    "two\nlines",
    "a ||| b",
    "|||",
    "",
    "  ",
    "a\u2028b\u2029c",
    "tab\there",
    "a\x85b\x0bc\x0cd\re\x1cf",
    "nul \x00 and \x01",
    "half \ud83d of a pair",
    "snow ☃ and 🚆 £20 café",
    "...",
    "<b>x</b> &amp; [y] (z) 's",
    "EVAL ||| 1",
    "long " * 300,
]
