"""Short sentences about people, to learn within seconds."""

from prefixtune.data import Example

NAMES = ("Ann", "Bo", "Cy", "Di", "Ed", "Flo", "Gus", "Hal")
EIGHT = [Example(f"name : {name}", (f"{name} eats.",)) for name in NAMES]
SHARED = [Example(f"name : {name}", (f"{name} eats.", f"There is {name}.", f"Eat, {name}!")) for name in NAMES[:4]]
HELD_OUT = [Example("name : Zed", ("Zed eats.",))]
